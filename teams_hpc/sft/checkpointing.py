"""Checkpoints: a folder of DeepSpeed's files is one only with our manifest, written last.

DeepSpeed's files hold pickles. They are read only if folder and files belong to this user, nobody
else can write them, and their SHA-256 is that of the manifest.
"""

import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from teams_hpc.config.digest import file_digest
from teams_hpc.errors import CorruptFileError, UsageError
from teams_hpc.runtime.ranks import Ranks
from teams_hpc.sft.model import publish_folder
from teams_hpc.storage.atomic import read_json, write_json

_MANIFEST = "manifest.json"
_TAG = "state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    world_size: int


def _name(step: int) -> str:
    return f"step-{step:06d}"


def save_checkpoint(
    engine: Any, folder: Path, *, step: int, ranks: Ranks, digest: str, keep: int
) -> None:
    """Save the state of all ranks after `step` optimizer steps; keeps the newest `keep`."""
    temporary = folder / f".{_name(step)}.tmp"
    if ranks.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(temporary), tag=_TAG, save_latest=False)
    dist.barrier()
    if ranks.is_first:
        files = {
            str(path.relative_to(temporary)): file_digest(path)
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        content = {"step": step, "world_size": ranks.world_size, "digest": digest, "files": files}
        write_json(temporary / _MANIFEST, content)
        publish_folder(temporary, folder / _name(step))
        for old in _folders(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if (path / _MANIFEST).is_file())


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed save left."""
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def newest_checkpoint(folder: Path, digest: str) -> Checkpoint | None:
    """The newest complete checkpoint made from the same inputs, or None."""
    for path in reversed(_folders(folder)):
        manifest = read_json(path / _MANIFEST)
        if manifest["digest"] == digest:
            return Checkpoint(folder=path, step=manifest["step"], world_size=manifest["world_size"])
    return None


def load_checkpoint(engine: Any, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Put the state of all ranks back.

    Raises:
        UsageError: It was saved by another number of ranks.
        CorruptFileError: It is damaged, or somebody else could have written it.
    """
    if checkpoint.world_size != ranks.world_size:
        raise UsageError(
            f"{checkpoint.folder} was saved by {checkpoint.world_size} ranks, this training has "
            f"{ranks.world_size}; set site.num_sft_ranks={checkpoint.world_size}"
        )
    _check_trust(checkpoint.folder)
    path, _ = engine.load_checkpoint(str(checkpoint.folder), tag=_TAG)
    if path is None:
        raise CorruptFileError(f"DeepSpeed could not load {checkpoint.folder}")


def _check_trust(folder: Path) -> None:
    files = read_json(folder / _MANIFEST)["files"]
    for path in (folder, folder / _TAG, *(folder / name for name in files)):
        if not path.exists():
            raise CorruptFileError(f"{path} is missing; remove {folder} to go back one checkpoint")
        state = path.stat()
        if state.st_uid != os.getuid() or state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CorruptFileError(
                f"{path} belongs to or can be written by somebody else; it holds pickles and is "
                "not loaded"
            )
    for name, expected in files.items():
        if file_digest(folder / name) != expected:
            raise CorruptFileError(
                f"{folder / name} is damaged; remove {folder} to go back one checkpoint"
            )
