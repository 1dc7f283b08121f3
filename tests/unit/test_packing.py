"""Packing: every sequence once, whole and apart from its neighbours, in few rows."""

import math
import resource
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teams_hpc.dataset.balance import GROUPS, Fate
from teams_hpc.dataset.packed_file import SequenceCollector, write_packed
from teams_hpc.dataset.packing import COLUMNS, Sequences, best_fit_decreasing, fill_rows
from teams_hpc.dataset.templates import Example
from teams_hpc.errors import WorkError

PAD = 0
ROW_LENGTHS = st.integers(1, 80)


def plain_best_fit_decreasing(lengths: list[int], row_length: int) -> list[int]:
    """Space left in each row, by the definition: the longest first, into the fullest that fits."""
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, space in enumerate(spaces) if space >= length]
        if fitting:
            spaces[min(fitting, key=lambda index: spaces[index])] -= length
        else:
            spaces.append(row_length - length)
    return sorted(spaces)


def first_fit(lengths: list[int], row_length: int) -> int:
    """Rows that first-fit needs, in the order given."""
    spaces: list[int] = []
    for length in lengths:
        for index, space in enumerate(spaces):
            if space >= length:
                spaces[index] -= length
                break
        else:
            spaces.append(row_length - length)
    return len(spaces)


@st.composite
def lengths_and_row(draw: st.DrawFn) -> tuple[list[int], int]:
    row_length = draw(ROW_LENGTHS)
    return draw(st.lists(st.integers(1, row_length), max_size=60)), row_length


@given(lengths_and_row())
def test_rows_are_those_of_best_fit_decreasing(case: tuple[list[int], int]) -> None:
    lengths, row_length = case
    rows = best_fit_decreasing(lengths, row_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    spaces = [row_length - sum(lengths[index] for index in row) for row in rows]
    assert sorted(spaces) == plain_best_fit_decreasing(lengths, row_length)
    assert rows == sorted(sorted(row) for row in rows)


def test_less_padding_than_first_fit() -> None:
    """On lengths as answers have them (log-normal), and close to what no packing could better."""
    generator = np.random.default_rng(7)
    lengths = [int(n) for n in generator.lognormal(4.5, 0.7, 4000).clip(1, 512)]
    rows = len(best_fit_decreasing(lengths, 512))
    assert rows < first_fit(lengths, 512)
    assert rows <= 1.005 * math.ceil(sum(lengths) / 512)


@pytest.mark.parametrize("length", [0, 9])
def test_a_sequence_that_fits_no_row_is_a_mistake(length: int) -> None:
    with pytest.raises(ValueError, match="a row holds 8"):
        best_fit_decreasing([3, length], 8)


@st.composite
def examples_and_row(draw: st.DrawFn) -> tuple[list[Example], int]:
    row_length = draw(st.integers(6, 30))
    part = st.integers(1, 5) | st.integers(1, 40)
    lengths = draw(st.lists(st.tuples(part, part), max_size=25))
    counter = iter(range(1, 10_000))
    return [
        Example([next(counter) for _ in range(prompt + response)], prompt)
        for prompt, response in lengths
    ], row_length


@given(examples_and_row())
def test_packed_rows_hold_every_sequence_whole_and_apart(case: tuple[list[Example], int]) -> None:
    examples, length = case
    collector = SequenceCollector(length)
    for number, example in enumerate(examples):
        collector.add(example, 10 + number)
    sequences = collector.sequences()
    rows = best_fit_decreasing(sequences.lengths, length)
    packed = fill_rows(sequences, rows, length, PAD)

    usable = [n for n, example in enumerate(examples) if example.prompt_length < length]
    assert collector.prompt_too_long == len(examples) - len(usable)
    assert collector.truncated_responses == sum(len(examples[n].tokens) > length for n in usable)
    found = []
    for row in range(len(rows)):
        ids = packed["sequence_ids"][row]
        starts = np.flatnonzero(np.diff(ids, prepend=-2))
        for start, stop in zip(starts, [*starts[1:], length], strict=True):
            tokens, labels, positions = (packed[name][row, start:stop] for name in COLUMNS[:3])
            assert positions.tolist() == list(range(stop - start))
            if ids[start] == -1:
                assert stop == length
                assert set(tokens.tolist()) == {PAD}
                assert set(labels.tolist()) == {-100}
                continue
            example = examples[ids[start] - 10]
            expected = example.tokens[:length]
            assert tokens.tolist() == expected
            prompt = example.prompt_length
            assert labels.tolist() == [-100] * prompt + expected[prompt:]
            assert len(expected) > prompt
            found.append(ids[start] - 10)
    assert sorted(found) == usable


def test_the_packed_file_holds_both_groups_even_an_empty_one(tmp_path: Path) -> None:
    collectors = {group: SequenceCollector(8) for group in GROUPS}
    for number, size in enumerate((3, 5, 6)):
        collectors[Fate.TRAIN].add(Example([1] * size, 2), number)
    path = tmp_path / "packed.h5"
    counts = write_packed(path, collectors, PAD, {"template": "alpaca"})
    assert counts["train"] == {
        "rows": 2,
        "sequences": 3,
        "tokens": 14,
        "response_tokens": 8,
        "padding_share": 2 / 16,
        "truncated_responses": 0,
        "prompt_too_long": 0,
    }
    with h5py.File(path, "r", locking=False) as file:
        assert dict(file["train"].attrs) == counts["train"]
        assert file.attrs["template"] == "alpaca"
        assert file["held_out"]["input_ids"].shape == (0, 8)
        for name in COLUMNS:
            stored = file["train"][name]
            offset = stored.id.get_offset()
            mapped = np.memmap(path, "<i4", mode="r", offset=offset, shape=stored.shape)
            assert (mapped == stored[:]).all()


def test_no_sequences_make_no_rows() -> None:
    empty = SequenceCollector(8).sequences()
    assert isinstance(empty, Sequences)
    assert best_fit_decreasing(empty.lengths, 8) == []
    assert fill_rows(empty, [], 8, PAD)["labels"].shape == (0, 8)


def test_a_full_disk_is_one_clear_error_and_no_crash(tmp_path: Path) -> None:
    """In a process of its own, because the limit that stands for the full disk is for a process."""
    script = (
        "import sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "import test_packing\n"
        "test_packing.fill_disk(Path(sys.argv[2]))\n"
    )
    done = subprocess.run(
        (sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def fill_disk(folder: Path) -> None:
    """Pack 200 kB with room for less, in a process of its own."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    collectors = {group: SequenceCollector(100) for group in GROUPS}
    for number in range(125):
        collectors[Fate.TRAIN].add(Example([1] * 100, 2), number)
    for limit in (0, 1_000, 50_000, 150_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(WorkError, match=rf"file size limit reached at {folder}"):
            write_packed(folder / "packed.h5", collectors, PAD, {})
