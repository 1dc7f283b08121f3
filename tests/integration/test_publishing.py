"""A unit is published while the next one runs; killed, stopped or failing, it loses nothing."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from integration.test_generation import (
    WORKER,
    leftovers,
    make_run,
    num_shards,
    outcomes,
    run,
    usage_of,
    wait_until,
)

from teams_hpc.config import load_resolved
from teams_hpc.errors import WorkError
from teams_hpc.generation import worker
from teams_hpc.generation.usage import generation_usage
from teams_hpc.generation.worker import generate
from teams_hpc.llm.ledger import Ledger
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.journal import unit_of
from teams_hpc.storage.run_dir import RunDir, read_manifest
from teams_hpc.storage.shards import Table

# Publishing waits until the test lets it go on: before it begins, or once the file has its name.
SLOW = """
import sys, time
from pathlib import Path
from teams_hpc.generation import outcome, worker
def held(real):
    def wait(*words, **named):
        while (Path(sys.argv[1]) / "hold").exists():
            time.sleep(0.01)
        return real(*words, **named)
    return wait
if (Path(sys.argv[1]) / "hold").read_text() == "before":
    worker.publish_unit = held(worker.publish_unit)
else:
    outcome.PublishedLines.add = held(outcome.PublishedLines.add)
"""


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, Any]]:
    """One worker that nobody disturbs, and its manifest."""
    run_dir = make_run(tmp_path_factory.mktemp("quiet"))
    return run_dir, run(run_dir)


def start_held(run_dir: RunDir, when: str = "before") -> subprocess.Popen[str]:
    """A worker whose first unit is being published, and whose second one runs or has been run."""
    (run_dir.root / "hold").write_text(when)
    process = subprocess.Popen(
        (sys.executable, "-c", SLOW + WORKER, str(run_dir.root), "0", "0.03", "0", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: len({unit_of(path) for path in run_dir.journal.glob("*.wal")}) == 2, process)
    return process


@pytest.mark.parametrize(("when", "num_named"), [("before", 0), ("linked", 1)])
def test_a_kill_while_a_unit_is_published_repeats_no_call_of_it(
    quiet: tuple[RunDir, dict[str, Any]], tmp_path: Path, when: str, num_named: int
) -> None:
    run_dir = make_run(tmp_path)
    process = start_held(run_dir, when)
    wait_until(lambda: num_shards(run_dir) == num_named, process)
    assert len(list(run_dir.leases.glob("block-*"))) == 2  # none is let go before it is published
    process.kill()
    outcomes([process])
    (run_dir.root / "hold").unlink()
    assert generation_usage(run_dir).total("expert").calls > 0
    manifest = run(run_dir)
    found, expected = usage_of(manifest), usage_of(quiet[1])
    in_doubt = sum(found.pop(key) for key in list(found) if key[1] == "in_doubt")
    assert in_doubt <= 2 * 5
    assert found == {key: value for key, value in expected.items() if key[1] != "in_doubt"}
    assert {**manifest, "usage": 0} == {**quiet[1], "usage": 0}
    assert leftovers(run_dir) == []


def test_a_stop_waits_for_what_is_being_published(
    quiet: tuple[RunDir, dict[str, Any]], tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path)
    process = start_held(run_dir)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.0)
    assert num_shards(run_dir) == 0
    (run_dir.root / "hold").unlink()
    [(code, output)] = outcomes([process])
    assert code == 144, output
    assert num_shards(run_dir) == 1
    assert list(run_dir.leases.glob("block-*")) == []
    assert run(run_dir) == quiet[1]


def in_process(run_dir: RunDir) -> None:
    generate(run_dir, load_resolved(run_dir.config), 0, StopFlag())


def failing(unit: int) -> Callable[..., Any]:
    """`publish_unit` on a disk that is full when this unit comes."""
    publish = worker.publish_unit

    def fail(run_dir: RunDir, log: Any, *rest: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        if log.unit == unit:
            raise WorkError("disk full")
        return publish(run_dir, log, *rest)

    return fail


@pytest.mark.parametrize("unit", [0, 5, 11])  # the first, one among others, the last
def test_a_unit_that_cannot_be_published_ends_the_run_and_is_published_by_the_next(
    quiet: tuple[RunDir, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: int
) -> None:
    run_dir = make_run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(worker, "publish_unit", failing(unit))
        with pytest.raises(WorkError, match="disk full"):
            in_process(run_dir)
    assert num_shards(run_dir) == unit
    assert list(run_dir.leases.glob("block-*")) == []
    assert unit in {unit_of(path) for path in run_dir.journal.glob("*.wal")}
    in_process(run_dir)
    assert read_manifest(run_dir, "generate") == quiet[1]  # no call was repeated either


def test_a_budget_counts_what_a_unit_has_left_over_before_the_next_begins(
    quiet: tuple[RunDir, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More is reserved of a unit than it needs; the last one just fits without that."""
    with Table.open(quiet[0].shard(11)) as table:
        of_last = Ledger.from_json(table.attrs["usage"]).total("expert").calls
    total = Ledger.from_json(quiet[1]["usage"]).total("expert").calls
    worst_case = 5 * 2 * 3
    limit = total - of_last + worst_case
    run_dir = make_run(tmp_path, budget={"max_expert_calls": limit})
    publish = worker.publish_unit

    def late(*arguments: Any) -> Any:
        time.sleep(0.1)
        return publish(*arguments)

    monkeypatch.setattr(worker, "publish_unit", late)
    in_process(run_dir)
    assert read_manifest(run_dir, "generate") == quiet[1]
