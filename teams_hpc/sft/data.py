"""Packed rows, mapped from `packed.h5`, in an order that is a function of (seed, epoch, step).

The number of steps done is all the state there is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from teams_hpc.errors import CorruptFileError, WorkError
from teams_hpc.rewriting.identity import keyed_seed

IGNORED = -100
"""Label of a token without loss."""

_COLUMNS = ("input_ids", "labels", "position_ids", "sequence_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some packed rows; all arrays are int64 of shape (rows, sequence length).

    Attributes:
        input_ids: Tokens.
        position_ids: Start again at 0 with each sequence.
        targets: For each position the token that follows it, or `IGNORED`.
        sequence_ids: Whose token it is; -1 is padding.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    sequence_ids: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(np.count_nonzero(self.targets != IGNORED))

    @property
    def num_tokens(self) -> int:
        """Tokens that aren't padding."""
        return int(np.count_nonzero(self.sequence_ids >= 0))

    @property
    def num_pairs(self) -> int:
        """Sum of the squares of the sequences' lengths: pairs of tokens of the same sequence."""
        # The odd numbers up to 2 n - 1 add up to n squared.
        return int(np.sum(2 * self.position_ids[self.sequence_ids >= 0] + 1))

    def part(self, start: int, stop: int) -> "Batch":
        """Some of the rows."""
        return Batch(
            input_ids=self.input_ids[start:stop],
            position_ids=self.position_ids[start:stop],
            targets=self.targets[start:stop],
            sequence_ids=self.sequence_ids[start:stop],
        )

    def without_loss(self) -> "Batch":
        """The same rows, none of which counts."""
        return replace(self, targets=np.full_like(self.targets, IGNORED))


def _targets(labels: NDArray[np.int64], position_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Shift labels by one; the last token of a sequence predicts nothing of the next sequence."""
    targets = np.full_like(labels, IGNORED)
    targets[:, :-1] = np.where(position_ids[:, 1:] == 0, IGNORED, labels[:, 1:])
    return targets


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """One group of `packed.h5`, mapped: rows are read when they are asked for."""

    columns: dict[str, NDArray[np.int32]]
    pad_token_id: int
    vocab_size: int

    @classmethod
    def open(cls, path: Path, group: str, sequence_length: int) -> "PackedRows":
        """Map one group.

        Raises:
            CorruptFileError: The file isn't what the stage `dataset` writes for this length.
        """
        try:
            with h5py.File(path, "r", locking=False) as file:
                columns = {name: _map(path, file[group][name]) for name in _COLUMNS}
                pad_token_id, vocab_size = (
                    int(file.attrs[name]) for name in ("pad_token_id", "vocab_size")
                )
        except (OSError, KeyError) as error:
            raise CorruptFileError(
                f"{path}: can't be read as packed rows ({error}); "
                "make it again with --rerun-from dataset"
            ) from None
        shapes = {column.shape for column in columns.values()}
        if len(shapes) != 1 or shapes.pop()[1:] != (sequence_length,):
            raise CorruptFileError(
                f"{path}: {group} doesn't hold rows of sft.sequence_length {sequence_length}; "
                "make it again with --rerun-from dataset"
            )
        return cls(columns=columns, pad_token_id=pad_token_id, vocab_size=vocab_size)

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The rows with these numbers."""
        found = {name: column[rows].astype(np.int64) for name, column in self.columns.items()}
        return Batch(
            input_ids=found["input_ids"],
            position_ids=found["position_ids"],
            targets=_targets(found["labels"], found["position_ids"]),
            sequence_ids=found["sequence_ids"],
        )


def _map(path: Path, dataset: Any) -> NDArray[np.int32]:
    if dataset.dtype != np.dtype("<i4"):
        raise KeyError(f"{dataset.name} is {dataset.dtype}, not int32")
    offset = dataset.id.get_offset()
    if offset is None:  # nothing is stored for no rows, nor in one piece for a chunked array
        return np.asarray(dataset[:], dtype=np.int32)
    return np.memmap(path, dtype="<i4", mode="r", offset=offset, shape=dataset.shape)


@dataclass(slots=True)
class RowOrder:
    """An endless sequence of row numbers: each epoch is a permutation keyed by (seed, epoch)."""

    num_rows: int
    seed: int
    _permutations: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_rows < 1:
            raise WorkError("packed.h5 holds no training rows; see dataset/manifest.json")

    def rows(self, start: int, count: int) -> NDArray[np.int64]:
        """Row numbers at the places `start` to `start + count` of the sequence, int64 (count,)."""
        places = np.arange(start, start + count)
        epochs = places // self.num_rows
        pieces = [
            self._permutation(int(epoch))[places[epochs == epoch] % self.num_rows]
            for epoch in np.unique(epochs)
        ]
        return np.concatenate(pieces)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._permutations:
            generator = np.random.Generator(
                np.random.Philox(keyed_seed(self.seed, "sft-order", epoch))
            )
            self._permutations = {epoch: generator.permutation(self.num_rows)}
        return self._permutations[epoch]
