"""What the policy sees: the history of the chain and cheap features of the present instruction."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from teams_hpc.rewriting.operations import OPERATIONS, Operation

ObservationKind = Literal["features", "one_hot"]

_BREADTH = OPERATIONS.index(Operation.BREADTH)
_NUM = len(OPERATIONS)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
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
        return cls(step=0, last=-1, counts=(0,) * _NUM, since_breadth=(0,) * _NUM)

    def after(self, operation: int, *, is_kept: bool = True) -> "History":
        """The history one step later; `is_kept`: the rewrite is the next step's parent."""
        one_more = tuple(n + (code == operation) for code, n in enumerate(self.counts))
        since = tuple(n + (code == operation) for code, n in enumerate(self.since_breadth))
        return History(
            step=self.step + 1,
            last=operation,
            counts=one_more,
            since_breadth=(0,) * _NUM if operation == _BREADTH and is_kept else since,
        )


# Families of first words; an instruction's first few words tell what kind it is.
_FAMILIES = {
    "question": "what why how who when where which is are do does did can could should would",
    "explain": "explain describe discuss outline define clarify tell state illustrate",
    "write": "write compose draft create invent imagine",
    "list": "list name give suggest recommend plan design organise organize propose arrange",
    "transform": "translate rewrite convert change correct edit paraphrase shorten simplify turn",
    "classify": "classify identify label sort categorise categorize rate extract find decide",
    "compute": "calculate compute solve estimate prove determine evaluate simplify",
    "compare": "compare contrast rank weigh choose",
    "summarise": "summarise summarize condense abstract",
}
_FIRST_WORDS = {
    word: number for number, words in enumerate(_FAMILIES.values()) for word in words.split()
}
_CODE_WORDS = frozenset(
    "function python code sql program script regex bash algorithm class".split()
)
_STEP_PHRASES = ("step by step", "step-by-step", "numbered step", "show your", "show all",
                 "show each")  # fmt: skip
_DATA_WORDS = frozenset(("json", "table", "csv"))
_LIMIT_WORDS = frozenset(("exactly", "under", "must"))
_LIMIT_PHRASES = ("at most", "at least", "fewer than", "no more than")
_DIGIT = re.compile(r"\d")
_WORDS = re.compile(r"[a-z']+")

FEATURE_NAMES = (
    "step",
    *(f"last_{name}" for name in OPERATIONS),
    *(f"count_{name}" for name in OPERATIONS),
    *(f"since_breadth_{name}" for name in OPERATIONS),
    *(f"kind_{name}" for name in _FAMILIES),
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


def observation_size(kind: ObservationKind) -> int:
    """Length of an observation."""
    return len(FEATURE_NAMES) if kind == "features" else _NUM


def observe(
    kind: ObservationKind, instruction: str, input_text: str, history: History, episode_length: int
) -> NDArray[np.float32]:
    """What the policy sees before it chooses, (n,), each number between 0 and 1.

    Args:
        kind: `features`: history and instruction; `one_hot`: the last operation, as published.
        instruction: The present text.
        input_text: The input that belongs to it.
        history: Of the chain.
        episode_length: Scale for counts and steps.
    """
    last = [float(code == history.last) for code in range(_NUM)]
    if kind == "one_hot":
        return np.array(last, dtype=np.float32)
    values = [
        min(1.0, history.step / episode_length),
        *last,
        *(min(1.0, n / episode_length) for n in history.counts),
        *(min(1.0, float(n)) for n in history.since_breadth),
        *_kind(instruction),
        *_text_features(instruction, input_text),
    ]
    return np.array(values, dtype=np.float32)


def _kind(instruction: str) -> list[float]:
    """One for each family whose word stands first among the first eight."""
    found = [0.0] * len(_FAMILIES)
    for word in _WORDS.findall(instruction[:80].lower())[:8]:
        if word in _FIRST_WORDS:
            found[_FIRST_WORDS[word]] = 1.0
            break
    return found


def _text_features(instruction: str, input_text: str) -> list[float]:
    # Sets and plain searches: patterns of alternatives were twenty times slower.
    low = instruction.lower()
    words = set(_WORDS.findall(low))
    return [
        _log_count(instruction),
        float("?" in low),
        float(_DIGIT.search(low) is not None),
        float(not words.isdisjoint(_CODE_WORDS) or _has_any(low, "{};=")),
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
