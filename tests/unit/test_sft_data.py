"""Packed rows as they are read from a file that is as it should be, or isn't."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from teams_hpc.errors import CorruptFileError
from teams_hpc.sft.data import IGNORED, PackedRows

LENGTH = 8
COLUMNS = ("input_ids", "labels", "position_ids", "sequence_ids")
# Two rows: sequences of 3 and 4 tokens and one of padding; one sequence of 8.
INPUT_IDS = [[5, 6, 7, 8, 9, 10, 11, 2], [3, 4, 5, 6, 7, 8, 9, 10]]
LABELS = [[-100, 6, 7, -100, -100, 10, 11, -100], [3, 4, 5, 6, 7, 8, 9, 10]]
POSITION_IDS = [[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]]
SEQUENCE_IDS = [[0, 0, 0, 1, 1, 1, 1, -1], [2] * 8]
VALUES = dict(
    zip(COLUMNS, map(np.array, (INPUT_IDS, LABELS, POSITION_IDS, SEQUENCE_IDS)), strict=True)
)


def write(path: Path, chunks: tuple[int, int] | None = None) -> Path:
    with h5py.File(path, "w", locking=False) as file:
        for group in ("train", "held_out"):
            for name, values in VALUES.items():
                file.create_dataset(f"{group}/{name}", data=values.astype("<i4"), chunks=chunks)
        file.attrs.update(pad_token_id=2, vocab_size=12)
    return path


@pytest.mark.parametrize("chunks", [None, (1, LENGTH)])
def test_rows_are_read_as_written_with_shifted_targets(
    tmp_path: Path, chunks: tuple[int, int] | None
) -> None:
    packed = PackedRows.open(write(tmp_path / "packed.h5", chunks), "train", LENGTH)
    assert isinstance(packed.columns["labels"], np.memmap) == (chunks is None)
    assert (len(packed), packed.vocab_size, packed.pad_token_id) == (2, 12, 2)
    batch = packed.read([1, 0])
    assert batch.input_ids.tolist() == INPUT_IDS[::-1]
    assert batch.position_ids.tolist() == POSITION_IDS[::-1]
    # The second sequence's first token is nobody's target, nor does the last token have one.
    expected = [4, 5, 6, 7, 8, 9, 10, IGNORED], [6, 7, IGNORED, IGNORED, 10, 11, IGNORED, IGNORED]
    assert batch.targets.tolist() == list(expected)
    assert (batch.num_loss_tokens, batch.num_tokens) == (7 + 4, 15)
    assert batch.part(1, 2).num_tokens == 7
    assert batch.without_loss().num_loss_tokens == 0


def test_a_label_on_a_sequence_s_first_token_is_not_predicted_from_the_one_before(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "packed.h5")
    with h5py.File(path, "r+", locking=False) as file:
        file["train/labels"][0, 3] = 8
    batch = PackedRows.open(path, "train", LENGTH).read([0])
    assert batch.targets[0, 2] == IGNORED


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "packed.h5")
    with pytest.raises(CorruptFileError, match="sequence_length 16"):
        PackedRows.open(path, "train", 16)
    with h5py.File(path, "r+", locking=False) as file:
        del file["train/labels"]
    with pytest.raises(CorruptFileError, match="--rerun-from dataset"):
        PackedRows.open(path, "train", LENGTH)
    (tmp_path / "torn.h5").write_bytes(path.read_bytes()[:100])
    with pytest.raises(CorruptFileError, match="--rerun-from dataset"):
        PackedRows.open(tmp_path / "torn.h5", "train", LENGTH)
