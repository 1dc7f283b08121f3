"""Packed rows, mapped, in an order that is a function of seed, epoch and step alone."""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from teams_hpc.errors import CorruptFileError
from teams_hpc.rewriting.identity import keyed_seed

IGNORED = -100
_COLUMNS = ("input_ids", "labels", "position_ids", "sequence_ids")
Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed rows for one forward pass, int64 tensors of shape (rows, length)."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            *(part.to(device) for part in (self.input_ids, self.labels, self.position_ids))
        )


class PackedRows:
    """One group of `packed.h5`, mapped into memory: ranks of a node share its pages.

    Args:
        path: The file.
        group: `train` or `held_out`.
    """

    def __init__(self, path: Path, group: str) -> None:
        try:
            with h5py.File(path, "r", locking=False) as file:
                self.columns: dict[str, Ints] = {
                    name: _mapped(path, file[group][name]) for name in _COLUMNS
                }
        except (OSError, KeyError) as error:
            raise CorruptFileError(
                f"{path} is not a packed data set ({error}); run again with --rerun-from dataset"
            ) from None

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return int(self.columns["input_ids"].shape[1])

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        """The given rows."""
        parts = [
            torch.from_numpy(self.columns[name][rows].astype(np.int64)) for name in _COLUMNS[:3]
        ]
        return Batch(*parts)

    def num_targets(self, rows: NDArray[np.int64]) -> int:
        """Tokens that count in the loss of these rows: labels that have a token before them."""
        return int((self.columns["labels"][rows][:, 1:] != IGNORED).sum())


def _mapped(path: Path, dataset: h5py.Dataset) -> Ints:
    offset = dataset.id.get_offset()
    if offset is None:  # an empty group
        return np.zeros(dataset.shape, dtype=np.int32)
    return np.memmap(path, dtype=np.int32, mode="r", offset=offset, shape=dataset.shape)


def rows_of_step(num_rows: int, global_batch_rows: int, step: int, seed: int) -> NDArray[np.int64]:
    """Rows of one optimizer step, shape (global_batch_rows,).

    Epochs follow each other without a gap, each a permutation of its own; a step may span two.
    """
    first = step * global_batch_rows
    wanted = np.arange(first, first + global_batch_rows)
    rows = np.empty(global_batch_rows, dtype=np.int64)
    for epoch in np.unique(wanted // num_rows):
        generator = np.random.Generator(np.random.Philox(keyed_seed(seed, "sft", int(epoch))))
        here = wanted // num_rows == epoch
        rows[here] = generator.permutation(num_rows)[wanted[here] % num_rows]
    return rows
