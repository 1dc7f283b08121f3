"""Engines as a unit sees them: every call is journalled, and durable ones are not made again.

An iteration of a unit is: `step` (completions), `judge` (verdicts on the rewrites among them),
`add` (what the chains want next). What an engine returned is committed together with the intents
to send what follows, before that is sent: one fsync for each batch. A replay hands out the same
batches in the same order, so chains, and the order of what is pending, come to the same state.

What that gives, by engine: with `batching: fixed` batches are formed here, from the pending
requests in order, and each is waited for as a whole, so that a replay re-forms the very batches of
the first run; with `refill` and with a served model a replay is exact as far as the journal goes,
and what is asked anew may be batched otherwise.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from teams_hpc.config.schema import EngineConfig, ReviewerConfig, TransformersEngineConfig
from teams_hpc.errors import CorruptFileError, EngineError
from teams_hpc.generation.unit_log import UnitLog
from teams_hpc.llm.base import Completion, Engine, Request
from teams_hpc.llm.ledger import Ledger
from teams_hpc.rewriting.identity import length_prefixed
from teams_hpc.rewriting.operations import PROMPT_SCHEMA
from teams_hpc.rewriting.reviewer import Pair, Reviewer, Verdict
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.journal import Batch, Result, Tokens

_DIGEST_BYTES = 16
_COMPLETION_VALUES = Completion._fields[1:-1]  # all but the id, and `lost`, which a batch sums up


class ClaimLost(Exception):
    """Another process took this unit over; what it publishes counts. Never leaves the worker."""


def _hash(start: Any, *parts: str | int) -> str:
    state = start.copy()
    state.update(length_prefixed(parts))
    return str(state.hexdigest())


@dataclass(slots=True)
class CallDigests:
    """Digest of all that decides a call's result: model, sampling, prompt, sampler seed."""

    _expert: Any
    _reviewer: Any

    @classmethod
    def make(
        cls, expert: Engine, config: EngineConfig, reviewer: Reviewer, judging: ReviewerConfig
    ) -> "CallDigests":
        parts = {"max_tokens", "temperature", "top_p", "verdict"}
        keys = [
            f"{engine.content_id} {PROMPT_SCHEMA} {settings.model_dump_json(include=parts)}"
            for engine, settings in ((expert, config), (reviewer.engine, judging))
        ]
        states = [hashlib.blake2b(key.encode(), digest_size=_DIGEST_BYTES) for key in keys]
        return cls(*states)

    def of_request(self, request: Request) -> str:
        texts = chain.from_iterable(request.messages)
        return _hash(self._expert, request.seed, request.task.operation, *texts)

    def of_pair(self, pair: Pair) -> str:
        texts = (pair.before, pair.before_input, pair.after, pair.after_input)
        return _hash(self._reviewer, pair.seed, *texts)


def fixed_batch_size(config: EngineConfig) -> int | None:
    """Requests of a batch where batches must depend on the unit alone, else None."""
    if isinstance(config, TransformersEngineConfig) and config.batching == "fixed":
        return config.batch_size
    return None


@dataclass(slots=True, kw_only=True)
class Calls:
    """The calls of one unit.

    Args:
        log: What is durable, and where to write.
        expert: Rewrites and answers.
        reviewer: Judges; its ledger is used to tell what a batch cost.
        digests: From `CallDigests.make`.
        batch_size: From `fixed_batch_size`.
        check_claim: Called before anything is sent; raises `ClaimLost`.
    """

    log: UnitLog
    expert: Engine
    reviewer: Reviewer
    digests: CallDigests
    batch_size: int | None
    check_claim: Callable[[], None]
    _pending: dict[str, Request] = field(default_factory=dict)
    _in_flight: set[str] = field(default_factory=set)
    _uncommitted: Batch | None = None

    @property
    def num_pending(self) -> int:
        """Requests added whose completions `step` has not returned."""
        return len(self._pending)

    def add(self, request: Request) -> None:
        """Take a request in; it is sent by the next `step`."""
        self._pending[request.id] = request

    def step(self) -> list[Completion]:
        """The next completions: from the journal, or from the engine.

        Raises:
            CorruptFileError: The journal answers something that was not asked.
            ClaimLost: The unit is another's now.
            WorkError: The disk is full.
        """
        if self.log.is_replaying:
            return self._replay_completions(self.log.next_batch())
        unsent = [key for key in self._pending if key not in self._in_flight]
        if self.batch_size is not None:
            # Prompts of like length make the best batch; nothing but what is pending decides it.
            unsent = sorted(unsent, key=self._by_length)[: self.batch_size]
        self._send(unsent)
        return self._receive(unsent)

    def _by_length(self, key: str) -> tuple[int, str]:
        return sum(len(message.content) for message in self._pending[key].messages), key

    def _send(self, keys: Sequence[str]) -> None:
        if keys:
            self._announce("expert", keys)
        else:
            self.flush()
        for key in keys:
            self.expert.add(self._pending[key])
            self._in_flight.add(key)

    def _receive(self, sent: Sequence[str]) -> list[Completion]:
        completions = self._step_engine()
        if self.batch_size is not None:
            while self._in_flight - {completion.id for completion in completions}:
                completions += self._step_engine()
            place = {key: number for number, key in enumerate(sent)}
            completions.sort(key=lambda completion: place[completion.id])
        results = []
        for completion in completions:
            self._in_flight.discard(completion.id)
            digest = self.digests.of_request(self._pending.pop(completion.id))
            value = dict(zip(_COMPLETION_VALUES, completion[1:-1], strict=True))
            results.append(Result(completion.id, digest, value))
        tokens = Tokens(
            calls=len(completions),
            prompt_tokens=sum(completion.prompt_tokens for completion in completions),
            completion_tokens=sum(completion.completion_tokens for completion in completions),
            lost=sum(completion.lost for completion in completions),
        )
        self._uncommitted = Batch(role="expert", results=tuple(results), tokens=tokens)
        return completions

    def _step_engine(self) -> list[Completion]:
        """One step; what the engine was asked by others is passed over."""
        return [one for one in self.expert.step() if one.id in self._in_flight]

    def _replay_completions(self, batch: Batch) -> list[Completion]:
        completions = []
        for result in batch.results:
            request = self._pending.pop(result.key, None)
            if request is None or batch.role != "expert":
                raise self._strange(batch, result.key, "was not asked for")
            if result.digest != self.digests.of_request(request):
                raise self._strange(batch, result.key, "answers another model, prompt or sampling")
            completions.append(Completion(id=result.key, **result.value))
        return completions

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Verdicts on pairs, in order, in one batch: from the journal, or from the reviewer.

        Raises:
            As `step`.
            EngineError: As `_ask_reviewer`.
        """
        if not pairs:
            return []
        if self.log.is_replaying:
            return self._replay_verdicts(self.log.next_batch(), pairs)
        self._announce("reviewer", [pair.request_id for pair in pairs])
        self.reviewer.ledger = Ledger()
        judged = self._ask_reviewer(pairs)
        results = tuple(
            Result(pair.request_id, self.digests.of_pair(pair), verdict)
            for pair, verdict in zip(pairs, judged, strict=True)
        )
        spent = self.reviewer.ledger.total("reviewer")
        tokens = Tokens(
            calls=len(judged),
            prompt_tokens=spent.prompt_tokens,
            completion_tokens=spent.completion_tokens,
            lost=spent.in_doubt,
        )
        self._uncommitted = Batch(role="reviewer", results=results, tokens=tokens)
        return judged

    def _ask_reviewer(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One batch; if that fails, one by one, so that what one prompt is to blame for ends it.

        An engine that generates fails as a whole, or says so in a completion; and others of its
        requests, maybe the expert's, may be in flight or lost.

        Raises:
            EngineError: The reviewer generates its verdicts, and its engine failed.
        """
        try:
            return self.reviewer.judge(pairs)
        except EngineError as error:
            if self.reviewer.verdict == "generated":
                raise
            if len(pairs) == 1:
                return [Verdict(0.0, False, str(error))]
        return [one for pair in pairs for one in self._ask_reviewer([pair])]

    def _replay_verdicts(self, batch: Batch, pairs: Sequence[Pair]) -> list[Verdict]:
        keys = [pair.request_id for pair in pairs]
        if batch.role != "reviewer" or [result.key for result in batch.results] != keys:
            raise self._strange(batch, keys[0], "is not the verdict expected here")
        for result, pair in zip(batch.results, pairs, strict=True):
            if result.digest != self.digests.of_pair(pair):
                raise self._strange(batch, result.key, "judges another model, prompt or sampling")
        return [Verdict(*result.value) for result in batch.results]

    def _strange(self, batch: Batch, key: str, what: str) -> CorruptFileError:
        path = self.log.folder / batch.source
        return CorruptFileError(
            f"{path}: the result of call {key} {what}; made by other models or another version of "
            "this program? Run again with --rerun-from generate"
        )

    def _announce(self, role: str, keys: Sequence[str]) -> None:
        """Make durable that these are about to be sent, while the unit is still ours."""
        self.check_claim()
        self._commit(role, keys)
        self.check_claim()  # an fsync can take long enough for another to have thought us gone

    def _commit(self, role: str, keys: Sequence[str]) -> None:
        if self._uncommitted is not None or keys:
            self.log.commit(self._uncommitted, {role: keys})
            self._uncommitted = None

    def flush(self) -> None:
        """Make durable what was received last."""
        self._commit("expert", ())

    def drain(self, take: Callable[[list[Completion]], None], seconds: float) -> None:
        """Wait for what is in flight, send nothing more, and make all durable.

        Args:
            take: What to do with completions, as after `step`.
            seconds: How long to wait; what isn't there by then is in doubt.
        """
        deadline = time.monotonic() + seconds
        while self._in_flight and time.monotonic() < deadline:
            self.flush()
            take(self._receive(()))
        self.flush()

    def abandon(self, stop: StopFlag) -> None:
        """Let the engine finish what was sent: the unit may come back, with the same request ids.

        Args:
            stop: Looked at between steps; the engine is not used any more once it is set.
        """
        while self.expert.num_pending and not stop.is_set:
            self.expert.step()
