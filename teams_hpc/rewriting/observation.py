"""What the policy sees: the history of the chain and cheap features of the present instruction."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from teams_hpc.config.policy import ObservationKind
from teams_hpc.rewriting.embedding import EMBEDDING_SCHEMA, InstructionEmbedding
from teams_hpc.rewriting.kinds import CODE_WORDS, FAMILIES, first_family
from teams_hpc.rewriting.operations import OPERATIONS, Operation

_BREADTH = OPERATIONS.index(Operation.BREADTH)
_NUM = len(OPERATIONS)
_NEVER = (0,) * _NUM


class History(NamedTuple):
    """Which operations made the present text.

    Attributes:
        step: Attempted steps so far.
        last: Code of the last operation, -1 before the first.
        counts: How often each operation was chosen.
        since_breadth: The same on the present text: since the last breadth that was kept, which
            started a new one. A breadth tried in vain counts here like any other.
    """

    step: int
    last: int
    counts: tuple[int, ...]
    since_breadth: tuple[int, ...]

    @classmethod
    def start(cls) -> "History":
        return cls(step=0, last=-1, counts=_NEVER, since_breadth=_NEVER)

    def after(self, operation: int, *, is_kept: bool = True) -> "History":
        """The history one step later; `is_kept`: the rewrite is the next step's parent."""
        is_new_text = operation == _BREADTH and is_kept
        return History(
            step=self.step + 1,
            last=operation,
            counts=_one_more(self.counts, operation),
            since_breadth=_NEVER if is_new_text else _one_more(self.since_breadth, operation),
        )


def _one_more(counts: tuple[int, ...], operation: int) -> tuple[int, ...]:
    return (*counts[:operation], counts[operation] + 1, *counts[operation + 1 :])


_STEP_PHRASES = ("step by step", "step-by-step", "numbered step", "show your", "show all",
                 "show each")  # fmt: skip
_DATA_WORDS = frozenset(("json", "table", "csv"))
_LIMIT_WORDS = frozenset(("exactly", "under", "must"))
_LIMIT_PHRASES = ("at most", "at least", "fewer than", "no more than")
_DIGIT = re.compile(r"\d")
_WORDS = re.compile(r"[a-z']+")

HISTORY_NAMES = (
    "step",
    *(f"last_{name}" for name in OPERATIONS),
    *(f"count_{name}" for name in OPERATIONS),
    *(f"since_breadth_{name}" for name in OPERATIONS),
)
FEATURE_NAMES = (
    *HISTORY_NAMES,
    *(f"kind_{name}" for name in FAMILIES),
    "words",
    "question_mark",
    "digits",
    "code",
    "asks_for_steps",
    "data",
    "limits",
    "sentences",
    "input",
)


def observation_size(kind: ObservationKind, embedding_size: int = 0) -> int:
    """Length of an observation; `embedding_size` counts for `embedding` alone."""
    sizes = {
        "features": len(FEATURE_NAMES),
        "one_hot": _NUM,
        "embedding": len(HISTORY_NAMES) + embedding_size,
    }
    return sizes[kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observer:
    """Makes observations of one kind; a pure function of what it is shown.

    Attributes:
        kind: `features`: history and instruction; `one_hot`: the last operation, as published;
            `embedding`: history and where the instruction lies in the instructor's hidden states.
        episode_length: Scale for counts and steps.
        embedding: For `embedding`.
    """

    kind: ObservationKind
    episode_length: int
    embedding: InstructionEmbedding | None = None

    @property
    def size(self) -> int:
        """Length of an observation."""
        return observation_size(self.kind, self.embedding.size if self.embedding else 0)

    def metadata(self) -> dict[str, str]:
        """What a policy file says of the observations its policy takes."""
        if self.embedding is None:
            return {"observation": self.kind}
        return {
            "observation": self.kind,
            "embedding_schema": str(EMBEDDING_SCHEMA),
            "embedding_size": str(self.embedding.size),
            "embedding_model": self.embedding.content_id,
        }

    def observe(self, instruction: str, input_text: str, history: History) -> NDArray[np.float32]:
        """What the policy sees before it chooses, (n,), each number between -1 and 1."""
        if self.kind != "embedding":
            return observe(self.kind, instruction, input_text, history, self.episode_length)
        assert self.embedding is not None
        seen = _history_features(history, self.episode_length)
        return np.concatenate([np.array(seen, dtype=np.float32), self.embedding.of(instruction)])


def observe(
    kind: ObservationKind, instruction: str, input_text: str, history: History, episode_length: int
) -> NDArray[np.float32]:
    """What a policy without embedding sees, (n,), each number between 0 and 1.

    Args:
        kind: `features` or `one_hot`.
        instruction: The present text.
        input_text: The input that belongs to it.
        history: Of the chain.
        episode_length: Scale for counts and steps.
    """
    if kind == "one_hot":
        return np.array(_last(history), dtype=np.float32)
    values = [
        *_history_features(history, episode_length),
        *_kind(instruction),
        *_text_features(instruction, input_text),
    ]
    return np.array(values, dtype=np.float32)


def _last(history: History) -> list[float]:
    return [float(code == history.last) for code in range(_NUM)]


def _history_features(history: History, episode_length: int) -> list[float]:
    return [
        min(1.0, history.step / episode_length),
        *_last(history),
        *(min(1.0, n / episode_length) for n in history.counts),
        *(min(1.0, float(n)) for n in history.since_breadth),
    ]


def _kind(instruction: str) -> list[float]:
    """One for the family of the first telling word."""
    found = first_family(instruction)
    return [float(name == found) for name in FAMILIES]


def _text_features(instruction: str, input_text: str) -> list[float]:
    # Sets and plain searches: patterns of alternatives were twenty times slower.
    low = instruction.lower()
    words = set(_WORDS.findall(low))
    return [
        _log_count(instruction),
        float("?" in low),
        float(_DIGIT.search(low) is not None),
        float(not words.isdisjoint(CODE_WORDS) or _has_any(low, "{};=")),
        float("steps" in words or _has_any(low, _STEP_PHRASES)),
        float(not words.isdisjoint(_DATA_WORDS) or _has_any(low, ("```", "{", "|"))),
        float(not words.isdisjoint(_LIMIT_WORDS) or _has_any(low, _LIMIT_PHRASES)),
        min(1.0, (low.count(".") + low.count("?")) / 6.0),
        _log_count(input_text),
    ]


def _has_any(text: str, parts: Iterable[str]) -> bool:
    return any(part in text for part in parts)


def _log_count(text: str) -> float:
    """Number of words, 1 from some 400 on."""
    return min(1.0, math.log1p(len(text.split())) / 6.0)
