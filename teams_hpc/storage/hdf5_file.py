"""The file HDF5 writes into, so that a full disk is an error and not a crash.

When a write fails, HDF5 can't close the file and later crashes the process (h5py 3.16: a
segmentation fault at exit). Here a failed write is remembered and what follows is swallowed, so
that HDF5 always closes in peace; whoever wrote then asks `check`.
"""

from pathlib import Path
from types import TracebackType


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
