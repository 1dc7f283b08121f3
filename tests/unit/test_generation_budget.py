"""Counting calls over units and writers, and keeping them within a limit."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teams_hpc.generation.budget import Budget
from teams_hpc.generation.usage import UnitUsage, generation_usage
from teams_hpc.llm.ledger import Ledger, Usage
from teams_hpc.storage.journal import Batch, Header, JournalWriter, Result, Tokens
from teams_hpc.storage.run_dir import RunDir
from teams_hpc.storage.shards import Column, TableWriter

WORST = 6


def journal(run_dir: RunDir, unit: int, writer: str, done: int, doubtful: int) -> str:
    """A journal with so many calls done and in doubt; returns its name."""
    header = Header(unit=unit, digest="d", models={"expert": "m"})
    one = JournalWriter(run_dir.journal / f"unit-{unit:05d}.{writer}.wal", header)
    keys = [f"{writer}{number}" for number in range(done + doubtful)]
    one.commit(None, {"expert": keys})
    results = tuple(Result(key=key, digest="", value={}) for key in keys[:done])
    one.commit(Batch(role="expert", results=results, tokens=Tokens(calls=done)), {})
    one.close()
    return one.path.name


def shard(run_dir: RunDir, unit: int, calls: int, in_doubt: int, journals: list[str]) -> None:
    ledger = Ledger()
    ledger.of("expert", "m").add(Usage(calls=calls, in_doubt=in_doubt))
    with TableWriter(run_dir.shard(unit), (Column("x", "int64"),), "unit") as writer:
        writer.append({"x": [1]})
        writer.close({"usage": ledger.to_json(), "journals": journals})


def test_every_call_is_counted_once_wherever_it_stands(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert generation_usage(run_dir).rows == {}
    journal(run_dir, 1, "a", done=4, doubtful=2)
    journal(run_dir, 1, "b", done=3, doubtful=0)
    counted = journal(run_dir, 2, "c", done=5, doubtful=1)
    shard(run_dir, 2, calls=9, in_doubt=0, journals=[counted])
    late = journal(run_dir, 2, "d", done=2, doubtful=1)
    assert late != counted
    found = {
        unit: (ledger.total("expert").calls, ledger.total("expert").in_doubt)
        for unit, ledger in UnitUsage(run_dir).read().items()
    }
    assert found == {1: (7, 2), 2: (11, 1)}
    total = generation_usage(run_dir).total("expert")
    assert (total.calls, total.in_doubt) == (18, 3)


moves = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.sampled_from(["begin", "finish", "die", "stop"]),
        st.integers(0, WORST),
        st.integers(0, WORST),
    ),
    max_size=15,
)


@settings(max_examples=25, deadline=None)
@given(moves=moves, limit=st.integers(0, 25))
def test_whatever_units_do_the_limit_holds(
    tmp_path_factory: pytest.TempPathFactory,
    moves: list[tuple[int, str, int, int]],
    limit: int,
) -> None:
    """Several units at a time: what each may still ask for is counted before it asks."""
    run_dir = RunDir(tmp_path_factory.mktemp("run"))
    budgets = [Budget(run_dir, limit, 60.0) for _ in range(2)]
    begun: set[int] = set()
    for number, (unit, move, calls, doubtful) in enumerate(moves):
        budget = budgets[number % 2]
        if run_dir.shard(unit).exists():
            continue
        if unit not in begun:
            before = budget.spent()
            if not budget.reserve(unit, WORST):
                assert budget.room is not None
                assert budget.room < WORST
                continue
            assert before + WORST * (1 + len(begun)) <= limit
            begun.add(unit)
        if move == "begin":
            continue
        begun.remove(unit)
        done = min(calls, WORST - doubtful)
        name = journal(run_dir, unit, f"w{number}", done=done, doubtful=doubtful)
        if move == "finish":
            total = UnitUsage(run_dir).read()[unit].total("expert")
            names = [path.name for path in run_dir.journal.glob(f"unit-{unit:05d}.*")]
            assert name in names
            shard(run_dir, unit, total.calls, total.in_doubt, names)
        if move != "die":
            budget.give_back(unit)
        assert budgets[0].spent() == budgets[1].spent() <= limit


def test_a_dead_workers_reservation_ends_when_its_unit_is_tried(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    budget = Budget(run_dir, 10, 60.0)
    assert budget.reserve(0, 8)
    assert not budget.reserve(1, 4)
    assert (budget.room, budget.has_released) == (2, False)
    journal(run_dir, 0, "dead", done=3, doubtful=2)
    assert not budget.reserve(0, 8)
    assert (budget.room, budget.has_released) == (5, True)
    assert budget.reserve(1, 4)
    assert Budget(run_dir, None, 60.0).reserve(2, 10**9)


def test_who_stood_still_while_it_counted_counts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path)
    sleeper, other = Budget(run_dir, 10, 60.0), Budget(run_dir, 10, 60.0)
    real = UnitUsage.read

    def asleep(usage: UnitUsage) -> dict[int, Ledger]:
        found = real(usage)
        monkeypatch.undo()
        (run_dir.leases / "budget").unlink()  # another takes the mutex over
        assert other.reserve(1, 8)
        return found

    monkeypatch.setattr(UnitUsage, "read", asleep)
    assert not sleeper.reserve(0, 8)
    assert sleeper.room == 2
