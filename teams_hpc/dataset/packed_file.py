"""Tokenising the data set and writing `packed.h5`.

Groups `train` and `held_out`, each with the arrays of `packing.COLUMNS`: int32, shape (rows,
sequence_length), contiguous and uncompressed, so that every rank can map them.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from teams_hpc.dataset.balance import GROUPS, Fate
from teams_hpc.dataset.packing import (
    COLUMNS,
    Sequences,
    Tokens,
    best_fit_decreasing,
    fill_rows,
)
from teams_hpc.dataset.templates import Example, PromptFormat, Row
from teams_hpc.storage.atomic import naming_disk_faults, replacing
from teams_hpc.storage.hdf5_file import OutputFile
from teams_hpc.storage.scratch import ScratchFile
from teams_hpc.storage.shards import Table

_ROWS_AT_A_TIME = 256
_TOKEN_BYTES = array("i").itemsize
_PENDING_TOKENS = 1 << 20


class TokenFile:
    """Token ids in a scratch file: appended, then read in slices."""

    def __init__(self, scratch: Path | None = None) -> None:
        self._file = ScratchFile(scratch)
        self._pending = array("i")

    def __len__(self) -> int:
        return len(self._file) // _TOKEN_BYTES + len(self._pending)

    def __getitem__(self, part: slice, /) -> Tokens:
        self._flush()
        start, stop, _ = part.indices(len(self))
        content = self._file.read(start * _TOKEN_BYTES, (stop - start) * _TOKEN_BYTES)
        return np.frombuffer(content, np.int32)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append token ids."""
        self._pending.extend(tokens)
        if len(self._pending) >= _PENDING_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._file.append(self._pending.tobytes())
            self._pending = array("i")


@dataclass(slots=True)
class SequenceCollector:
    """Gathers one group's examples, each cut to the length of a row.

    Memory: 24 bytes an example; the tokens wait in a scratch file.
    """

    row_length: int
    scratch: Path | None = None
    truncated_responses: int = 0
    prompt_too_long: int = 0
    _tokens: TokenFile = field(init=False)
    _offsets: "array[int]" = field(default_factory=lambda: array("q", [0]))
    _prompt_lengths: "array[int]" = field(default_factory=lambda: array("q"))
    _ids: "array[int]" = field(default_factory=lambda: array("q"))

    def __post_init__(self) -> None:
        self._tokens = TokenFile(self.scratch)

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, example: Example, row: int) -> None:
        """Take the example of a row of `dataset.h5`.

        Where it is too long, the response's end is cut (the end-of-turn token with it: a model
        must not learn to stop there); where the prompt leaves no room for any of the response, the
        example is left out. Both are counted.
        """
        if example.prompt_length >= self.row_length:
            self.prompt_too_long += 1
            return
        self.truncated_responses += len(example.tokens) > self.row_length
        self._tokens.extend(example.tokens[: self.row_length])
        self._offsets.append(len(self._tokens))
        self._prompt_lengths.append(example.prompt_length)
        self._ids.append(row)

    def sequences(self) -> Sequences:
        """All that was taken, in order."""
        return Sequences(
            self._tokens,
            np.array(self._offsets, np.int64),
            np.array(self._prompt_lengths, np.int64),
            np.array(self._ids, np.int64),
        )


def tokenise(
    dataset: Path,
    prompt_format: PromptFormat,
    row_length: int,
    scratch: Path | None = None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Fate, SequenceCollector]:
    """Tokenise `dataset.h5` in order.

    Args:
        dataset: The rows that stay.
        prompt_format: How rows become tokens.
        row_length: Most tokens of an example.
        scratch: Folder where tokens wait; None: the one for temporary files.
        on_rows: Told how many rows are done, and of how many.

    Returns:
        The examples of each group.
    """
    collectors = {group: SequenceCollector(row_length, scratch) for group in GROUPS}
    with Table.open(dataset) as table:
        for start in range(0, table.num_rows, _ROWS_AT_A_TIME):
            rows, uses = read_examples(table, start, start + _ROWS_AT_A_TIME)
            examples = prompt_format.encode(rows)
            for number, (example, use) in enumerate(zip(examples, uses, strict=True), start):
                collectors[GROUPS[use]].add(example, number)
            on_rows(start + len(rows), table.num_rows)
    return collectors


def read_examples(table: Table, start: int, stop: int) -> tuple[list[Row], list[int]]:
    """Texts of some rows of `dataset.h5`, and their `use`."""
    columns = table.read(start, stop, ("instruction", "input", "response", "use"))
    texts = zip(columns["instruction"], columns["input"], columns["response"], strict=True)
    return [Row(*text) for text in texts], columns["use"]


def write_packed(
    path: Path,
    collectors: Mapping[Fate, SequenceCollector],
    pad_token_id: int,
    attrs: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Pack both groups into `packed.h5`, atomically.

    Args:
        path: The file to make.
        collectors: Examples by group, all with the same row length.
        pad_token_id: What fills the tail of a row.
        attrs: Further root attributes.

    Returns:
        Counts by group: rows, sequences, tokens, padding share, what was cut and left out.

    Raises:
        WorkError: The disk is full; nothing is left under the name.
    """
    counts: dict[str, dict[str, Any]] = {}
    with naming_disk_faults(path), replacing(path) as temporary, OutputFile(temporary) as output:
        with h5py.File(output, "w") as file:
            for group, collector in collectors.items():
                sequences = collector.sequences()
                rows = best_fit_decreasing(sequences.lengths, collector.row_length)
                counts[group.value] = _describe(collector, sequences, len(rows))
                written = file.create_group(group.value)
                _write_group(written, sequences, rows, collector, pad_token_id)
                written.attrs.update(counts[group.value])
            file.attrs["pad_token_id"] = pad_token_id
            file.attrs.update(attrs)
        output.check()
    return counts


def _write_group(
    group: Any,
    sequences: Sequences,
    rows: Sequence[Sequence[int]],
    collector: SequenceCollector,
    pad_token_id: int,
) -> None:
    shape = (len(rows), collector.row_length)
    columns = {name: group.create_dataset(name, shape=shape, dtype="<i4") for name in COLUMNS}
    for start in range(0, len(rows), _ROWS_AT_A_TIME):
        piece = rows[start : start + _ROWS_AT_A_TIME]
        packed = fill_rows(sequences, piece, collector.row_length, pad_token_id)
        for name, values in packed.items():
            columns[name][start : start + len(piece)] = values


def _describe(collector: SequenceCollector, sequences: Sequences, num_rows: int) -> dict[str, Any]:
    room = num_rows * collector.row_length
    return {
        "rows": num_rows,
        "sequences": len(sequences),
        "tokens": len(sequences.tokens),
        "response_tokens": sequences.num_response_tokens,
        "padding_share": 1.0 - len(sequences.tokens) / room if room else 0.0,
        "truncated_responses": collector.truncated_responses,
        "prompt_too_long": collector.prompt_too_long,
    }
