"""Tables in HDF5: rows of generation and of the data set, column by column.

Variable-length strings don't compress in HDF5, so a text column NAME is two arrays: `NAME`, the
UTF-8 bytes of all rows one after the other, and `NAME_offsets`, where each row starts and the last
one ends. Everything is chunked and gzip-compressed, readable by any h5py with HDF5 1.10 or newer
(that format has checksums on its own metadata). Before it stands a user block with a SHA-256 over
all the rest, so that `verify` finds any flipped bit. Files are opened with `locking=False`: Lustre
and NFS sites need it, and a file here never changes once it has its name.
"""

import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from teams_hpc.errors import CorruptFileError
from teams_hpc.storage.atomic import naming_disk_faults, publishing, replacing
from teams_hpc.storage.columns import (
    ROW_COLUMNS,
    Column,
    ColumnWriter,
    Finish,
    Status,
    combined_sha256,
    hash_texts,
    little_endian_bytes,
)
from teams_hpc.storage.hdf5_file import USER_BLOCK_BYTES, OutputFile, is_sealed

__all__ = [
    "ROW_COLUMNS",
    "SCHEMA_VERSION",
    "Column",
    "Finish",
    "Rows",
    "Status",
    "Table",
    "TableWriter",
    "combined_sha256",
]

SCHEMA_VERSION = 1
_CHUNK = 1 << 16
_LEVEL = 4
_FLUSH_ROWS = 1 << 16
_FLUSH_BYTES = 1 << 23
_VERIFY_ROWS = 1 << 12

Rows = dict[str, list[Any]]
_DAMAGE = (OSError, RuntimeError, KeyError, ValueError, IndexError, TypeError, AttributeError)


@dataclass(slots=True)
class _Array:
    """An array that is appended to; each chunk is compressed once, however many pieces it comes in.

    HDF5 would read a chunk that is partly filled and compress it again, at every piece.
    """

    dataset: h5py.Dataset
    rest: NDArray[Any]
    length: int = 0

    def append(self, values: NDArray[Any], *, is_last: bool) -> None:
        """Write what fills chunks, and keep the rest for later; all of it if these are the last."""
        values = np.concatenate([self.rest, values])
        size = self.dataset.chunks[0]
        end = len(values) if is_last else len(values) // size * size
        if self.length + end > self.dataset.shape[0]:
            self.dataset.resize(self.length + end, axis=0)
        for start in range(0, end, size):
            chunk = values[start : start + size]
            if len(chunk) < size:  # the last one: HDF5 looks for whole chunks
                chunk = np.concatenate([chunk, np.zeros(size - len(chunk), chunk.dtype)])
            content = zlib.compress(chunk.data, _LEVEL)
            self.dataset.id.write_direct_chunk((self.length + start,), content)
        self.length += end
        self.rest = values[end:].copy()


class TableWriter:
    """Writes one table, appended in pieces; it appears under its name when closed, or not at all.

    Memory is bounded: pieces are collected up to some MiB, then compressed and written.

    Args:
        path: The file to make.
        columns: Its columns.
        kind: What the rows are, for people: `unit` or `dataset`.
        first_wins: Publish by `link`: if the file is there already, this one is discarded.
    """

    def __init__(
        self, path: Path, columns: Sequence[Column], kind: str, *, first_wins: bool = False
    ) -> None:
        self._path = path
        self._kind = kind
        self._num_rows = 0
        self._pending_rows = self._pending_bytes = 0
        self._writers = [ColumnWriter(column) for column in columns]
        self._arrays: dict[str, _Array] = {}
        self._stack = ExitStack()
        with naming_disk_faults(path):
            commit = publishing if first_wins else replacing
            temporary = self._stack.enter_context(commit(path))
            self._output = self._stack.enter_context(OutputFile(temporary))
            file = h5py.File(
                self._output, "w", libver=("v110", "v110"), userblock_size=USER_BLOCK_BYTES
            )
            self._file = self._stack.enter_context(file)

    def append(self, rows: Mapping[str, Sequence[Any]]) -> None:
        """Append rows given as columns of equal length.

        Raises:
            ValueError: A column is missing or of another length.
            WorkError: The disk is full.
        """
        names = [writer.column.name for writer in self._writers]
        lengths = {len(rows[name]) for name in names}
        if len(lengths) != 1:
            raise ValueError(f"columns of different lengths: {sorted(lengths)}")
        for writer in self._writers:
            self._pending_bytes += writer.add(rows[writer.column.name])
        self._pending_rows += lengths.pop()
        if self._pending_rows >= _FLUSH_ROWS or self._pending_bytes >= _FLUSH_BYTES:
            self._flush(is_last=False)

    def _flush(self, *, is_last: bool) -> None:
        for writer in self._writers:
            for name, values in writer.take().items():
                self._write(name, values, is_last)
        self._num_rows += self._pending_rows
        self._pending_rows = self._pending_bytes = 0
        with naming_disk_faults(self._path):
            self._output.check()

    def _write(self, name: str, values: NDArray[Any], is_last: bool) -> None:
        if name not in self._arrays:
            # One that is written in one go has just the chunk it needs: most units are small.
            size = min(_CHUNK, len(values)) if is_last else _CHUNK
            dataset = self._file.create_dataset(
                name,
                shape=values.shape if is_last else (0,),
                dtype=values.dtype,
                maxshape=None if is_last and size else (None,),
                chunks=(max(1, size),),
                compression="gzip",
                compression_opts=_LEVEL,
            )
            self._arrays[name] = _Array(dataset, values[:0])
        self._arrays[name].append(values, is_last=is_last)

    def close(self, attrs: Mapping[str, Any]) -> str:
        """Write the attributes and give the file its name.

        Args:
            attrs: Root attributes; mappings and lists are stored as JSON.

        Returns:
            SHA-256 over the columns.

        Raises:
            WorkError: The disk is full; nothing is left under the name.
        """
        self._flush(is_last=True)
        digests = {writer.column.name: writer.state.hexdigest() for writer in self._writers}
        whole = combined_sha256(digests)
        own = {
            "schema_version": SCHEMA_VERSION,
            "kind": self._kind,
            "num_rows": self._num_rows,
            "columns": {writer.column.name: writer.column.dtype for writer in self._writers},
            "column_sha256": digests,
            "sha256": whole,
        }
        everything = {**attrs, **own}
        for key, value in {**everything, "attrs_sha256": _attrs_sha256(everything)}.items():
            is_plain = isinstance(value, str | int | float)
            self._file.attrs[key] = value if is_plain else json.dumps(value)
        with naming_disk_faults(self._path):
            self._file.close()
            self._output.seal()
            self._output.check()
            self._stack.close()
        return whole

    def __enter__(self) -> "TableWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)


class Table:
    """Reads one table; open it with `Table.open`, use it in a `with`."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._file = file
        self.attrs = {key: _parse(value) for key, value in file.attrs.items()}
        self.columns = tuple(Column(*pair) for pair in self.attrs["columns"].items())
        self.num_rows = int(self.attrs["num_rows"])
        self._by_name = {column.name: column for column in self.columns}

    @classmethod
    def open(cls, path: Path) -> "Table":
        """Open a table.

        Raises:
            CorruptFileError: It is missing, truncated, or not one of ours.
        """
        with ExitStack() as stack:
            try:
                file = stack.enter_context(h5py.File(path, "r", locking=False))
                table = cls(path, file)
                _check_attrs(table.attrs)
            except _DAMAGE as error:
                raise CorruptFileError(f"{path} is not a readable table of ours: {error}") from None
            stack.pop_all()
        return table

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @contextmanager
    def _naming_damage(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            raise CorruptFileError(f"{self.path} is damaged: {error}") from None

    def texts(self, name: str, start: int, stop: int) -> list[str]:
        """Rows `start` to `stop` of a text column.

        Raises:
            CorruptFileError: The file is damaged there.
        """
        with self._naming_damage():
            encoded = self._bytes(name, start, stop)
            return [value.decode("utf-8", "surrogatepass") for value in encoded]

    def _bytes(self, name: str, start: int, stop: int) -> list[bytes]:
        stop = min(stop, self.num_rows)
        offsets = self._file[f"{name}_offsets"][start : stop + 1]
        if len(offsets) != max(0, stop + 1 - start):
            raise ValueError(f"column {name} has too few offsets")
        if start >= stop:
            return []
        size = self._file[name].shape[0]
        if offsets[0] < 0 or offsets[-1] > size or (np.diff(offsets) < 0).any():
            raise ValueError(f"column {name} has offsets out of order or range")
        content = self._file[name][offsets[0] : offsets[-1]].tobytes()
        return [content[a:b] for a, b in itertools.pairwise((offsets - offsets[0]).tolist())]

    def read(self, start: int, stop: int, columns: Sequence[str]) -> Rows:
        """Rows `start` to `stop` as lists by column name.

        Raises:
            CorruptFileError: The file is damaged there.
        """
        stop = min(stop, self.num_rows)
        with self._naming_damage():
            return {name: self._read_column(name, start, stop) for name in columns}

    def _read_column(self, name: str, start: int, stop: int) -> list[Any]:
        if self._by_name[name].is_text:
            return self.texts(name, start, stop)
        values: list[Any] = self._file[name][start:stop].tolist()
        return values

    def verify(self) -> list[str]:
        """What is wrong with the content, one line each; empty if all checksums agree."""
        faults = []
        digests = {}
        for column in self.columns:
            try:
                digests[column.name] = self._digest(column)
            except _DAMAGE as error:
                faults.append(f"{self.path}: column {column.name} can't be read: {error}")
                continue
            if digests[column.name] != self.attrs["column_sha256"].get(column.name):
                faults.append(f"{self.path}: column {column.name} does not match its checksum")
        if not faults and combined_sha256(digests) != self.attrs["sha256"]:
            faults.append(f"{self.path}: the columns do not match the file's checksum")
        if not faults and not is_sealed(self.path):
            faults.append(f"{self.path}: the file does not match its checksum")
        return faults

    def _digest(self, column: Column) -> str:
        state = hashlib.sha256()
        name = f"{column.name}_offsets" if column.is_text else column.name
        length = self._file[name].shape[0]
        if length != self.num_rows + column.is_text:
            raise ValueError(f"it has {length} entries for {self.num_rows} rows")
        for start in range(0, self.num_rows, _VERIFY_ROWS):
            stop = min(start + _VERIFY_ROWS, self.num_rows)
            if column.is_text:
                hash_texts(state, self._bytes(column.name, start, stop))
            else:
                state.update(little_endian_bytes(self._file[column.name][start:stop]))
        if column.is_text:
            first, last = (int(self._file[name][index]) for index in (0, length - 1))
            size = self._file[column.name].shape[0]
            if (first, last) != (0, size):
                raise ValueError(f"its offsets go from {first} to {last} of {size} bytes")
        return state.hexdigest()


def _attrs_sha256(attrs: Mapping[str, Any]) -> str:
    """HDF5 keeps no checksum of text in attributes, so there is one of our own."""
    return hashlib.sha256(json.dumps(attrs, sort_keys=True).encode()).hexdigest()


def _check_attrs(attrs: Mapping[str, Any]) -> None:
    if attrs["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"it has schema {attrs['schema_version']}, not {SCHEMA_VERSION}")
    content = {key: value for key, value in attrs.items() if key != "attrs_sha256"}
    if _attrs_sha256(content) != attrs["attrs_sha256"]:
        raise ValueError("its attributes do not match their checksum")


def _parse(value: Any) -> Any:
    """An attribute as written: JSON where it was a mapping or a list."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        return json.loads(value)
    return value.item() if isinstance(value, np.generic) else value
