"""Tables in HDF5: rows of generation and of the data set, column by column.

Variable-length strings don't compress in HDF5, so a text column NAME is two arrays: `NAME`, the
UTF-8 bytes of all rows one after the other, and `NAME_offsets`, where each row starts and the last
one ends. Everything is chunked and gzip-compressed, readable by any h5py. Files are opened with
`locking=False`: Lustre and NFS sites need it, and a file here never changes once it has its name.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from teams_hpc.errors import CorruptFileError
from teams_hpc.storage.atomic import publishing, replacing

SCHEMA_VERSION = 1
TEXT = "text"
_CHUNK = 1 << 16


class Status(IntEnum):
    """What became of an attempted step."""

    KEPT = 0
    ELIMINATED = 1
    FAILED = 2


class Finish(IntEnum):
    """Why a completion ended."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class Column:
    """Name and type of a column: a numpy type name, or `text`."""

    name: str
    dtype: str

    @property
    def is_text(self) -> bool:
        return self.dtype == TEXT


ROW_COLUMNS = (
    Column("record_id", TEXT),
    Column("seed_id", TEXT),
    Column("split", "uint8"),
    Column("trajectory", "int32"),
    Column("step", "int32"),
    Column("parent_id", TEXT),
    Column("operation", "uint8"),
    Column("instruction", TEXT),
    Column("input", TEXT),
    Column("response", TEXT),
    Column("verdict_score", "float64"),
    Column("status", "uint8"),
    Column("reason", "uint8"),
    Column("rewrite_finish", "uint8"),
    Column("answer_finish", "uint8"),
    Column("prompt_tokens", "int64"),
    Column("completion_tokens", "int64"),
    Column("model", TEXT),
    Column("prompt_hash", TEXT),
    Column("sampler_seed", "int64"),
    Column("policy_member", "int32"),
    Column("added_words", "int32"),
    Column("detail", TEXT),
)
"""One row is one attempted step; see docs/design.md for what each column means."""

Rows = dict[str, list[Any]]


def _combine(digests: Mapping[str, str]) -> str:
    """One SHA-256 over the columns' digests, in column order."""
    text = "".join(f"{name}\0{digest}\n" for name, digest in digests.items())
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(slots=True)
class _ColumnDigest:
    """SHA-256 of a column's content: for text, of each row's length and bytes."""

    state: Any = field(default_factory=hashlib.sha256)

    def add_text(self, encoded: Sequence[bytes]) -> None:
        for value in encoded:
            self.state.update(len(value).to_bytes(8, "little"))
            self.state.update(value)

    def add_numbers(self, values: NDArray[Any]) -> None:
        self.state.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())


class TableWriter:
    """Writes one table, appended in pieces; it appears under its name when closed, or not at all.

    Args:
        path: The file to make.
        columns: Its columns.
        kind: What the rows are, for people: `unit` or `dataset`.
        first_wins: Publish by `link`: if the file is there already, this one is discarded.
    """

    def __init__(
        self, path: Path, columns: Sequence[Column], kind: str, *, first_wins: bool = False
    ) -> None:
        self._columns = tuple(columns)
        self._kind = kind
        self._num_rows = 0
        self._digests = {column.name: _ColumnDigest() for column in self._columns}
        self._stack = ExitStack()
        commit = publishing if first_wins else replacing
        temporary = self._stack.enter_context(commit(path))
        self._file = self._stack.enter_context(h5py.File(temporary, "w", locking=False))
        for column in self._columns:
            self._create(column)

    def _create(self, column: Column) -> None:
        options: dict[str, Any] = {
            "maxshape": (None,),
            "chunks": (_CHUNK,),
            "compression": "gzip",
            "compression_opts": 4,
        }
        dtype = "uint8" if column.is_text else column.dtype
        self._file.create_dataset(column.name, shape=(0,), dtype=dtype, **options)
        if column.is_text:
            name = f"{column.name}_offsets"
            self._file.create_dataset(name, data=np.zeros(1, "int64"), **options)

    def append(self, rows: Mapping[str, Sequence[Any]]) -> None:
        """Append rows given as columns of equal length.

        Raises:
            ValueError: A column is missing or of another length.
        """
        lengths = {len(rows[column.name]) for column in self._columns}
        if len(lengths) != 1:
            raise ValueError(f"columns of different lengths: {sorted(lengths)}")
        for column in self._columns:
            if column.is_text:
                self._append_text(column.name, rows[column.name])
            else:
                values = np.asarray(rows[column.name], dtype=column.dtype)
                self._digests[column.name].add_numbers(values)
                self._extend(column.name, values)
        self._num_rows += lengths.pop()

    def _append_text(self, name: str, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._digests[name].add_text(encoded)
        start = self._file[name].shape[0]
        lengths = np.array([len(value) for value in encoded], dtype="int64")
        self._extend(f"{name}_offsets", start + np.cumsum(lengths))
        self._extend(name, np.frombuffer(b"".join(encoded), dtype="uint8"))

    def _extend(self, name: str, values: NDArray[Any]) -> None:
        dataset = self._file[name]
        start = dataset.shape[0]
        dataset.resize(start + len(values), axis=0)
        dataset[start:] = values

    def close(self, attrs: Mapping[str, Any]) -> str:
        """Write the attributes and give the file its name.

        Args:
            attrs: Root attributes; mappings and lists are stored as JSON.

        Returns:
            SHA-256 over the columns.
        """
        digests = {name: digest.state.hexdigest() for name, digest in self._digests.items()}
        whole = _combine(digests)
        own = {
            "schema_version": SCHEMA_VERSION,
            "kind": self._kind,
            "num_rows": self._num_rows,
            "columns": {column.name: column.dtype for column in self._columns},
            "column_sha256": digests,
            "sha256": whole,
        }
        for key, value in {**attrs, **own}.items():
            is_plain = isinstance(value, str | int | float)
            self._file.attrs[key] = value if is_plain else json.dumps(value)
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
        try:
            return cls(path, h5py.File(path, "r", locking=False))
        except (OSError, KeyError, ValueError) as error:
            raise CorruptFileError(f"{path} is not a readable table of ours: {error}") from None

    def __enter__(self) -> "Table":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def texts(self, name: str, start: int, stop: int) -> list[str]:
        """Rows `start` to `stop` of a text column."""
        return [value.decode("utf-8", "surrogatepass") for value in self._bytes(name, start, stop)]

    def _bytes(self, name: str, start: int, stop: int) -> list[bytes]:
        offsets = self._file[f"{name}_offsets"][start : stop + 1]
        content = self._file[name][offsets[0] : offsets[-1]].tobytes()
        at = offsets - offsets[0]
        return [content[a:b] for a, b in itertools.pairwise(at)]

    def read(self, start: int, stop: int, columns: Sequence[str]) -> Rows:
        """Rows `start` to `stop` as lists by column name.

        Raises:
            CorruptFileError: The file is damaged there.
        """
        stop = min(stop, self.num_rows)
        try:
            return {name: self._read_column(name, start, stop) for name in columns}
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise CorruptFileError(f"{self.path} is damaged: {error}") from None

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
            except (OSError, KeyError, ValueError, IndexError) as error:
                faults.append(f"{self.path}: column {column.name} can't be read: {error}")
                continue
            if digests[column.name] != self.attrs["column_sha256"].get(column.name):
                faults.append(f"{self.path}: column {column.name} does not match its checksum")
        if not faults and _combine(digests) != self.attrs["sha256"]:
            faults.append(f"{self.path}: the columns do not match the file's checksum")
        return faults

    def _digest(self, column: Column) -> str:
        digest = _ColumnDigest()
        for start in range(0, self.num_rows, _CHUNK):
            stop = min(start + _CHUNK, self.num_rows)
            if column.is_text:
                digest.add_text(self._bytes(column.name, start, stop))
            else:
                digest.add_numbers(self._file[column.name][start:stop])
        length = self._file[f"{column.name}_offsets" if column.is_text else column.name].shape[0]
        if length != self.num_rows + column.is_text:
            raise ValueError(f"it has {length} entries for {self.num_rows} rows")
        return str(digest.state.hexdigest())


def _parse(value: Any) -> Any:
    """An attribute as written: JSON where it was a mapping or a list."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        return json.loads(value)
    return value.item() if isinstance(value, np.generic) else value
