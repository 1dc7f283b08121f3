"""A fine-tuning that goes on with another number of processes.

DeepSpeed's converter writes a checkpoint's state parameter by parameter; that is done once, by one
process on the host, before the others start. What it then gets wrong in loading is mended here.
"""

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from teams_hpc.config import Config
from teams_hpc.errors import WorkError
from teams_hpc.sft.checkpointing import Alone, CheckpointStore
from teams_hpc.sft.claim import claimed
from teams_hpc.storage.atomic import read_json
from teams_hpc.storage.run_dir import RunDir

TAG = "zero"
"""The folder within a checkpoint that is DeepSpeed's."""

_log = logging.getLogger(__name__)


def reshape_checkpoint(run_dir: RunDir, config: Config, num_ranks: int) -> Path | None:
    """Let `num_ranks` processes go on from the newest checkpoint.

    Args:
        run_dir: The run.
        config: Its configuration.
        num_ranks: Processes that will go on.

    Returns:
        The folder they will read, if it had to be made; None if there was nothing to do.

    Raises:
        RunInUseError: It is being trained.
        WorkError: DeepSpeed can't convert it, or the disk is full. The checkpoint stays.
    """
    if not run_dir.checkpoints.is_dir():
        return None
    digest = read_json(run_dir.inputs("sft"))["digest"]
    with claimed(run_dir, config, Alone.ranks):
        store = CheckpointStore(run_dir.checkpoints, digest, Alone(), config.sft.keep_checkpoints)
        checkpoint = store.latest()
        if checkpoint is None or checkpoint.world_size == num_ranks or store.universal(checkpoint):
            return None
        _log.info("reshaping %s for %d processes", checkpoint.folder, num_ranks)
        store.make_universal(checkpoint, _convert)
        universal = store.universal(checkpoint)
    return universal.folder if universal else None


def _convert(source: Path, target: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(source / TAG),
        output_folder=str(target / TAG),
        num_extract_workers=1,  # more are processes that nobody would end with this one
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # of models that don't describe themselves, at stage 2
    )
    try:
        with redirect_stdout(sys.stderr):
            ds_to_universal.main(arguments)
    except (RuntimeError, ValueError, AssertionError, KeyError) as error:
        raise WorkError(
            f"DeepSpeed can't convert {source}: {error}. Is the disk full? It takes three times "
            "the room of the checkpoint for a while. Make room and run again, or go on with as "
            "many processes as before"
        ) from error
    (target / "latest_universal").unlink(missing_ok=True)


def repair_universal_load(optimizer: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Undo two faults of DeepSpeed 0.19.8 in loading a universal checkpoint at stage 3.

    It gives all parameter groups the hyper-parameters of the first, so that norms decay too; and
    all sub-groups one and the same step counter, which then counts each of them.

    Args:
        optimizer: The optimizer that DeepSpeed has wrapped.
        groups: Its groups' hyper-parameters before.
    """
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        group.update(before)
    for parameter, state in optimizer.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].detach().to(parameter.device, copy=True)
