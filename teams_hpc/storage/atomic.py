"""Writing a file so that it is there whole or not at all.

Write under a temporary name on the same file system, fsync, rename, fsync the folder.
"""

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from teams_hpc.errors import CorruptFileError, WorkError

_DISK_FAULTS = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota used up",
    errno.EFBIG: "file size limit reached",
    errno.EIO: "the disk failed",
    errno.EROFS: "file system is read-only",
}


@contextmanager
def naming_disk_faults(path: Path) -> Iterator[None]:
    """Turn what a full or failing disk raises into an error that says so.

    Raises:
        WorkError: Instead of the `OSError`; what was durable before stays.
    """
    try:
        yield
    except OSError as error:
        fault = _DISK_FAULTS.get(error.errno or 0)
        if fault is None:
            raise
        raise WorkError(
            f"{fault} at {path}; nothing half-written is left there: make room and run again"
        ) from error


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let an `OSError` say which file it is about; that of a full disk doesn't by itself."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on a clean exit it replaces `path` durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(path)
    try:
        with _naming(path):
            yield temporary
            _fsync_file(temporary)
            temporary.replace(path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """Like `replacing`, but the first to publish wins: a second, equal file is discarded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(path)
    try:
        yield temporary
        _fsync_file(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8), durably."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by indented JSON, durably."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON of ours.

    Raises:
        CorruptFileError: The file is there but isn't JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}") from None


def remove_leftovers(folder: Path) -> int:
    """Remove temporary files that a killed process left in `folder`; returns how many."""
    leftovers = list(folder.glob(".*.tmp"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)
