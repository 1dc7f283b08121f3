"""Columns of a table, and the rows of generation as columns."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teams_hpc.storage.length_prefixed import joined

TEXT = "text"


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


def combined_sha256(digests: Mapping[str, str]) -> str:
    """One SHA-256 over named digests, in their order."""
    text = "".join(f"{name}\0{digest}\n" for name, digest in digests.items())
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(slots=True)
class ColumnWriter:
    """Collects a column's rows, digests them and writes them in pieces of some size.

    The SHA-256 is over the content alone, not over how it is chunked: for text, of each row's
    length (8 bytes, little-endian) and bytes; for numbers, of the little-endian values.
    """

    column: Column
    state: Any = field(default_factory=hashlib.sha256)
    values: list[NDArray[Any]] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    end: int | None = None

    def add(self, rows: Sequence[Any]) -> int:
        """Take rows in; returns how many bytes they are."""
        if not self.column.is_text:
            values = np.asarray(rows, dtype=self.column.dtype)
            self.state.update(little_endian_bytes(values))
            self.values.append(values)
            return values.nbytes
        encoded = [text.encode("utf-8", "surrogatepass") for text in rows]
        hash_texts(self.state, encoded)
        self.texts.extend(encoded)
        return sum(map(len, encoded))

    def take(self) -> dict[str, NDArray[Any]]:
        """What is to be written now, by array name; forgets it."""
        name = self.column.name
        if not self.column.is_text:
            parts = [*self.values, np.empty(0, dtype=self.column.dtype)]
            self.values = []
            return {name: np.concatenate(parts)}
        lengths = np.array([len(value) for value in self.texts], dtype="int64")
        offsets = (self.end or 0) + np.cumsum(lengths)
        if self.end is None:
            offsets = np.concatenate([np.zeros(1, "int64"), offsets])
        content = np.frombuffer(b"".join(self.texts), dtype="uint8")
        self.texts = []
        self.end = (self.end or 0) + len(content)
        return {name: content, f"{name}_offsets": offsets}


def little_endian_bytes(values: NDArray[Any]) -> bytes:
    """The values as SHA-256 sees them, whatever this machine's byte order."""
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def hash_texts(state: Any, encoded: Sequence[bytes]) -> None:
    """Add texts to a hash, each after its length."""
    state.update(joined(encoded))
