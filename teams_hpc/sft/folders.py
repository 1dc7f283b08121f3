"""Folders that are there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from teams_hpc.storage.atomic import fsync_folder, naming_disk_faults


def files_below(folder: Path) -> list[str]:
    """Names of all files under `folder`, relative to it, sorted."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def make_durable(path: Path) -> None:
    """Bring a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_folder(target: Path) -> Path:
    """Where the content of `target` is gathered; a name that is removed when left over."""
    return target.with_name(f".{target.name}.tmp")


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it is never seen half removed."""
    if not folder.exists():
        return
    grave = folder.with_name(f".{folder.name}.removed.tmp")
    shutil.rmtree(grave, ignore_errors=True)
    folder.rename(grave)
    shutil.rmtree(grave)


def remove_leftover_folders(folder: Path) -> None:
    """Remove what a killed process left unfinished in `folder`."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)


def commit_folder(temporary: Path, target: Path) -> None:
    """Give a finished folder, whose files are durable, its name; what had the name goes."""
    for folder in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        fsync_folder(folder)
    remove_folder(target)
    temporary.rename(target)
    fsync_folder(target.parent)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on a clean exit it takes the place of `target` durably.

    Raises:
        WorkError: The disk is full or failing.
    """
    temporary = temporary_folder(target)
    with naming_disk_faults(target):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for name in files_below(temporary):
            make_durable(temporary / name)
        commit_folder(temporary, target)
