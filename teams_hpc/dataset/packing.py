"""Filling rows of a fixed length with whole sequences, so that little is padding.

Best-fit decreasing: the longest sequence first, each into the fullest row that still takes it. For
many sequences it needs at most 11/9 of the fewest possible rows (Johnson et al., 1974).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IGNORED_LABEL = -100
PADDING_SEQUENCE = -1
COLUMNS = ("input_ids", "labels", "position_ids", "sequence_ids")

Tokens = NDArray[np.int32]


def best_fit_decreasing(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Put sequences into as few rows as it can; a function of `lengths` alone.

    Open rows are kept by the space they have left, and the spaces in use as bits of one integer,
    so that finding the fullest row that fits costs `row_length` / 64 word operations.

    Args:
        lengths: Tokens of each sequence, each between 1 and `row_length`.
        row_length: Tokens a row holds.

    Returns:
        Indices into `lengths` by row; ascending within a row, rows ordered by their first index.
    """
    rows: list[list[int]] = []
    rows_by_space: list[list[int]] = [[] for _ in range(row_length + 1)]
    spaces = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if not 1 <= length <= row_length:
            raise ValueError(f"sequence {index} has {length} tokens, a row holds {row_length}")
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        left = space - length
        if left:
            rows_by_space[left].append(row)
            spaces |= 1 << left
    return sorted(sorted(row) for row in rows)


class TokenSource(Protocol):
    """Token ids in one row: an array, or a file that is read in slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Tokens: ...


@dataclass(frozen=True, slots=True)
class Sequences:
    """Tokenised examples, end to end.

    Attributes:
        tokens: Token ids of all sequences.
        offsets: Where each starts, and where the last ends, shape (n + 1,).
        prompt_lengths: Leading tokens of each that are the prompt: no loss on them, shape (n,).
        ids: What to call each: its row in `dataset.h5`, shape (n,).
    """

    tokens: TokenSource
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [int(length) for length in np.diff(self.offsets)]

    @property
    def num_response_tokens(self) -> int:
        """Tokens that carry loss."""
        return len(self.tokens) - int(self.prompt_lengths.sum())


def fill_rows(
    sequences: Sequences, rows: Sequence[Sequence[int]], row_length: int, pad_token_id: int
) -> dict[str, Tokens]:
    """Lay out packed rows.

    Args:
        sequences: The examples.
        rows: Which of them stand in each row, from `best_fit_decreasing` or a part of it.
        row_length: Tokens a row holds.
        pad_token_id: What fills the tail of a row.

    Returns:
        Arrays of shape (rows, row_length) by column name. Positions restart with every sequence
        and once more where the padding begins; labels are the tokens themselves, unshifted.
    """
    shape = (len(rows), row_length)
    packed = {
        "input_ids": np.full(shape, pad_token_id, np.int32),
        "labels": np.full(shape, IGNORED_LABEL, np.int32),
        "position_ids": np.zeros(shape, np.int32),
        "sequence_ids": np.full(shape, PADDING_SEQUENCE, np.int32),
    }
    positions = np.arange(row_length, dtype=np.int32)
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            first, last = sequences.offsets[index], sequences.offsets[index + 1]
            stop = start + int(last - first)
            response = int(sequences.prompt_lengths[index])
            tokens = sequences.tokens[int(first) : int(last)]
            packed["input_ids"][row, start:stop] = tokens
            packed["labels"][row, start + response : stop] = tokens[response:]
            packed["position_ids"][row, start:stop] = positions[: stop - start]
            packed["sequence_ids"][row, start:stop] = sequences.ids[index]
            start = stop
        packed["position_ids"][row, start:] = positions[: row_length - start]
    return packed
