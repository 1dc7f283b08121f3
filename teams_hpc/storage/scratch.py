"""Room on disk for what doesn't fit in memory, for as long as one process needs it."""

import os
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

from teams_hpc.storage.atomic import naming_disk_faults

_KEPT_BYTES = 8 << 20


class ScratchFile:
    """Bytes without a name: appended, read anywhere, gone when this object is.

    The first few MiB stay in memory, more go to a file that is unlinked from the start: nothing is
    left when the process is killed. The file is read and written by calls, never mapped, so that
    its content doesn't count as memory of the process.

    Args:
        folder: On which file system; None: the one for temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._where = folder or Path(tempfile.gettempdir())
        self._written = 0
        self._pending = bytearray()
        self._descriptor = -1
        self._close: Callable[[], object] = _nothing

    def __len__(self) -> int:
        """Bytes appended so far."""
        return self._written + len(self._pending)

    def append(self, content: bytes) -> None:
        """Write at the end.

        Raises:
            WorkError: The disk is full.
        """
        self._pending += content
        if len(self._pending) > _KEPT_BYTES:
            with naming_disk_faults(self._where):
                self._write()

    def _write(self) -> None:
        if self._descriptor < 0:
            stream = tempfile.TemporaryFile(buffering=0, dir=self._where)  # noqa: SIM115
            self._descriptor = stream.fileno()
            self._close = weakref.finalize(self, stream.close)
        rest = memoryview(self._pending)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        self._written += len(self._pending)
        self._pending = bytearray()

    def read(self, start: int, size: int) -> bytes:
        """Bytes from `start`.

        Raises:
            EOFError: So many were never appended.
        """
        if start + size > len(self):
            raise EOFError(f"{size} bytes at {start} of {len(self)}")
        pieces = []
        while size and start < self._written:
            piece = os.pread(self._descriptor, min(size, self._written - start), start)
            if not piece:
                raise EOFError(f"the scratch file in {self._where} was cut off at {start}")
            pieces.append(piece)
            start, size = start + len(piece), size - len(piece)
        rest = start - self._written
        return b"".join((*pieces, self._pending[rest : rest + size] if size else b""))

    def close(self) -> None:
        """Free the room; nothing can be read any more."""
        self._close()
        self._written, self._pending = 0, bytearray()


def _nothing() -> None:
    """What there is to close while all is in memory."""
