"""Calls through the journal: nothing durable is asked twice, wherever the work is cut off."""

import hashlib
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from teams_hpc.config.schema import GenerateConfig, TemplateEngineConfig, TemplateReviewerConfig
from teams_hpc.errors import CorruptFileError, EngineError, StopRequested, WorkError
from teams_hpc.generation.calls import CallDigests, Calls, ClaimLost
from teams_hpc.generation.engine_ahead import EngineAhead
from teams_hpc.generation.evolve import Chain, Row, Steering
from teams_hpc.generation.plan import ChainKey
from teams_hpc.generation.shared_engine import share_engine
from teams_hpc.generation.unit import UnitRunner
from teams_hpc.generation.unit_log import UnitLog
from teams_hpc.llm.base import Completion, Engine, Exactness, Request, Score, ScoreRequest
from teams_hpc.llm.ledger import Ledger
from teams_hpc.rewriting.observation import Observer
from teams_hpc.rewriting.operation_policy import UniformPolicy
from teams_hpc.rewriting.reviewer import Reviewer
from teams_hpc.rewriting.seeds import Seed
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.journal import Batch, journal_paths, read_journal
from teams_hpc.storage.shards import Status

SEEDS = [Seed(f"Tell me about the number {number}.") for number in range(7)]
STEPS = 3


@dataclass(slots=True)
class Stub:
    """Answers by hash; at each step a few of the oldest requests come back, or all.

    Attributes:
        batch: Most completions of one step.
        asked: Ids, in order.
        batches: Ids of each step.
    """

    batch: int = 3
    is_down: bool = False
    asked: list[str] = field(default_factory=list)
    batches: list[tuple[str, ...]] = field(default_factory=list)
    _pending: list[Request] = field(default_factory=list)
    content_id: str = "stub"
    exactness: Exactness = "exact"
    is_model: bool = True

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def add(self, request: Request) -> None:
        self.asked.append(request.id)
        self._pending.append(request)

    def step(self) -> list[Completion]:
        done, self._pending = self._pending[: self.batch], self._pending[self.batch :]
        self.batches.append(tuple(request.id for request in done))
        return [self._complete(request) for request in done]

    def _complete(self, request: Request) -> Completion:
        number = int(hashlib.sha256(f"{request.seed}{request.messages}".encode()).hexdigest(), 16)
        if request.task.kind == "judge":
            text = "Equal" if number % 4 == 0 else "Not Equal"
        else:
            text = "sorry" if number % 9 == 0 else f"Words about {number % 10**9}"
        is_error = self.is_down or number % 11 == 0
        return Completion(
            id=request.id,
            text="" if is_error else text,
            finish_reason="error" if is_error else "stop",
            prompt_tokens=4,
            completion_tokens=0 if is_error else 2,
            error="down" if is_error else "",
        )

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        raise AssertionError("verdicts are generated here")

    def close(self) -> None:
        pass


class Killed(Exception):
    pass


@dataclass(slots=True)
class MortalLog(UnitLog):
    """Dies at a commit, either before or after it became durable."""

    left: int = 10**9
    dies_after: bool = False

    def commit(self, batch: Batch | None, intents: Mapping[str, Sequence[str]]) -> None:
        self.left -= 1
        if self.left == 0 and not self.dies_after:
            raise Killed
        UnitLog.commit(self, batch, intents)
        if self.left == 0:
            raise Killed


def make_chains() -> list[Chain]:
    steering = Steering(
        run_seed=1,
        settings=GenerateConfig(policy="uniform", num_steps=STEPS),
        policy=UniformPolicy(),
        member=-1,
        observer=Observer(kind="one_hot", episode_length=6),
        expert="stub",
    )
    keys = [ChainKey(seed=seed, split="policy_train", trajectory=0) for seed in SEEDS]
    return [Chain(key, steering) for key in keys]


def run(
    folder: Path,
    expert: Engine,
    judge: Engine,
    *,
    batch_size: int | None = None,
    left: int = 10**9,
    dies_after: bool = False,
    stop: StopFlag | None = None,
    temperature: float = 0.7,
    verdict: Literal["generated", "likelihood"] = "generated",
    claim: Callable[[], None] = lambda: None,
    log_type: type[MortalLog] = MortalLog,
) -> tuple[list[Row], UnitLog]:
    models = {"expert": "stub", "reviewer": "stub"}
    log = log_type(folder, 0, "digest", models, left=left, dies_after=dies_after)
    reviewer = Reviewer(judge, verdict, Ledger())
    digests = CallDigests.make(
        expert,
        TemplateEngineConfig(temperature=temperature),
        reviewer,
        TemplateReviewerConfig(verdict=verdict),
    )
    calls = Calls(
        log=log,
        expert=expert,
        reviewer=reviewer,
        digests=digests,
        batch_size=batch_size,
        check_claim=claim,
    )
    chains = make_chains()
    try:
        UnitRunner(chains=chains, calls=calls, stop=stop or StopFlag(), what="unit 0").run()
    finally:
        log.close()
    return [row for chain in chains for row in chain.rows], log


def done_and_doubted(folder: Path) -> tuple[list[str], set[str]]:
    """Keys with a durable result, over all writers, and those that may have been asked in vain."""
    journals = [read_journal(path) for path in journal_paths(folder)]
    done = [key.key for one in journals for batch in one.batches for key in batch.results]
    doubted = {key for one in journals for key in one.in_doubt}
    return done, doubted


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], list[str]]:
    """Rows and keys of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("quiet")
    rows, _ = run(folder, Stub(), Stub())
    done, doubted = done_and_doubted(folder)
    assert not doubted
    assert len(done) == len(set(done)) > 3 * len(SEEDS)
    return rows, sorted(done)


@pytest.mark.parametrize(("batch_size", "slots"), [(None, None), (4, None), (None, 3)])
@pytest.mark.parametrize("dies_after", [False, True])
def test_killed_at_any_commit_it_repeats_no_durable_call(
    tmp_path: Path,
    quiet: tuple[list[Row], list[str]],
    dies_after: bool,
    batch_size: int | None,
    slots: int | None,
) -> None:
    rows, keys = quiet
    for kill_at in range(1, 40, 2):
        folder = tmp_path / f"{kill_at}"
        experts = []
        for attempt in range(60):
            expert = Stub()
            experts.append(expert)
            engine = expert if slots is None else EngineAhead(expert, slots)
            before = set(done_and_doubted(folder)[0])
            try:
                found, log = run(
                    folder,
                    engine,
                    Stub(),
                    batch_size=batch_size,
                    left=kill_at + attempt,
                    dies_after=dies_after,
                )
            except Killed:
                found = []
            finally:
                engine.close()
            assert not before & set(expert.asked)
            if found:
                break
        assert repr(found) == repr(rows)
        done, doubted = done_and_doubted(folder)
        assert sorted(done) == keys
        asked = [key for expert in experts for key in expert.asked]
        assert {key for key in asked if asked.count(key) > 1} <= doubted
        usage = log.usage()
        assert usage.total("expert").calls + usage.total("reviewer").calls == len(keys)


@pytest.mark.parametrize("dies_after", [False, True])
@pytest.mark.parametrize("kill_at", [2, 5, 8])
def test_lost_tries_are_counted_once_over_kills_and_change_nothing_else(
    tmp_path: Path, quiet: tuple[list[Row], list[str]], kill_at: int, dies_after: bool
) -> None:
    def num_lost(key: str) -> int:
        return zlib.crc32(key.encode()) % 3

    class Losing(Stub):
        def step(self) -> list[Completion]:
            return [one._replace(lost=num_lost(one.id)) for one in Stub.step(self)]

    for attempt in range(2):
        with pytest.raises(Killed):
            run(tmp_path, Losing(), Losing(), left=kill_at + attempt, dies_after=dies_after)
    rows, log = run(tmp_path, Losing(), Losing())
    assert repr(rows) == repr(quiet[0])
    done, _ = done_and_doubted(tmp_path)
    assert sorted(done) == quiet[1]
    journals = [read_journal(path) for path in journal_paths(tmp_path)]
    for role in ("expert", "reviewer"):
        is_verdict = role == "reviewer"
        lost = [num_lost(key) for key in done if ("verdict" in key) == is_verdict]
        without_result = [key for one in journals for key in one.in_doubt]
        usage = log.usage().total(role)  # type: ignore[arg-type]
        assert usage.calls == len(lost)
        assert sum(lost) > 0
        assert usage.in_doubt - sum(lost) == sum(
            ("verdict" in key) == is_verdict for key in without_result
        )


def test_fixed_batches_are_formed_again_after_a_kill(tmp_path: Path) -> None:
    whole = Stub()
    rows, _ = run(tmp_path / "quiet", whole, Stub(), batch_size=3)
    assert len(whole.batches) > 6
    for kill_at in range(2, 14):
        parts = [Stub(), Stub()]
        folder = tmp_path / f"{kill_at}"
        with pytest.raises(Killed):
            run(folder, parts[0], Stub(), batch_size=3, left=kill_at)
        assert repr(run(folder, parts[1], Stub(), batch_size=3)[0]) == repr(rows)
        first, second = (part.batches for part in parts)
        assert whole.batches[: len(first)] == first
        assert whole.batches[-len(second) :] == second
        assert 0 <= len(first) + len(second) - len(whole.batches) <= 1


def test_a_stop_leaves_nothing_in_doubt(tmp_path: Path, quiet: tuple[list[Row], list[str]]) -> None:
    class Stopping(Stub):
        def step(self) -> list[Completion]:
            if len(self.batches) == 4:
                flag.reason = "SIGTERM"
            return Stub.step(self)

    flag = StopFlag()
    with pytest.raises(StopRequested, match="unit 0"):
        run(tmp_path, Stopping(), Stub(), stop=flag)
    done, doubted = done_and_doubted(tmp_path)
    assert done
    assert not doubted
    assert repr(run(tmp_path, Stub(), Stub())[0]) == repr(quiet[0])
    assert sorted(done_and_doubted(tmp_path)[0]) == quiet[1]


def test_another_prompt_model_or_sampling_is_no_replay(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Stub(), Stub(), left=4)
    with pytest.raises(CorruptFileError, match=r"unit-00000\..*\.wal: the result of call"):
        run(tmp_path, Stub(), Stub(), temperature=0.6)
    with pytest.raises(CorruptFileError, match="other inputs"):
        UnitLog(tmp_path, 0, "another", {"expert": "stub", "reviewer": "stub"})


def test_a_holder_that_was_thought_dead_costs_calls_and_nothing_else(
    tmp_path: Path, quiet: tuple[list[Row], list[str]]
) -> None:
    overtaken: list[UnitLog] = []

    class Stalling(Stub):
        def step(self) -> list[Completion]:
            if len(self.batches) == 3 and not overtaken:
                rows, log = run(tmp_path, Stub(), Stub())
                assert repr(rows) == repr(quiet[0])
                overtaken.append(log)
            return Stub.step(self)

    rows, log = run(tmp_path, Stalling(), Stub())
    assert repr(rows) == repr(quiet[0])
    done, _ = done_and_doubted(tmp_path)
    assert set(done) == set(quiet[1])
    assert len(done) > len(quiet[1])
    # Each counts what it knows; together they count all that was paid for.
    named = set(log.file_names) | set(overtaken[0].file_names)
    assert named == {path.name for path in journal_paths(tmp_path)}
    found, _ = run(tmp_path, Stub(is_down=True), Stub(is_down=True))
    assert repr(found) == repr(quiet[0])

    def lose() -> None:
        raise ClaimLost

    expert = Stub()
    with pytest.raises(ClaimLost):
        run(tmp_path / "other", expert, Stub(), claim=lose)
    assert expert.asked == []


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("num_checks", range(1, 8))
def test_a_unit_that_was_lost_may_come_back_to_the_same_engine(
    tmp_path: Path, quiet: tuple[list[Row], list[str]], num_checks: int, is_shared: bool
) -> None:
    left = [num_checks]

    def lose() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise ClaimLost

    expert, judge = share_engine(Stub()) if is_shared else (Stub(), Stub())
    with pytest.raises(ClaimLost):
        run(tmp_path, expert, judge, claim=lose)
    # A late reply to an earlier prompt would pass for one to another prompt of the same step.
    assert expert.num_pending == 0
    assert repr(run(tmp_path, expert, judge)[0]) == repr(quiet[0])


def test_an_engine_that_was_down_is_asked_anew(
    tmp_path: Path, quiet: tuple[list[Row], list[str]]
) -> None:
    rows, _ = run(tmp_path, Stub(is_down=True), Stub())
    assert all(row["detail"] == "down" for row in rows)
    found, log = run(tmp_path, Stub(), Stub())
    assert repr(found) == repr(quiet[0])
    errors = len(SEEDS) * STEPS
    assert log.usage().total("expert").calls == errors + sum("verdict" not in k for k in quiet[1])


def test_after_an_outage_no_reply_is_asked_for_twice(
    tmp_path: Path, quiet: tuple[list[Row], list[str]]
) -> None:
    run(tmp_path, Stub(is_down=True), Stub())
    [outage] = journal_paths(tmp_path)
    errors = {result.key for one in read_journal(outage).batches for result in one.results}
    replies: set[str] = set()
    for attempt in range(60):
        expert = Stub()
        found: list[Row] = []
        try:
            found, _ = run(tmp_path, expert, Stub(), left=4 + attempt // 8)
        except Killed:
            pass
        assert not replies & set(expert.asked)
        later = [read_journal(path) for path in journal_paths(tmp_path) if path != outage]
        replies = {result.key for one in later for b in one.batches for result in b.results}
        if found:
            break
    assert repr(found) == repr(quiet[0])
    assert errors & replies
    assert len(journal_paths(tmp_path)) > 3


@pytest.mark.parametrize("role", ["expert", "reviewer"])
def test_nothing_is_sent_if_the_unit_is_lost_while_it_is_announced(
    tmp_path: Path, role: str
) -> None:
    class Slow(MortalLog):
        """Its last fsync takes so long that another takes the unit over."""

        def commit(self, batch: Batch | None, intents: Mapping[str, Sequence[str]]) -> None:
            MortalLog.commit(self, batch, intents)
            if intents.get(role):
                is_lost.append(True)

    def check() -> None:
        if is_lost:
            raise ClaimLost

    is_lost: list[bool] = []
    expert, judge = Stub(), Stub()
    with pytest.raises(ClaimLost):
        run(tmp_path, expert, judge, claim=check, log_type=Slow)
    assert (expert if role == "expert" else judge).asked == []
    assert is_lost


def test_a_full_disk_stops_the_unit_and_it_goes_on_after(
    tmp_path: Path, quiet: tuple[list[Row], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    real, left = os.write, [6]

    def write(descriptor: int, content: bytes) -> int:
        left[0] -= 1
        if left[0] <= 0:
            real(descriptor, content[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(WorkError, match="disk full at"):
            run(tmp_path, Stub(), Stub())
    assert repr(run(tmp_path, Stub(), Stub())[0]) == repr(quiet[0])
    assert sorted(done_and_doubted(tmp_path)[0]) == quiet[1]


def test_a_pair_the_reviewer_cannot_judge_fails_alone(tmp_path: Path) -> None:
    class Short(Stub):
        def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
            if any(request.task.instruction == SEEDS[3].instruction for request in requests):
                raise EngineError("too long")
            self.asked += [request.task.instruction for request in requests]
            return [Score(log_probabilities=(-9.0, -1.0), prompt_tokens=5) for _ in requests]

    judge = Short()
    rows, log = run(tmp_path, Stub(batch=99), judge, verdict="likelihood")
    failed = [row for row in rows if row["detail"] == "too long"]
    assert failed
    assert {row["seed_id"] for row in failed} == {SEEDS[3].id}
    assert all(row["status"] == Status.FAILED and not row["parent_id"] for row in failed)
    assert log.usage().total("reviewer").calls == len(judge.asked) + len(failed)
    again = Short()
    assert repr(run(tmp_path, Stub(), again, verdict="likelihood")[0]) == repr(rows)
    assert again.asked == []


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_reviewer_that_refuses_to_generate_ends_the_unit_and_it_goes_on_after(
    tmp_path: Path, quiet: tuple[list[Row], list[str]], is_shared: bool
) -> None:
    """The refusal may be of any request in flight; the others are still on their way."""

    class Refusing(Stub):
        def step(self) -> list[Completion]:
            if self._pending[0].task.kind == "judge" and len(self.batches) > 3:
                self._pending.pop()
                raise EngineError("refuses the key (403)")
            return Stub.step(self)

    expert, judge = share_engine(Refusing()) if is_shared else (Stub(), Refusing(batch=1))
    with pytest.raises(EngineError, match="refuses the key"):
        run(tmp_path, expert, judge)
    assert repr(run(tmp_path, Stub(), Stub())[0]) == repr(quiet[0])
    assert sorted(done_and_doubted(tmp_path)[0]) == quiet[1]


def test_a_verdict_that_is_no_number_fails_its_step_in_the_first_run_and_in_a_replay(
    tmp_path: Path,
) -> None:
    class Broken(Stub):
        def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
            self.asked += [request.task.instruction for request in requests]
            sums = [math.nan if text == SEEDS[3].instruction else -9.0 for text in self.asked]
            return [
                Score(log_probabilities=(one, -1.0), prompt_tokens=5)
                for one in sums[-len(requests) :]
            ]

    judge, again = Broken(), Broken()
    rows, _ = run(tmp_path, Stub(batch=99), judge, verdict="likelihood")
    failed = [row for row in rows if row["detail"].startswith("log-probabilities")]
    assert failed
    assert {row["seed_id"] for row in failed} == {SEEDS[3].id}
    assert all(row["status"] == Status.FAILED and not row["parent_id"] for row in failed)
    assert repr(run(tmp_path, Stub(), again, verdict="likelihood")[0]) == repr(rows)
    assert again.asked == []


def test_expert_and_reviewer_may_share_an_engine(
    tmp_path: Path, quiet: tuple[list[Row], list[str]]
) -> None:
    expert, reviewer = share_engine(Stub(batch=2))
    assert repr(run(tmp_path, expert, reviewer)[0]) == repr(quiet[0])
    assert expert.num_pending == reviewer.num_pending == 0
