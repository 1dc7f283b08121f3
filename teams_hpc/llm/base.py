"""The one protocol all engines speak.

A caller adds requests, calls `step` and receives completions as they finish; it keeps many
independent chains in flight and hands in a chain's next request as soon as its last one is done.
`score` judges given answers by their likelihood.

Exactness: an engine says whether the same request always gives the same completion, whatever it is
batched with (`exact`), or only in distribution (`statistical`).

What goes in and out are named tuples: some twenty are made for each row.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

RoleName = Literal["instructor", "reviewer", "expert"]
Exactness = Literal["exact", "statistical"]
FinishReason = Literal["stop", "length", "error"]


class Message(NamedTuple):
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


class Task(NamedTuple):
    """What a prompt asks for, in structured form, for the engine that has no model.

    Model engines read `Request.messages` alone; the template grammar reads this alone.

    Attributes:
        kind: rewrite an instruction, judge two of them, or answer one.
        instruction: The instruction to rewrite or answer; for `judge` the earlier one.
        input: The input that belongs to it, or an empty string.
        operation: For `rewrite`, the name of the operation.
        other: For `judge`, the later instruction.
    """

    kind: Literal["rewrite", "judge", "answer"]
    instruction: str
    input: str = ""
    operation: str = ""
    other: str = ""


class Request(NamedTuple):
    """One completion to make.

    Attributes:
        id: Unique among requests in flight; keys nothing but the reply.
        messages: The chat so far; the last message is the user's.
        task: The same, structured.
        seed: 63-bit sampler seed that belongs to this request alone, so that sampling doesn't
            depend on what else is in the batch.
    """

    id: str
    messages: tuple[Message, ...]
    task: Task
    seed: int


class Completion(NamedTuple):
    """What came back for the request with this id.

    `finish_reason` is `length` if it was cut off at `max_tokens`, `error` if the engine gave up on
    this request (then `error` says why and `text` is empty; other requests are not affected).

    `lost` are further tries of this call that the server may have worked on, though no usable reply
    came. The call itself counts as one, with an error too: so it was, or may have been, made
    `1 + lost` times, and a call that ended with its only lost try has none.
    """

    id: str
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    error: str = ""
    lost: int = 0


class ScoreRequest(NamedTuple):
    """Score every option as the assistant's whole reply to `messages`."""

    messages: tuple[Message, ...]
    task: Task
    options: tuple[str, ...]


class Score(NamedTuple):
    """Sum of token log-probabilities (nats) of each option, end-of-turn token included."""

    log_probabilities: tuple[float, ...]
    prompt_tokens: int


class Engine(Protocol):
    """A model that completes and scores. Not thread-safe; one caller each."""

    @property
    def content_id(self) -> str:
        """Identity of the model: equal ids give equal completions as far as `exactness` goes."""
        ...

    @property
    def exactness(self) -> Exactness: ...

    @property
    def is_model(self) -> bool:
        """False for the template grammar: reports must not call it a model."""
        ...

    @property
    def num_pending(self) -> int:
        """Requests added whose completions `step` has not returned yet."""
        ...

    def add(self, request: Request) -> None:
        """Queue a request."""
        ...

    def step(self) -> list[Completion]:
        """Work until at least one request is done (if any is pending) and return what is done."""
        ...

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Score options by likelihood, in the order given.

        Raises:
            EngineError: This engine can't score (the HTTP chat protocol has no way to).
        """
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


class EmbeddingEngine(Engine, Protocol):
    """An engine that also shows its model's hidden states."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Mean over tokens of the last layer's hidden states, (texts, width).

        Each text is on its own: what else is asked for never changes it.
        """
        ...


def complete_all(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Complete a batch and return completions in the order of `requests`."""
    for request in requests:
        engine.add(request)
    done: dict[str, Completion] = {}
    while len(done) < len(requests):
        done.update((completion.id, completion) for completion in engine.step())
    return [done[request.id] for request in requests]
