"""The processes of one fine-tuning: how they meet, agree and fail."""

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from teams_hpc.errors import StopRequested, UsageError, WorkError
from teams_hpc.runtime.ranks import Ranks

Device = Literal["cpu", "cuda"]

_TIMEOUT = timedelta(hours=1)
_LINGER_S = 30.0
_LOST_PEER = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among its equals; every method is called by all of them together."""

    ranks: Ranks
    device: Device

    @property
    def size(self) -> int:
        return self.ranks.world_size

    @property
    def is_first(self) -> bool:
        return self.ranks.is_first

    def sum(self, *values: float) -> list[float]:
        """Sums over all processes, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def max(self, value: float) -> float:
        """The largest of all processes' values."""
        largest = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait for everybody."""
        self.sum(0.0)


def find_device() -> Device:
    """CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def joined_world(ranks: Ranks, device: Device) -> Iterator[World]:
    """Meet the other processes; leave them in order at the end or when all stop.

    After any other error nothing is waited for: whoever started the processes ends them.

    Raises:
        UsageError: The launcher didn't say where to meet.
        WorkError: Memory ran out, or another process was lost.
    """
    _prepare_environment(ranks, device)
    with naming_failures():
        _meet(ranks, device)
        world = World(ranks=ranks, device=device)
        _check_all_are_there(world)
        try:
            yield world
        except StopRequested:
            _part(world)
            raise
        _part(world)


def _check_all_are_there(world: World) -> None:
    """Count by a real collective, before anything is computed."""
    met, ranks = world.sum(1.0, float(world.ranks.rank))
    if (met, ranks) != (world.size, world.size * (world.size - 1) / 2):
        raise UsageError(
            f"{met:.0f} processes met, with ranks that sum to {ranks:.0f}; the launcher started "
            f"{world.size}: each needs a RANK of its own, and all the same WORLD_SIZE"
        )


def _part(world: World) -> None:
    world.barrier()
    dist.destroy_process_group()


def _prepare_environment(ranks: Ranks, device: Device) -> None:
    """Set what DeepSpeed and gloo read from the environment; before DeepSpeed is imported."""
    if ranks.world_size > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UsageError(
                f"fine-tuning in {ranks.world_size} processes needs {' and '.join(missing)} in the "
                "environment: the address and a free port of the first process's node"
            )
    os.environ["RANK"] = str(ranks.rank)
    os.environ["WORLD_SIZE"] = str(ranks.world_size)
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)
    if device == "cuda":
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Else DeepSpeed counts CPU sockets by running numactl, which may be missing.
    os.environ["LOCAL_SIZE"] = str(ranks.local_world_size)
    if os.environ.get("MASTER_ADDR", "").startswith(("127.", "localhost")):
        # Else gloo looks up this host's name, which laptops and containers often can't resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _meet(ranks: Ranks, device: Device) -> None:
    if device == "cuda":
        # Slurm may show each process all GPUs of its node, or only its own.
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        # Alone there is nobody to meet at a port.
        store=dist.HashStore() if ranks.world_size == 1 else None,  # type: ignore[attr-defined]
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=_TIMEOUT,
    )
    deepspeed = _quiet_deepspeed(device)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)


def _quiet_deepspeed(device: Device) -> Any:
    """Import DeepSpeed so that it neither compiles anything nor talks about itself."""
    import deepspeed  # slow, and it reads the environment

    # It calls collectives by names that torch 2.13 is about to change.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device == "cpu":
        # It would compile an operator for shared memory at first use (78 s, and a compiler on
        # PATH), after probing for compilers. gloo's own is as exact. Private as of 0.19.8.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def default_threads(ranks: Ranks) -> int:
    """CPU threads for torch: this machine's cores shared by its processes, unless OpenMP was told.

    The number may change the last bits of a sum. A checkpoint remembers it, so that a run
    continues with the same numbers on a machine with another number of cores.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size)


@contextmanager
def naming_failures() -> Iterator[None]:
    """Turn what torch raises for lack of memory or of a peer into errors that say what to do.

    Raises:
        WorkError: Memory ran out here, or another process is gone.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or any(
            words in text for words in _OUT_OF_MEMORY
        ):
            raise WorkError(_out_of_memory_text(text)) from error
        if not (isinstance(error, dist.DistError) or any(words in text for words in _LOST_PEER)):
            raise
        _log.error("lost the connection to another process: %s", text)
        # Whoever started us should hear first of the process that went, which knows why.
        time.sleep(_LINGER_S)
        raise WorkError(
            "another process of the fine-tuning was lost; its own log says why; "
            "running again goes on from the last checkpoint"
        ) from error


def _out_of_memory_text(text: str) -> str:
    first = text.strip().splitlines()[0][:200]
    return (
        f"out of memory: {first}\n"
        "lower sft.micro_batch_rows (the result stays the same), set "
        "sft.activation_checkpointing=true, set sft.offload_optimizer=true, or use more processes "
        "(site.num_sft_ranks); running again goes on from the last checkpoint"
    )
