"""One engine for two callers at a time: each gets its own completions, whoever steps the engine.

A reviewer that generates its verdicts waits for them by stepping the engine. Where that is the
expert's engine too (one copy of a model in memory), what it receives may be the expert's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from teams_hpc.llm.base import Completion, Engine, Exactness, Request, Score, ScoreRequest


@dataclass(slots=True, eq=False)
class EnginePort:
    """One caller's side of a shared engine; make them with `share_engine`.

    Args:
        engine: The engine.
        owners: Whose each request in flight is; the same mapping for all ports.
    """

    engine: Engine
    owners: dict[str, "EnginePort"]
    _received: list[Completion] = field(default_factory=list)
    _num_pending: int = 0

    @property
    def content_id(self) -> str:
        return self.engine.content_id

    @property
    def exactness(self) -> Exactness:
        return self.engine.exactness

    @property
    def is_model(self) -> bool:
        return self.engine.is_model

    @property
    def num_pending(self) -> int:
        return self._num_pending

    def add(self, request: Request) -> None:
        self.owners[request.id] = self
        self._num_pending += 1
        self.engine.add(request)

    def step(self) -> list[Completion]:
        while self._num_pending and not self._received:
            for completion in self.engine.step():
                self.owners.pop(completion.id)._received.append(completion)
        completions, self._received = self._received, []
        self._num_pending -= len(completions)
        return completions

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return self.engine.score(requests)

    def close(self) -> None:
        self.engine.close()


def share_engine(engine: Engine) -> tuple[EnginePort, EnginePort]:
    """Two callers' sides of one engine."""
    owners: dict[str, EnginePort] = {}
    return EnginePort(engine, owners), EnginePort(engine, owners)
