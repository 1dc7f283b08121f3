"""Generation with real worker processes: any number of them, killed at any time, on a budget."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import locked, without_hdf5_locks

from teams_hpc.config import Config, dump_yaml, load_resolved
from teams_hpc.generation.unit_log import UnitLog
from teams_hpc.generation.usage import generation_usage
from teams_hpc.generation.worker import generate
from teams_hpc.llm.decoder import Decoder
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.transformers_engine import TransformersEngine
from teams_hpc.report.call_forecast import forecast_calls
from teams_hpc.rewriting.observation import observation_size
from teams_hpc.rewriting.operation_policy import MlpPolicy
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import write_json, write_text
from teams_hpc.storage.journal import read_journal, unit_of
from teams_hpc.storage.run_dir import RunDir, read_manifest
from teams_hpc.storage.shards import Status, Table

# What `teams-hpc stage` does, with an engine that takes its time, or fails where it is told to.
WORKER = """
import os, resource, signal, sys, time
from pathlib import Path
from teams_hpc.config import load_resolved
from teams_hpc.errors import TeamsError
from teams_hpc.generation.worker import generate
from teams_hpc.llm.template_engine import TemplateEngine
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.run_dir import RunDir

root, index, delay_s, fails, room = Path(sys.argv[1]), *sys.argv[2:]
real = TemplateEngine.step
def step(self):
    time.sleep(float(delay_s))
    return [
        one._replace(text="", finish_reason="error", completion_tokens=0, error="no GPU")
        if fails == "all" or int(one.id[:2], 16) < int(fails) else one
        for one in real(self)
    ]
TemplateEngine.step = step
if int(room):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), resource.RLIM_INFINITY))
stop = StopFlag()
stop.install()
run_dir = RunDir(root)
try:
    generate(run_dir, load_resolved(run_dir.config), int(index), stop)
except TeamsError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def make_run(root: Path, **changes: Any) -> RunDir:
    """A run directory as the pipeline leaves it before it starts the workers."""
    values = {
        "name": "t",
        "run_dir": str(root),
        "seeds": {"limit": 60},
        "generate": {"policy": "uniform", "num_steps": 3, "unit_size": 5},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value}
    config = Config.model_validate(values)
    run_dir = RunDir(root)
    for folder in (run_dir.metrics, run_dir.logs):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(run_dir.config, dump_yaml(config))
    write_json(run_dir.inputs("generate"), {"digest": "d", "inputs": {}})
    return run_dir


def start(
    run_dir: RunDir,
    index: int = 0,
    *,
    delay_s: float = 0.0,
    fails: str = "0",
    room: int = 0,
    environment: Mapping[str, str] = os.environ,
) -> subprocess.Popen[str]:
    words = (str(run_dir.root), str(index), str(delay_s), fails, str(room))
    return subprocess.Popen(
        (sys.executable, "-c", WORKER, *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def outcomes(workers: list[subprocess.Popen[str]], timeout_s: float = 90) -> list[tuple[int, str]]:
    """Exit codes and output; none is left alive."""
    with ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.kill)
        found = []
        for worker in workers:
            output, _ = worker.communicate(timeout=timeout_s)
            found.append((worker.returncode, output))
        return found


def wait_until(happened: Callable[[], object], *workers: subprocess.Popen[str]) -> None:
    """Wait for something the workers do; if they end before, or take too long, say why."""
    deadline = time.monotonic() + 30
    while not happened():
        if time.monotonic() > deadline or all(worker.poll() is not None for worker in workers):
            for worker in workers:
                worker.kill()
            raise AssertionError(outcomes(list(workers)))
        time.sleep(0.005)


def num_shards(run_dir: RunDir) -> int:
    return len(list(run_dir.shards.glob("*.h5")))


def run(run_dir: RunDir, num_workers: int = 1, **how: Any) -> dict[str, Any]:
    """Run to the end; returns the manifest."""
    found = outcomes([start(run_dir, index, **how) for index in range(num_workers)])
    assert [code for code, _ in found] == [0] * num_workers, found
    manifest = read_manifest(run_dir, "generate")
    assert manifest is not None
    return manifest


def columns(run_dir: RunDir, *names: str) -> Iterator[tuple[Any, ...]]:
    for path in sorted(run_dir.shards.glob("*.h5")):
        with Table.open(path) as table:
            assert table.verify() == []
            yield from zip(*table.read(0, table.num_rows, names).values(), strict=True)


def leftovers(run_dir: RunDir) -> list[Path]:
    """Files that should be gone when the stage is done."""
    found = [path for path in run_dir.root.rglob("*.tmp") if run_dir.metrics not in path.parents]
    folders = (run_dir.journal, run_dir.leases, run_dir.generate / "reservations")
    return found + [path for folder in folders for path in folder.glob("*")]


def usage_of(manifest: dict[str, Any]) -> dict[tuple[str, str], int]:
    return {
        (row["role"], name): row[name]
        for row in manifest["usage"]
        for name in ("calls", "prompt_tokens", "completion_tokens", "in_doubt")
    }


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[str, Any]]:
    """A run that nothing disturbed, by one worker."""
    run_dir = make_run(tmp_path_factory.mktemp("quiet"))
    return run_dir, run(run_dir)


def test_rows_balance_and_name_their_parents(quiet: tuple[RunDir, dict[str, Any]]) -> None:
    run_dir, manifest = quiet
    counts = manifest["counts"]
    assert counts["attempted"] == 60 * 3
    eliminated = sum(counts["eliminated"].values())
    assert counts["attempted"] == counts["kept"] + eliminated + counts["failed"]
    assert counts["kept"] > 30 < eliminated
    kept: set[str] = set()
    ids = []
    for row, parent, status in columns(run_dir, "record_id", "parent_id", "status"):
        assert parent in kept | {""}
        ids.append(row)
        if status == Status.KEPT:
            kept.add(row)
    assert len(ids) == len(set(ids)) == counts["attempted"]
    assert manifest["exactness"] == "exact"
    assert not manifest["engines"]["expert"]["is_model"]
    assert usage_of(manifest)["expert", "in_doubt"] == 0
    assert leftovers(run_dir) == []
    assert json.loads(run_dir.progress("generate").read_text())["done"] == counts["attempted"]


def rate_of(run_dir: RunDir) -> float:
    return float(json.loads(run_dir.progress("generate").read_text())["rate_per_s"])


@pytest.mark.parametrize("unit_size", [20, 10])
def test_the_measured_rate_is_that_of_the_clock_and_foretells_hours(
    unit_size: int, tmp_path: Path
) -> None:
    """Of one unit and of two: more than by the clock here, which counts the process's start too.

    A unit's chains take at least four turns of the engine, one after another.
    """
    run_dir = make_run(
        tmp_path,
        seeds={"limit": 20},
        generate={"unit_size": unit_size},
        site={"gpus_per_node": 1, "num_workers": 1},
    )
    begin = time.monotonic()
    rows = run(run_dir, delay_s=0.5)["counts"]["attempted"]
    wall_s = time.monotonic() - begin
    assert rows / wall_s <= rate_of(run_dir) <= 3 * unit_size / (4 * 0.5)
    config = load_resolved(run_dir.config)
    hours = forecast_calls(config, (run_dir, config)).gpu_hours
    assert hours == pytest.approx(rows / rate_of(run_dir) / 3600)


def test_a_worker_that_comes_late_leaves_a_rate_that_is_true(tmp_path: Path) -> None:
    """It counts from where the stage was; one that made nothing leaves the rate of who did."""
    run_dir = make_run(tmp_path, seeds={"limit": 20}, site={"num_workers": 2})
    first = start(run_dir, delay_s=0.3)
    wait_until(run_dir.progress("generate").exists, first)
    alone = rate_of(run_dir)
    assert outcomes([start(run_dir, 1, delay_s=0.3), first])[0][0] == 0
    assert 0.2 * alone < rate_of(run_dir) < 3 * 15 / (4 * 0.3)  # two units at once, or nearly three
    before = rate_of(run_dir)
    run_dir.manifest("generate").unlink()  # as if the one that counts all had been killed
    run(run_dir)
    assert rate_of(run_dir) == before


@pytest.mark.parametrize("num_workers", [2, 3])
def test_any_number_of_workers_makes_the_same_rows(
    quiet: tuple[RunDir, dict[str, Any]], tmp_path: Path, num_workers: int
) -> None:
    run_dir = make_run(tmp_path, site={"num_workers": num_workers})
    assert run(run_dir, num_workers, delay_s=0.01) == quiet[1]
    assert leftovers(run_dir) == []


def test_killed_again_and_again_it_loses_and_repeats_nothing_durable(
    quiet: tuple[RunDir, dict[str, Any]], tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path)
    moments = random.Random(11)
    num_inside = 0
    for count in (1, 3, 2, 1, 2):
        workers = [start(run_dir, index, delay_s=0.03) for index in range(count)]
        before = num_shards(run_dir)
        wait_until(lambda before=before: num_shards(run_dir) > before, *workers)
        time.sleep(moments.uniform(0.0, 0.1))
        num_inside += sum(worker.poll() is None for worker in workers)
        for worker in workers:
            worker.kill()
        outcomes(workers)
        expert = generation_usage(run_dir).total("expert")
        assert expert.calls > 0
    assert num_inside >= 7
    assert list(run_dir.journal.glob("*.wal")) or list(run_dir.leases.glob("*"))
    manifest = run(run_dir, 2)
    expected, found = usage_of(quiet[1]), usage_of(manifest)
    doubts = {key: found.pop(key) for key in list(found) if key[1] == "in_doubt"}
    assert found == {key: value for key, value in expected.items() if key[1] != "in_doubt"}
    assert 0 < sum(doubts.values()) <= num_inside * 2 * 5
    usage = "usage"
    assert {**manifest, usage: 0} == {**quiet[1], usage: 0}
    assert leftovers(run_dir) == []


def test_a_holder_that_stands_still_is_replaced_and_does_no_harm_when_it_wakes(
    quiet: tuple[RunDir, dict[str, Any]], tmp_path: Path
) -> None:
    """It costs calls, but no row is lost, doubled or another."""
    run_dir = make_run(tmp_path, site={"lease_s": 2.0, "num_workers": 2})
    sleeper = start(run_dir, 0, delay_s=0.05)
    wait_until(lambda: num_shards(run_dir) >= 2, sleeper)
    asleep_over = stop_inside_a_unit(run_dir, sleeper)
    [(code, said)] = outcomes([start(run_dir, 1)])
    assert code == 0, said
    assert run_dir.shard(asleep_over).exists()
    manifest = read_manifest(run_dir, "generate")
    sleeper.send_signal(signal.SIGCONT)
    [(code, said)] = outcomes([sleeper])
    assert code == 0, said
    assert read_manifest(run_dir, "generate") == manifest
    usage = "usage"
    assert manifest is not None
    assert {**manifest, usage: 0} == {**quiet[1], usage: 0}
    assert leftovers(run_dir) == []


def stop_inside_a_unit(run_dir: RunDir, worker: subprocess.Popen[str]) -> int:
    """SIGSTOP a worker that has calls in flight; returns the unit it holds."""
    while True:
        wait_until(lambda: list(run_dir.journal.glob("*.wal")), worker)
        worker.send_signal(signal.SIGSTOP)
        for path in run_dir.journal.glob("*.wal"):
            if not run_dir.shard(unit_of(path)).exists() and read_journal(path).in_doubt:
                return unit_of(path)
        worker.send_signal(signal.SIGCONT)  # between two units: nothing to take over
        time.sleep(0.01)


def test_a_stop_is_taken_at_a_safe_point_and_costs_nothing(
    quiet: tuple[RunDir, dict[str, Any]], tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path)
    worker = start(run_dir, delay_s=0.03)
    wait_until(lambda: num_shards(run_dir), worker)
    time.sleep(0.08)
    worker.send_signal(signal.SIGTERM)
    [(code, output)] = outcomes([worker])
    assert code == 144, output
    assert "stopped on SIGTERM after part of unit" in output
    assert list(run_dir.leases.glob("block-*")) == []
    assert generation_usage(run_dir).total("expert").in_doubt == 0
    assert run(run_dir) == quiet[1]


@pytest.mark.parametrize("locking", [None, "FALSE"])
def test_no_lock_on_a_unit_is_asked_for(
    locking: str | None, quiet: tuple[RunDir, dict[str, Any]], tmp_path: Path
) -> None:
    """Units that are there are locked by somebody else, as if a file system refused all locks.

    They are opened to be counted, since the lines that spare it are gone.
    """
    run_dir = make_run(tmp_path)
    how: dict[str, Any] = {"environment": without_hdf5_locks(locking)}
    worker = start(run_dir, delay_s=0.03, **how)
    wait_until(lambda: num_shards(run_dir) >= 2, worker)
    worker.kill()
    outcomes([worker])
    for path in (run_dir.generate / "published").iterdir():
        path.unlink()
    with locked(run_dir.shards.glob("*.h5")):
        manifest = run(run_dir, **how)
    assert {**manifest, "usage": 0} == {**quiet[1], "usage": 0}


def spent(run_dir: RunDir) -> int:
    total: Ledger = generation_usage(run_dir)
    return total.total("expert").calls + total.total("expert").in_doubt


# One unit's worst case is three quarters of the least limit, and the pause makes three workers
# meet: nothing but reservations keeps them from spending more.
@pytest.mark.parametrize(
    ("num_workers", "limit", "delay_s"), [(1, 130, 0.01), (3, 130, 0.01), (3, 40, 0.4)]
)
def test_a_budget_is_never_exceeded_and_raising_it_goes_on(
    quiet: tuple[RunDir, dict[str, Any]],
    tmp_path: Path,
    num_workers: int,
    limit: int,
    delay_s: float,
) -> None:
    changes = {"site": {"num_workers": num_workers}}
    run_dir = make_run(tmp_path, budget={"max_expert_calls": limit}, **changes)
    workers = [start(run_dir, index, delay_s=delay_s) for index in range(num_workers)]
    found = outcomes(workers)
    assert [code for code, _ in found] == [1] * num_workers, found
    assert limit - 30 < spent(run_dir) <= limit
    assert read_manifest(run_dir, "generate") is None
    message = found[0][1]
    assert "stopped at the budget" in message
    assert "of 12 units (" in message
    least = int(message.partition("budget.max_expert_calls to at least ")[2].split()[0])
    assert least == spent(run_dir) + 30
    done = num_shards(run_dir)
    make_run(tmp_path, budget={"max_expert_calls": least}, **changes)
    assert outcomes([start(run_dir)])[0][0] == 1
    assert done < num_shards(run_dir) < 12
    assert spent(run_dir) <= least
    make_run(tmp_path, budget={"max_expert_calls": 10_000}, **changes)
    assert run(run_dir, num_workers) == quiet[1]
    assert leftovers(run_dir) == []


def test_a_killed_workers_reservation_does_not_block_the_budget(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, seeds={"limit": 10}, budget={"max_expert_calls": 60})
    worker = start(run_dir, delay_s=5.0)
    reservations = run_dir.generate / "reservations"
    wait_until(lambda: list(reservations.glob("*.json")), worker)
    worker.kill()
    outcomes([worker])
    manifest = run(run_dir)
    assert usage_of(manifest)["expert", "calls"] + usage_of(manifest)["expert", "in_doubt"] <= 60


def test_a_row_that_fails_carries_its_reason_and_others_go_on(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    manifest = run(run_dir, fails="40")
    rows = list(columns(run_dir, "status", "detail", "reason"))
    failed = [row for row in rows if row[0] == Status.FAILED]
    assert 10 < len(failed) == manifest["counts"]["failed"] < 60
    assert all(detail == "no GPU" for _, detail, _ in failed)
    assert manifest["counts"]["kept"] > 30


def test_an_engine_that_answers_nothing_is_no_success(
    quiet: tuple[RunDir, dict[str, Any]], tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path, generate={"unit_size": 60})
    [(code, output)] = outcomes([start(run_dir, fails="all")])
    assert code == 1
    assert "the expert answered nothing in unit 0" in output
    assert "no GPU" in output
    assert num_shards(run_dir) == 0
    manifest = run(run_dir)
    assert manifest["counts"] == quiet[1]["counts"]
    small = make_run(tmp_path / "small")
    [(code, output)] = outcomes([start(small, fails="all")])
    assert code == 1
    assert "not one of 180 rewrites was kept: 180 failed" in output
    assert "--rerun-from generate" in output
    assert read_manifest(small, "generate") is None


def test_a_full_disk_is_said_and_left_behind(
    quiet: tuple[RunDir, dict[str, Any]], tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path)
    [(code, output)] = outcomes([start(run_dir, room=12_000)])
    assert code == 1
    assert len(output.splitlines()) == 1
    assert "file size limit reached at" in output
    assert list(run_dir.shards.iterdir()) == []
    assert run(run_dir)["sha256"] == quiet[1]["sha256"]


def test_a_learned_policy_and_one_answer_a_chain(tmp_path: Path) -> None:
    run_dir = make_run(
        tmp_path, generate={"policy": "learned", "answer": "last", "action": "argmax"}
    )
    rng, size, width = np.random.default_rng(0), observation_size("features"), 8
    shapes = {
        "hidden_0.weight": (width, size),
        "hidden_0.bias": (width,),
        "hidden_1.weight": (width, width),
        "hidden_1.bias": (width,),
        "head.weight": (6, width),
        "head.bias": (6,),
    }
    policy = MlpPolicy(
        weights={name: rng.normal(size=shape) for name, shape in shapes.items()},
        metadata={"observation": "features", "member": "3"},
    )
    policy.save(run_dir.selected_policy)
    manifest = run(run_dir)
    rows = list(columns(run_dir, "seed_id", "policy_member", "status", "answer_finish", "response"))
    assert {member for _, member, _, _, _ in rows} == {3}
    answered = [seed for seed, _, _, finish, _ in rows if finish]
    assert len(answered) == len(set(answered)) > 15
    assert all(bool(response) == bool(finish) for _, _, _, finish, response in rows)
    assert manifest["counts"]["attempted"] == 180


@pytest.mark.parametrize("batching", ["fixed", "refill"])
def test_after_kills_fixed_batches_alone_are_formed_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    """In this process, so that the model is loaded in milliseconds; a kill is an exception here.

    So small a model gives the same rows in any batch, which larger ones don't: so the batches are
    looked at themselves. With `refill` they are others after a kill.
    """
    model = {"kind": "transformers", "model": str(tiny_llama), "dtype": "float32", "threads": 1}
    engine = {**model, "batching": batching, "batch_size": 4, "max_tokens": 150, "temperature": 1.0}
    changes: dict[str, Any] = {
        "seeds": {"limit": 9},
        "generate": {"unit_size": 3, "num_steps": 2, "equal_threshold": 0.0},
        "expert": engine,
        "reviewer": {**engine, "batch_size": 3},
    }
    left = [10**9]
    batches: set[tuple[str, ...]] = set()
    real, admit, score = UnitLog.commit, Decoder.admit, TransformersEngine.score

    def admitting(decoder: Decoder, rows: Sequence[Any]) -> None:
        batches.add(("completed", *(row.id for row in rows)))
        admit(decoder, rows)

    def scoring(engine: TransformersEngine, requests: Sequence[Any]) -> Any:
        batches.add(("scored", *(repr(request.messages) for request in requests)))
        return score(engine, requests)

    monkeypatch.setattr(Decoder, "admit", admitting)
    monkeypatch.setattr(TransformersEngine, "score", scoring)

    def commit(log: UnitLog, *content: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(log, *content)

    monkeypatch.setattr(UnitLog, "commit", commit)
    quiet = make_run(tmp_path / "quiet", **changes)
    generate(quiet, load_resolved(quiet.config), 0, StopFlag())
    expected = read_manifest(quiet, "generate")
    assert expected is not None
    assert expected["exactness"] == ("exact" if batching == "fixed" else "statistical")
    batches_of_quiet = batches.copy()
    assert {batch[0] for batch in batches_of_quiet} == {"completed", "scored"}
    batches.clear()
    run_dir = make_run(tmp_path / "killed", **changes)
    num_kills = 0
    for kill_at in (3, 2, 4, 3, 10**9):
        left[0] = kill_at
        try:
            generate(run_dir, load_resolved(run_dir.config), 0, StopFlag())
        except KeyboardInterrupt:
            num_kills += 1
    assert num_kills == 4
    assert (batches == batches_of_quiet) == (batching == "fixed")
    found = read_manifest(run_dir, "generate")
    assert found is not None
    assert found["units"] == expected["units"]
    assert usage_of(found)["expert", "calls"] == usage_of(expected)["expert", "calls"]
    assert usage_of(found)["expert", "in_doubt"] > 0
