"""Starting torch.distributed and DeepSpeed, without a compiler where there is no GPU."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from teams_hpc.errors import WorkError
from teams_hpc.runtime.ranks import Ranks
from teams_hpc.sft.deepspeed_config import Device


def device_kind() -> Device:
    """Where training runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def distributed(ranks: Ranks) -> Iterator[torch.device]:
    """A process group of all ranks while the block runs; yields this rank's device.

    Raises:
        WorkError: The world has another size than the launcher said.
    """
    kind = device_kind()
    if kind == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.world_size))
    else:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(
        dist_backend="nccl" if kind == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    try:
        if dist.get_world_size() != ranks.world_size:
            raise WorkError(
                f"{dist.get_world_size()} ranks came together instead of {ranks.world_size}; "
                "check how the launcher starts them"
            )
        yield (
            torch.device(kind, torch.cuda.current_device())
            if kind == "cuda"
            else torch.device("cpu")
        )
    finally:
        dist.destroy_process_group()


def import_deepspeed() -> Any:
    """DeepSpeed, quiet, and never compiling its CPU communication at first use."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if device_kind() == "cpu":
        # The op saves time for large tensors on one node and needs a compiler and 78 s; losses are
        # bitwise the same without it. There is no public switch.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
