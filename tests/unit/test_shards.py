"""HDF5 tables: content, checksums, damage and full disks."""

import errno
import itertools
import os
import resource
import signal
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teams_hpc.errors import CorruptFileError, WorkError
from teams_hpc.storage.shards import ROW_COLUMNS, Column, Table, TableWriter

COLUMNS = (Column("text", "text"), Column("number", "int64"), Column("score", "float64"))
NAMES = [column.name for column in COLUMNS]


def write(path: Path, *pieces: Mapping[str, Sequence[Any]], **attrs: Any) -> str:
    with TableWriter(path, COLUMNS, "unit") as writer:
        for piece in pieces:
            writer.append(piece)
        return writer.close({"digest": "d", **attrs})


def sample(count: int) -> dict[str, list[Any]]:
    return {
        "text": [f"row {number} " + "äé€" * (number % 7) for number in range(count)],
        "number": [number * 1_000_003 for number in range(count)],
        "score": [float("nan") if number % 5 == 0 else number / 7 for number in range(count)],
    }


def piece_of(rows: Mapping[str, Sequence[Any]], start: int, stop: int) -> dict[str, Sequence[Any]]:
    return {name: values[start:stop] for name, values in rows.items()}


texts = st.lists(st.text(st.characters(exclude_categories=()), max_size=20), max_size=12)


@settings(max_examples=40)
@given(texts=texts, cut=st.integers(0, 12))
def test_what_is_written_is_read_and_pieces_do_not_matter(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cut: int
) -> None:
    folder = tmp_path_factory.mktemp("table")
    rows = {
        "text": texts,
        "number": [hash(text) for text in texts],
        "score": [len(text) / 3 for text in texts],
    }
    whole = write(folder / "a.h5", rows, counts={"kept": len(texts)})
    parts = write(folder / "b.h5", piece_of(rows, 0, cut), piece_of(rows, cut, len(texts)))
    assert whole == parts
    with Table.open(folder / "a.h5") as table:
        assert table.read(0, table.num_rows + 5, NAMES) == rows
        assert table.texts("text", cut, cut + 3) == texts[cut : cut + 3]
        assert table.attrs["counts"] == {"kept": len(texts)}
        assert table.attrs["sha256"] == whole
        assert table.verify() == []


@pytest.mark.parametrize("chunk", [1, 7, 90, 1 << 16])
def test_a_large_table_is_written_in_pieces(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sample(1000)
    monkeypatch.setattr("teams_hpc.storage.shards._CHUNK", chunk)
    expected = write(tmp_path / "one.h5", rows)
    monkeypatch.setattr("teams_hpc.storage.shards._FLUSH_ROWS", 64)
    pieces = [piece_of(rows, start, start + 30) for start in range(0, 1000, 30)]
    assert write(tmp_path / "many.h5", *pieces) == expected
    for name in ("one.h5", "many.h5"):
        with Table.open(tmp_path / name) as table:
            assert table.verify() == []
            assert table.texts("text", 990, 1000) == rows["text"][990:]
            assert repr(table.read(0, 1000, NAMES)) == repr(rows)  # NaN is equal to itself there
        with h5py.File(tmp_path / name) as file:
            array = file["number"]
            assert array[...].tolist() == rows["number"]
            size = array.chunks[0]
            for start in range(0, 1000, size):  # the last one too, as HDF5 itself would write it
                _, stored = array.id.read_direct_chunk((start,))
                assert len(zlib.decompress(stored)) == size * array.dtype.itemsize


def test_it_is_readable_with_five_lines_of_plain_h5py(tmp_path: Path) -> None:
    path = tmp_path / "rows.h5"
    write(path, sample(10))
    with h5py.File(path) as file:
        ends = file["text_offsets"][:]
        content = file["text"][:].tobytes()
        rows = [content[a:b].decode() for a, b in itertools.pairwise(ends)]
    assert rows == sample(10)["text"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path, damaged = tmp_path / "rows.h5", tmp_path / "damaged.h5"
    write(path, sample(300), counts={"attempted": 300})
    original = path.read_bytes()
    for place in range(0, len(original), 53):
        content = bytearray(original)
        content[place] ^= 1 << (place % 8)
        damaged.write_bytes(content)
        try:
            with Table.open(damaged) as table:
                faults = table.verify()
        except CorruptFileError as error:
            faults = [str(error)]
        assert faults, f"byte {place}"
        assert all(str(damaged) in fault for fault in faults)


def test_damage_names_the_column(tmp_path: Path) -> None:
    path = tmp_path / "rows.h5"
    write(path, sample(50))
    with h5py.File(path, "r+", locking=False) as file:
        file["number"][7] += 1
    with Table.open(path) as table:
        assert table.verify() == [f"{path}: column number does not match its checksum"]
    with h5py.File(path, "r+", locking=False) as file:
        file["text_offsets"][9] = 1 << 40
    with Table.open(path) as table:
        assert any("column text can't be read" in fault for fault in table.verify())
        with pytest.raises(CorruptFileError, match="offsets out of order"):
            table.texts("text", 0, 50)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, share: float) -> None:
    path = tmp_path / "rows.h5"
    write(path, sample(500))
    size = path.stat().st_size
    os.truncate(path, int(size * share))
    with pytest.raises(CorruptFileError, match=r"rows\.h5"):
        Table.open(path)


def test_a_missing_file_and_a_foreign_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptFileError, match=r"none\.h5"):
        Table.open(tmp_path / "none.h5")
    with h5py.File(tmp_path / "foreign.h5", "w", locking=False) as file:
        file["x"] = [1, 2]
    with pytest.raises(CorruptFileError, match=r"foreign\.h5"):
        Table.open(tmp_path / "foreign.h5")


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with TableWriter(tmp_path / "rows.h5", COLUMNS, "unit") as writer:
            writer.append(sample(3))
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_columns_of_different_lengths_are_a_mistake(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="different lengths"),
        TableWriter(tmp_path / "rows.h5", COLUMNS, "unit") as writer,
    ):
        writer.append({"text": ["a"], "number": [1, 2], "score": [0.0]})


def test_a_full_disk_is_one_clear_error_and_no_crash(tmp_path: Path) -> None:
    """Runs beside this process, because the limit that stands for the full disk is for a process.

    HDF5 itself would end with a segmentation fault here.
    """
    write(tmp_path / "rows.h5", sample(2000))
    size = (tmp_path / "rows.h5").stat().st_size
    (tmp_path / "rows.h5").unlink()
    script = (
        "import resource, signal, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "import test_shards\n"
        "test_shards.fill_disk(Path(sys.argv[2]), int(sys.argv[3]))\n"
    )
    done = subprocess.run(
        (sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path), str(size)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def fill_disk(folder: Path, size: int) -> None:
    """Write with room for 0, 10, ... 90 % of the file; called in a process of its own."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for tenths in range(10):
        limit = size * tenths // 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(WorkError, match=rf"file size limit reached at {folder}"):
            write(folder / "rows.h5", sample(2000))


@pytest.mark.parametrize(("number", "words"), [(errno.EIO, "disk failed"), (errno.ENOSPC, "full")])
def test_a_disk_that_fails_at_the_fsync_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(WorkError, match=rf"{words} at .*rows\.h5"):
            write(tmp_path / "rows.h5", sample(5))
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "rows.h5", sample(5))


def test_row_columns_are_those_of_the_design() -> None:
    assert len({column.name for column in ROW_COLUMNS}) == len(ROW_COLUMNS) == 23
    assert [column.name for column in ROW_COLUMNS if column.is_text] == [
        "record_id",
        "seed_id",
        "parent_id",
        "instruction",
        "input",
        "response",
        "model",
        "prompt_hash",
        "detail",
    ]
