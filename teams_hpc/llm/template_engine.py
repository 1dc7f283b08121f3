"""An engine without a model: a deterministic grammar that rewrites, judges and answers.

It reads `Request.task` alone and is exact. To give every elimination rule something to do, a few
of its replies are faulty on purpose, keyed by the request's seed: about 1 % of rewrites copy a
phrase of the rewriting prompt, 2.5 % of answers are refusals and 1 % say nothing.
"""

import math
from collections.abc import Sequence

from teams_hpc.config.schema import TemplateEngineConfig
from teams_hpc.llm.base import Completion, Exactness, Request, Score, ScoreRequest
from teams_hpc.llm.grammar.answer_phrases import EMPTY, REFUSALS
from teams_hpc.llm.grammar.answers import answer
from teams_hpc.llm.grammar.courtesies import COPIED
from teams_hpc.llm.grammar.judge import p_not_equal
from teams_hpc.llm.grammar.slots import Draws, Slots
from teams_hpc.llm.grammar.topics import topics
from teams_hpc.llm.grammar.world import read, rewrite

GRAMMAR_SCHEMA = 2
"""Part of the engine's identity: raise it when any output changes."""

_PER_MILLE_COPIED = 10
_PER_MILLE_REFUSED = 25
_PER_MILLE_EMPTY = 10


class TemplateEngine:
    """The grammar behind the engine protocol; see `llm.base.Engine`."""

    def __init__(self, config: TemplateEngineConfig) -> None:
        self._max_tokens = config.max_tokens
        self._pending: list[Request] = []

    @property
    def content_id(self) -> str:
        return f"template:{GRAMMAR_SCHEMA}"

    @property
    def exactness(self) -> Exactness:
        return "exact"

    @property
    def is_model(self) -> bool:
        return False

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def add(self, request: Request) -> None:
        self._pending.append(request)

    def step(self) -> list[Completion]:
        """Complete all that is pending; a token here is a word."""
        pending, self._pending = self._pending, []
        return [self._complete(request) for request in pending]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Log-probabilities of the options Equal and Not Equal, whatever their order."""
        return [_score(request) for request in requests]

    def close(self) -> None:
        """Nothing to free."""

    def _complete(self, request: Request) -> Completion:
        words = _reply(request).split(" ")
        is_cut_off = len(words) > self._max_tokens
        return Completion(
            id=request.id,
            text=" ".join(words[: self._max_tokens]),
            finish_reason="length" if is_cut_off else "stop",
            prompt_tokens=sum(message.content.count(" ") + 1 for message in request.messages),
            completion_tokens=min(len(words), self._max_tokens),
        )


def _reply(request: Request) -> str:
    task = request.task
    if task.kind == "judge":
        return "Not Equal" if p_not_equal(task.instruction, task.other) > 0.5 else "Equal"
    chance = Draws(request.seed, "fault").below(1000)
    if task.kind == "rewrite":
        text = rewrite(task.operation, task.instruction, request.seed)
        return COPIED.format(text=text) if chance < _PER_MILLE_COPIED else text
    if chance < _PER_MILLE_REFUSED:
        draws = Draws(request.seed, "refusal")
        return Slots(draws, topics(read(task.instruction).core)).fill(draws.of(REFUSALS))
    if chance < _PER_MILLE_REFUSED + _PER_MILLE_EMPTY:
        return Draws(request.seed, "empty").of(EMPTY)
    return answer(task.instruction, task.input, request.seed)


def _score(request: ScoreRequest) -> Score:
    p = p_not_equal(request.task.instruction, request.task.other)
    by_option = {"equal": math.log(1.0 - p), "not equal": math.log(p)}
    return Score(
        log_probabilities=tuple(by_option[option.casefold()] for option in request.options),
        prompt_tokens=sum(message.content.count(" ") + 1 for message in request.messages),
    )
