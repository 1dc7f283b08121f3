"""An engine that goes on while its caller journals: only when it is full, and nothing gets lost."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from teams_hpc.config import Config
from teams_hpc.errors import EngineError
from teams_hpc.generation import equipment
from teams_hpc.generation.engine_ahead import EngineAhead
from teams_hpc.llm.base import Completion, Engine, Message, Request, Score, ScoreRequest, Task
from teams_hpc.storage.run_dir import RunDir


@dataclass(slots=True)
class Gated:
    """Completes up to four requests a step, and says which thread it ran in."""

    fails_at: int = -1
    gate: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(1000))
    batches: list[list[str]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    is_closed: bool = False
    content_id: str = "gated"
    exactness: str = "exact"
    is_model: bool = False
    _pending: list[str] = field(default_factory=list)

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def add(self, request: Request) -> None:
        self.threads.add(threading.get_ident())
        self._pending.append(request.id)

    def step(self) -> list[Completion]:
        assert self.gate.acquire(timeout=10)
        self.threads.add(threading.get_ident())
        if len(self.batches) == self.fails_at:
            raise EngineError("no GPU")
        done, self._pending = self._pending[:4], self._pending[4:]
        self.batches.append(done)
        return [
            Completion(id=one, text=one, finish_reason="stop", prompt_tokens=1, completion_tokens=1)
            for one in done
        ]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        self.threads.add(threading.get_ident())
        return [Score(log_probabilities=(-1.0,), prompt_tokens=1) for _ in requests]

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def engine() -> Gated:
    return Gated()


def add(ahead: EngineAhead, *numbers: int) -> None:
    task = Task(kind="answer", instruction="x")
    for number in numbers:
        messages = (Message(role="user", content="x"),)
        ahead.add(Request(id=str(number), messages=messages, task=task, seed=1))


def ids(completions: Sequence[Completion]) -> list[int]:
    return [int(one.id) for one in completions]


def settle(ahead: EngineAhead) -> None:
    """Wait for steps that have begun early."""
    with ahead._changed:
        assert ahead._changed.wait_for(lambda: not ahead._is_running, timeout=10)


def test_steps_begin_early_as_long_as_the_engine_is_full(engine: Gated) -> None:
    ahead = EngineAhead(engine, 4)
    add(ahead, *range(10))
    assert ids(ahead.step()) == [0, 1, 2, 3]
    settle(ahead)
    assert engine.batches == [["0", "1", "2", "3"], ["4", "5", "6", "7"]]  # not 8 and 9 alone
    add(ahead, 10, 11)
    assert ahead.num_pending == 8
    assert ids(ahead.step()) == [4, 5, 6, 7]
    assert ids(ahead.step()) == [8, 9, 10, 11]
    assert ahead.num_pending == 0
    ahead.close()
    assert engine.threads.isdisjoint({threading.get_ident()})
    assert len(engine.threads) == 1


def test_it_does_not_run_far_ahead(engine: Gated) -> None:
    ahead = EngineAhead(engine, 4)
    add(ahead, *range(40))
    ahead.step()
    settle(ahead)
    assert len(engine.batches) == 3
    found = [number for _ in range(9) for number in ids(ahead.step())]
    assert found == list(range(4, 40))
    ahead.close()


def test_an_error_reaches_the_caller_in_its_turn(engine: Gated) -> None:
    engine.fails_at = 1
    ahead = EngineAhead(engine, 4)
    add(ahead, *range(12))
    assert ids(ahead.step()) == [0, 1, 2, 3]
    settle(ahead)
    with pytest.raises(EngineError, match="no GPU"):
        ahead.step()
    ahead.close()


def test_closing_waits_for_one_step_and_no_more(engine: Gated) -> None:
    engine.gate = threading.Semaphore(1)
    ahead = EngineAhead(engine, 4)
    add(ahead, *range(40))
    ahead.step()
    threading.Timer(0.2, engine.gate.release).start()
    ahead.close()
    assert engine.is_closed
    assert len(engine.batches) == 2


def test_scores_are_made_between_steps(engine: Gated) -> None:
    ahead = EngineAhead(engine, 4)
    add(ahead, *range(8))
    ahead.step()
    task = Task(kind="judge", instruction="x")
    assert len(ahead.score([ScoreRequest(messages=(), task=task, options=("a",))])) == 1
    assert len(engine.threads) == 1
    ahead.close()


@pytest.mark.parametrize(
    ("batching", "is_shared", "is_ahead"),
    [("refill", False, True), ("refill", True, False), ("fixed", False, False)],
)
def test_only_batches_that_may_change_are_formed_early(
    batching: str, is_shared: bool, is_ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate(
        {
            "name": "t",
            "expert": {"kind": "transformers", "model": "m", "batching": batching},
            "reviewer": {"kind": "template"},
            "generate": {"policy": "uniform"},
        }
    )
    first = Gated()
    engines: list[Engine] = [first, first if is_shared else Gated()]  # type: ignore[list-item]
    monkeypatch.setattr(equipment, "load_engines", lambda *_, **__: engines)
    made = equipment.Equipment.load(RunDir(tmp_path), config)
    assert isinstance(made.expert, EngineAhead) == is_ahead
    made.close()
    assert first.is_closed
