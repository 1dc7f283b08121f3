"""Checkpoints: written whole, read only if they are what was written and nobody else could.

    checkpoints/step-000123/
        manifest.json    step, world size, input digest, state of the run, SHA-256 of every file,
                     seconds the save took (a job must be warned so long before its end)
        zero/            what DeepSpeed writes, a part by each process (pickles)
    checkpoints/universal-000123/
        manifest.json    of which checkpoint it was made, SHA-256 of every file
        zero/            the same state, parameter by parameter, for any number of processes

A folder is filled under a temporary name, the manifest last, and then renamed.
"""

import logging
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from teams_hpc.config.digest import file_digest
from teams_hpc.errors import CorruptFileError, InputChangedError, UsageError, WorkError
from teams_hpc.runtime.ranks import Ranks
from teams_hpc.sft.folders import (
    commit_folder,
    files_below,
    make_durable,
    remove_folder,
    remove_leftover_folders,
    temporary_folder,
)
from teams_hpc.storage.atomic import naming_disk_faults, read_json, write_json

_SCHEMA = 1
_MANIFEST = "manifest.json"
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_log = logging.getLogger(__name__)


class Peers(Protocol):
    """The processes that share the work on checkpoints; see `world.World`."""

    @property
    def ranks(self) -> Ranks: ...
    @property
    def size(self) -> int: ...
    @property
    def is_first(self) -> bool: ...
    def gather(self, value: Any) -> list[Any]: ...
    def barrier(self) -> None: ...


class Alone:
    """A process without peers."""

    ranks = Ranks()
    size = 1
    is_first = True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        """Nobody to wait for."""


class Saves(Protocol):
    """What has a state of its own to save: the engine."""

    def save(self, folder: Path) -> None:
        """Write this process's part into `folder`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """All that changes while training, but for what DeepSpeed keeps.

    Attributes:
        step: Optimizer steps done; with the seed it says which rows come next.
        tokens: Tokens trained on so far, padding left out.
        first_loss: Of the first step, nats a token.
        last_loss: Of the last step.
        held_out_before: Held-out loss of the model before the first step; None without rows.
        held_out_loss: The last one measured.
        held_out_step: When that was.
        threads: CPU threads of each process: resuming uses as many, for equal numbers.
    """

    step: int = 0
    tokens: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    held_out_before: float | None = None
    held_out_loss: float | None = None
    held_out_step: int | None = None
    threads: int = 1

    def with_held_out(self, loss: float | None) -> "RunState":
        """After held-out loss was measured at this step."""
        before = loss if self.step == 0 else self.held_out_before
        return replace(self, held_out_before=before, held_out_loss=loss, held_out_step=self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint found on disk.

    Attributes:
        folder: Where it is.
        world_size: Processes that can go on from it; None: any number.
        digest: Of the stage's inputs.
        state: Of the run.
        files: SHA-256 of each file.
        save_s: Seconds that writing it took.
    """

    folder: Path
    world_size: int | None
    digest: str
    state: RunState
    files: dict[str, str]
    save_s: float


class CheckpointStore:
    """The checkpoints of one run; methods are called by all processes together.

    Args:
        folder: Where they are.
        digest: Input digest of the stage: a checkpoint of other inputs is refused.
        world: The processes.
        keep: How many of the newest to keep.

    Attributes:
        slowest_save_s: Seconds that the slowest save took, as far as is known.
    """

    def __init__(self, folder: Path, digest: str, world: Peers, keep: int) -> None:
        self._folder = folder
        self._digest = digest
        self._world = world
        self._keep = keep
        self.slowest_save_s = 0.0
        if world.is_first:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            remove_leftover_folders(folder)
        world.barrier()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is intact; damaged newer ones are passed over with a warning.

        Raises:
            InputChangedError: It is of other inputs.
            WorkError: Somebody else could have written it.
        """
        for path in reversed(self._folders()):
            checkpoint = _read(path)
            if checkpoint is not None:
                self._refuse_foreign(checkpoint)
                self.slowest_save_s = max(self.slowest_save_s, checkpoint.save_s)
                if self._is_intact(checkpoint):
                    return checkpoint
            _log.warning("%s is damaged: going on from an earlier checkpoint, if any", path)
        return None

    def universal(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """The same state for any number of processes, if it has been made and is intact.

        Raises:
            WorkError: Somebody else could have written it.
        """
        folder = self._universal_folder(checkpoint)
        try:
            content: Any = read_json(folder / _MANIFEST)
        except (FileNotFoundError, CorruptFileError):
            return None
        found = replace(checkpoint, folder=folder, world_size=None, files=content["files"])
        _refuse_others(self._folder, folder)
        is_of_it = content["made_of"] == file_digest(checkpoint.folder / _MANIFEST)
        return found if is_of_it and self._is_intact(found) else None

    def make_universal(self, checkpoint: Checkpoint, convert: Callable[[Path, Path], None]) -> None:
        """Make the state of a checkpoint fit any number of processes.

        Args:
            checkpoint: From `latest`.
            convert: Called with the checkpoint's folder and an empty one to fill.

        Raises:
            WorkError: The disk is full or failing; the checkpoint stays.
        """
        with self._filling(self._universal_folder(checkpoint)) as temporary:
            convert(checkpoint.folder, temporary)
            self._seal(temporary, {"made_of": file_digest(checkpoint.folder / _MANIFEST)})

    def save(self, engine: Saves, state: RunState) -> None:
        """Write a checkpoint, then remove older ones that are too many, and damaged later ones.

        Raises:
            WorkError: The disk is full or failing; earlier checkpoints stay.
        """
        target = self._folder / f"step-{state.step:06d}"
        start = time.monotonic()
        with self._filling(target) as temporary:
            engine.save(temporary)
            self._world.barrier()
            content = {
                "schema": _SCHEMA,
                "digest": self._digest,
                "world_size": self._world.size,
                "state": asdict(state),
            }
            self._seal(temporary, content, since=start)
        if self._world.is_first:
            self._prune(target)
        self._world.barrier()
        self.slowest_save_s = max(self.slowest_save_s, time.monotonic() - start)
        _log.info("checkpoint %s", target)

    @contextmanager
    def _filling(self, target: Path) -> Iterator[Path]:
        """An empty folder that nobody else can enter, which then takes the name `target`."""
        temporary = temporary_folder(target)
        with naming_disk_faults(target):
            if self._world.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(mode=0o700)
            self._world.barrier()
            yield temporary
            if self._world.is_first:
                commit_folder(temporary, target)
            self._world.barrier()

    def _universal_folder(self, checkpoint: Checkpoint) -> Path:
        return self._folder / f"universal-{checkpoint.state.step:06d}"

    def _folders(self) -> list[Path]:
        """Complete checkpoints, by step."""
        found = self._folder.glob("step-*")
        return sorted((path for path in found if (path / _MANIFEST).is_file()), key=_step)

    def _prune(self, newest: Path) -> None:
        folders = self._folders()
        end = folders.index(newest) + 1
        for folder in (*folders[: max(0, end - self._keep)], *folders[end:]):
            remove_folder(folder)
        steps = {_step(folder) for folder in self._folders()}
        for folder in self._folder.glob("universal-*"):
            if _step(folder) not in steps:
                remove_folder(folder)

    def _mine(self, names: Iterable[str]) -> list[str]:
        """This process's share of the work on some files."""
        return sorted(names)[self._world.ranks.rank :: self._world.size]

    def _seal(self, folder: Path, content: dict[str, Any], since: float | None = None) -> None:
        """Make every file durable and private; write the manifest, with their SHA-256."""
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o700)
        digests = {}
        for name in self._mine(files_below(folder)):
            path = folder / name
            path.chmod(0o600)
            make_durable(path)
            digests[name] = file_digest(path)
        parts = self._world.gather(digests)
        if not self._world.is_first:
            return
        files = {name: digest for part in parts for name, digest in part.items()}
        took = {} if since is None else {"save_s": time.monotonic() - since}
        write_json(folder / _MANIFEST, {**content, "files": files, **took})
        (folder / _MANIFEST).chmod(0o600)

    def _is_intact(self, checkpoint: Checkpoint) -> bool:
        faults = 0
        for name in self._mine(checkpoint.files):
            path = checkpoint.folder / name
            faults += not path.is_file() or file_digest(path) != checkpoint.files[name]
        return not any(self._world.gather(faults))

    def _refuse_foreign(self, checkpoint: Checkpoint) -> None:
        if checkpoint.digest != self._digest:
            raise InputChangedError(
                f"{checkpoint.folder} was made from other inputs (model, data or settings); "
                "start over with --rerun-from sft"
            )
        _refuse_others(self._folder, checkpoint.folder)


def checkpoint_for(store: CheckpointStore, num_ranks: int, run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint as so many processes can go on from it.

    Raises:
        UsageError: It was written by another number, and has not been reshaped.
    """
    checkpoint = store.latest()
    if checkpoint is None or checkpoint.world_size == num_ranks:
        return checkpoint
    universal = store.universal(checkpoint)
    if universal is None:
        raise UsageError(
            f"{checkpoint.folder} was written by {checkpoint.world_size} processes; before "
            f"{num_ranks} can go on from it, call\n"
            f"  teams-hpc reshape {run_dir} --ranks {num_ranks}\n"
            "(`run` and the job scripts do that themselves)"
        )
    return universal


def _refuse_others(parent: Path, folder: Path) -> None:
    """DeepSpeed's state is pickled: reading it runs what is written there."""
    for path in (parent, folder, *folder.rglob("*")):
        _refuse_writable_by_others(path)


def _refuse_writable_by_others(path: Path) -> None:
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & _OTHERS_MAY_WRITE:
        raise WorkError(
            f"{path} belongs to somebody else or can be written by others, and loading a "
            "checkpoint runs code that is in it; if you trust it, take it over with chown and "
            "chmod go-w"
        )


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _read(folder: Path) -> Checkpoint | None:
    """What its manifest says of a checkpoint; None if the manifest is damaged.

    Raises:
        WorkError: It was written by another version of this package.
    """
    try:
        content: Any = read_json(folder / _MANIFEST)
        if content["schema"] != _SCHEMA:
            raise WorkError(
                f"{folder} is a checkpoint of schema {content['schema']}, not {_SCHEMA}: go on "
                "with the version of teams_hpc that wrote it, or start over with --rerun-from sft"
            )
        return Checkpoint(
            folder=folder,
            world_size=content["world_size"],
            digest=content["digest"],
            state=RunState(**content["state"]),
            files=content["files"],
            save_s=content["save_s"],
        )
    except (CorruptFileError, KeyError, TypeError):
        return None
