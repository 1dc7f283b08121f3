"""The file HDF5 writes into: a full disk is an error and not a crash, and a flipped bit is found.

When a write fails, HDF5 can't close the file and later crashes the process (h5py 3.16: a
segmentation fault at exit). Here a failed write is remembered and what follows is swallowed, so
that HDF5 always closes in peace; whoever wrote then asks `check`.

In front of an HDF5 file there may be a user block, which HDF5 passes over. Ours holds the SHA-256
of everything behind it: HDF5's own checksums leave out the text of attributes and unused space.
"""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

USER_BLOCK_BYTES = 512
_PIECE_BYTES = 1 << 20


def _user_block(stream: BinaryIO) -> bytes:
    """The user block that belongs to what stands behind it in `stream`."""
    state = hashlib.sha256()
    stream.seek(USER_BLOCK_BYTES)
    while piece := stream.read(_PIECE_BYTES):
        state.update(piece)
    text = (
        f"teams-hpc table; SHA-256 of the bytes from {USER_BLOCK_BYTES} on:\n{state.hexdigest()}\n"
    )
    return text.encode("ascii").ljust(USER_BLOCK_BYTES, b"\0")


def is_sealed(path: Path) -> bool:
    """Whether every byte of the file is as it was when it was sealed."""
    with path.open("rb") as stream:
        return stream.read(USER_BLOCK_BYTES) == _user_block(stream)


class OutputFile:
    """A new file as h5py's `fileobj` driver wants it; see the module."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("w+b", buffering=0)
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the first error any write met.

        Raises:
            OSError: As the operating system gave it; the content is lost.
        """
        if self._error is not None:
            raise self._error

    def seal(self) -> None:
        """Write the user block; the last thing to be written."""
        block = _user_block(self._stream)
        self._stream.seek(0)
        self.write(block)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(size)

    def readinto(self, buffer: bytearray) -> int:
        return self._stream.readinto(buffer)

    def write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest and self._error is None:
            try:
                rest = rest[self._stream.write(rest) :]
            except OSError as error:
                self._error = error

    def truncate(self, size: int | None = None) -> None:
        if self._error is None:
            try:
                self._stream.truncate(size)
            except OSError as error:
                self._error = error

    def flush(self) -> None:
        """Nothing is buffered; whoever commits the file calls fsync."""

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()
