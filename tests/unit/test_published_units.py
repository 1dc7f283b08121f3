"""Scans of finished units: few files are opened, and what is said is never out of date."""

import os
from pathlib import Path
from typing import Any

import pytest

from teams_hpc.config import Config
from teams_hpc.errors import CorruptFileError
from teams_hpc.generation import outcome, published
from teams_hpc.generation.published import PublishedLines, PublishedUnits, published_units
from teams_hpc.generation.usage import generation_usage
from teams_hpc.generation.worker import generate
from teams_hpc.llm.ledger import Ledger, Usage
from teams_hpc.report.usage import collect_usage
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import write_json
from teams_hpc.storage.run_dir import RunDir, read_manifest
from teams_hpc.storage.shards import Column, Table, TableWriter

NUM_UNITS = 50


def make_unit(run_dir: RunDir, unit: int, calls: int, lines: PublishedLines | None) -> None:
    ledger = Ledger()
    ledger.of("expert", "m").add(Usage(calls=calls))
    with TableWriter(run_dir.shard(unit), (Column("x", "int64"),), "unit") as writer:
        writer.append({"x": [1]})
        writer.close({"usage": ledger.to_json(), "journals": []})
    if lines is not None:
        with Table.open(run_dir.shard(unit)) as table:
            lines.add(unit, table.attrs)


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A run whose units cost 0, 1, 2, ... calls, noted by two workers in turn."""
    run_dir = RunDir(tmp_path)
    workers = [PublishedLines(run_dir), PublishedLines(run_dir)]
    for unit in range(NUM_UNITS):
        make_unit(run_dir, unit, unit, workers[unit % 2])
    return run_dir


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the unit files that scans open."""
    names: list[str] = []
    real = Table.open

    def noting(path: Path) -> Table:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(Table, "open", noting)
    return names


def lines_files(run_dir: RunDir) -> list[Path]:
    return sorted((run_dir.generate / "published").iterdir())


def total(run_dir: RunDir) -> int:
    return generation_usage(run_dir).total("expert").calls


def test_status_and_budget_open_no_unit(run_dir: RunDir, opened: list[str]) -> None:
    expected = sum(range(NUM_UNITS))
    assert total(run_dir) == expected
    assert collect_usage(run_dir)["generate"].total("expert").calls == expected
    assert published_units(run_dir) == set(range(NUM_UNITS))
    assert opened == []
    for path in lines_files(run_dir):
        path.unlink()
    assert total(run_dir) == expected
    assert len(opened) == NUM_UNITS


def test_a_unit_that_is_another_file_now_is_opened(run_dir: RunDir, opened: list[str]) -> None:
    make_unit(run_dir, 7, 1000, None)
    state = run_dir.shard(9).stat()
    os.utime(run_dir.shard(9), ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert total(run_dir) == sum(range(NUM_UNITS)) - 7 + 1000
    assert opened == ["unit-00007.h5", "unit-00009.h5"]


def test_damaged_and_torn_lines_count_for_nothing(run_dir: RunDir, opened: list[str]) -> None:
    first, second = lines_files(run_dir)
    content = bytearray(first.read_bytes())
    at = content.index(b'"calls"')
    content[at + 9] ^= 1
    first.write_bytes(bytes(content))
    second.write_bytes(second.read_bytes()[:-20] + b"\xff\0\0")
    assert total(run_dir) == sum(range(NUM_UNITS))
    assert len(opened) == 2


def test_a_missing_unit_is_an_error_whatever_the_lines_say(run_dir: RunDir) -> None:
    run_dir.shard(3).unlink()
    with pytest.raises(CorruptFileError, match="unit-00003"):
        PublishedUnits(run_dir).attrs(range(NUM_UNITS))
    assert total(run_dir) == sum(range(NUM_UNITS)) - 3


def test_what_is_known_is_not_read_again(run_dir: RunDir, opened: list[str]) -> None:
    units = PublishedUnits(run_dir)
    before = units.attrs(units.units())
    for path in lines_files(run_dir):
        path.unlink()
    make_unit(run_dir, NUM_UNITS, 5, None)
    after = units.attrs(units.units())
    assert {unit: after[unit] for unit in before} == before
    assert opened == [f"unit-{NUM_UNITS:05d}.h5"]


class Killed(BaseException):
    """Stands for a kill between the last unit and the manifest."""


def test_a_restart_opens_no_unit_and_ends_with_the_same_manifest(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate(
        {
            "name": "t",
            "seeds": {"limit": NUM_UNITS},
            "generate": {"policy": "uniform", "num_steps": 1, "unit_size": 1},
        }
    )

    def make(name: str) -> RunDir:
        run_dir = RunDir(tmp_path / name)
        run_dir.metrics.mkdir(parents=True)
        write_json(run_dir.inputs("generate"), {"digest": "d", "inputs": {}})
        return run_dir

    def killed(*_: Any) -> None:
        raise Killed

    quiet, other = make("quiet"), make("other")
    generate(quiet, config, 0, StopFlag())
    with monkeypatch.context() as patch:
        patch.setattr(outcome, "write_manifest", killed)
        with pytest.raises(Killed):
            generate(other, config, 0, StopFlag())
    opened.clear()
    generate(other, config, 0, StopFlag())
    assert opened == []
    assert read_manifest(other, "generate") == read_manifest(quiet, "generate")
    assert not (other.generate / "published").exists()


def test_ten_thousand_units_in_one_directory(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nearly all are names of one file; a worker that comes finds the one to make, opens none."""
    trajectories = 50
    config = Config.model_validate(
        {
            "name": "t",
            "seeds": {"limit": 200},
            "generate": {
                "policy": "uniform",
                "num_steps": 1,
                "unit_size": 1,
                "num_trajectories": trajectories,
            },
        }
    )

    def killed(*_: Any) -> None:
        raise Killed

    run_dir = RunDir(tmp_path)
    run_dir.metrics.mkdir(parents=True)
    write_json(run_dir.inputs("generate"), {"digest": "d", "inputs": {}})
    with monkeypatch.context() as patch:
        patch.setattr(PublishedLines, "add", killed)
        with pytest.raises(Killed):
            generate(run_dir, config, 0, StopFlag())
    [first] = run_dir.shards.iterdir()
    with Table.open(first) as table:
        attrs = table.attrs
    lines = PublishedLines(run_dir)
    for unit in range(200 * trajectories - 1):
        if not run_dir.shard(unit).exists():
            os.link(first, run_dir.shard(unit))
        lines.add(unit, attrs)
    opened.clear()
    assert len(published_units(run_dir)) == 200 * trajectories - 1
    generate(run_dir, config, 0, StopFlag())
    assert opened == [f"unit-{200 * trajectories - 1:05d}.h5"]  # its own, to note it
    manifest = read_manifest(run_dir, "generate")
    assert manifest is not None
    assert manifest["counts"]["attempted"] == 200 * trajectories
    assert len(manifest["units"]) == 200 * trajectories


def test_a_full_disk_does_not_keep_a_unit_from_being_published(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    PublishedLines(run_dir).add(0, {"usage": []})
    monkeypatch.undo()
    assert published._read_lines(run_dir).keys() == set(range(NUM_UNITS))
