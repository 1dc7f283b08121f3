"""The reviewer's verdict on two instructions, and the reward drawn from it."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, NamedTuple

from teams_hpc.errors import EngineError
from teams_hpc.llm.base import (
    Completion,
    Engine,
    Message,
    Request,
    Score,
    ScoreRequest,
    Task,
    complete_all,
)
from teams_hpc.llm.ledger import Ledger
from teams_hpc.rewriting.elimination import copies_prompt, is_unusable, normal_text

OPTIONS = ("Equal", "Not Equal")
NEARLY_SAME = 0.9
"""Jaccard similarity of word 3-grams above which a text repeats an earlier one."""

SANITY_ACCURACY = 0.8
"""Below this a reviewer's judgement is not to be trusted."""


class Pair(NamedTuple):
    """Two instructions to compare; `seed` and `request_id` serve generated verdicts."""

    before: str
    after: str
    before_input: str = ""
    after_input: str = ""
    seed: int = 0
    request_id: str = ""


class Verdict(NamedTuple):
    """What the reviewer says of a pair; journals hold its values in this order.

    Attributes:
        p_not_equal: In [0, 1]; 0 where there is no verdict, which never earns or keeps anything.
        is_parsed: False if a generated answer was neither option, or there was none.
        error: Why the engine gave no verdict at all; empty if it did.
    """

    p_not_equal: float
    is_parsed: bool = True
    error: str = ""


def _with_input(instruction: str, input_text: str) -> str:
    return f"{instruction}\n{input_text}" if input_text else instruction


def verdict_messages(pair: Pair) -> tuple[Message, ...]:
    """What the reviewer is asked about a pair."""
    content = (
        "Do you think that the two instructions below are equal to each other? They are equal if "
        "they have the same constraints and requirements, and the same depth and breadth of "
        "inquiry.\n\n"
        f"First instruction:\n{_with_input(pair.before, pair.before_input)}\n\n"
        f"Second instruction:\n{_with_input(pair.after, pair.after_input)}\n\n"
        "Answer only: Equal or Not Equal."
    )
    return (Message("user", content),)


def _task(pair: Pair) -> Task:
    return Task("judge", pair.before, pair.before_input, other=pair.after)


def softmax_not_equal(equal: float, not_equal: float) -> float:
    """P(Not Equal) from the two sums of log-probabilities, without division by length."""
    difference = equal - not_equal
    if difference > 700.0:
        return 0.0
    return 1.0 / (1.0 + math.exp(difference))


def parse_verdict(text: str) -> Verdict:
    """Read a generated answer as published: exactly one of the options, or else no gain.

    Case, white space and punctuation don't count; any other word or number does.
    """
    answer = " ".join(re.findall(r"\w+", text.casefold()))
    if answer == "not equal":
        return Verdict(p_not_equal=1.0)
    return Verdict(p_not_equal=0.0, is_parsed=answer == "equal")


def _no_verdict(why: str) -> Verdict:
    return Verdict(p_not_equal=0.0, is_parsed=False, error=why or "the reviewer gave no reason")


def _verdict_of_score(score: Score) -> Verdict:
    p = softmax_not_equal(*score.log_probabilities)
    # NaN is below no threshold: it would pass rule 1.
    if math.isnan(p):
        return _no_verdict(f"log-probabilities of the options are {score.log_probabilities}")
    return Verdict(p_not_equal=p)


def _verdict_of_completion(completion: Completion) -> Verdict:
    if completion.finish_reason == "error":
        return _no_verdict(completion.error)
    return parse_verdict(completion.text)


@dataclass(slots=True)
class Reviewer:
    """Judges pairs in batches and counts every call.

    Args:
        engine: Who judges.
        verdict: By likelihood of both options, or by generated text.
        ledger: Where calls are counted, as role `reviewer`.
    """

    engine: Engine
    verdict: Literal["likelihood", "generated"]
    ledger: Ledger

    def judge(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Judge pairs, in order; a pair on which the engine gave up has a verdict with `error`.

        Raises:
            EngineError: The engine can't score, or can't be asked at all.
        """
        if not pairs:
            return []
        return self._score(pairs) if self.verdict == "likelihood" else self._generate(pairs)

    def _score(self, pairs: Sequence[Pair]) -> list[Verdict]:
        requests = [
            ScoreRequest(messages=verdict_messages(pair), task=_task(pair), options=OPTIONS)
            for pair in pairs
        ]
        scores = self.engine.score(requests)
        usage = self.ledger.of("reviewer", self.engine.content_id)
        usage.calls += len(scores)
        usage.prompt_tokens += sum(score.prompt_tokens for score in scores)
        return [_verdict_of_score(score) for score in scores]

    def _generate(self, pairs: Sequence[Pair]) -> list[Verdict]:
        requests = [
            Request(
                id=pair.request_id or str(number),
                messages=verdict_messages(pair),
                task=_task(pair),
                seed=pair.seed,
            )
            for number, pair in enumerate(pairs)
        ]
        completions = complete_all(self.engine, requests)
        self.ledger.of("reviewer", self.engine.content_id).count(completions)
        return [_verdict_of_completion(completion) for completion in completions]


class ZeroReason(StrEnum):
    """Why a rewrite earned nothing."""

    NONE = "none"
    UNUSABLE = "unusable"
    COPIED_PROMPT = "copied_prompt"
    REPEATS_EARLIER = "repeats_earlier"


def zero_reason(
    rewrite: str, earlier: Sequence[str], *, is_cut_off: bool, max_words: int
) -> ZeroReason:
    """Whether a rewrite earns nothing whatever the reviewer says.

    Args:
        rewrite: The cleaned rewrite.
        earlier: Texts of the chain so far, the seed first, its parent last.
        is_cut_off: The completion ended at its token limit.
        max_words: A longer rewrite earns nothing.
    """
    parent = earlier[-1]
    if is_unusable(rewrite, parent, is_cut_off=is_cut_off, max_words=max_words):
        return ZeroReason.UNUSABLE
    if copies_prompt(rewrite, parent):
        return ZeroReason.COPIED_PROMPT
    if any(nearly_same(rewrite, text) for text in earlier[:-1]):
        return ZeroReason.REPEATS_EARLIER
    return ZeroReason.NONE


def nearly_same(first: str, second: str) -> bool:
    """Whether two texts have nearly the same word 3-grams."""
    shingles = [_shingles(normal_text(text).split()) for text in (first, second)]
    union = len(shingles[0] | shingles[1])
    return union == 0 or len(shingles[0] & shingles[1]) / union > NEARLY_SAME


def _shingles(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def reward(
    verdicts: Sequence[Verdict], zero: ZeroReason, kind: Literal["probability", "binary"]
) -> float:
    """The reward of one rewrite, in [0, 1].

    Args:
        verdicts: Against the parent, or against every earlier text: then the smallest counts.
        zero: Why it earns nothing, if it does.
        kind: P(Not Equal) itself, or (as published) 1 above a half and 0 otherwise.
    """
    if zero is not ZeroReason.NONE or not verdicts:
        return 0.0
    smallest = min(verdict.p_not_equal for verdict in verdicts)
    return smallest if kind == "probability" else float(smallest > 0.5)


_SANITY_TEXTS = (
    "Explain why the sky looks blue at noon and red at sunset.",
    "Write a short poem about a lighthouse keeper who misses the city.",
    "List five exercises for a stiff lower back and describe each in one sentence.",
    "Translate the sentence into Spanish: The library closes at eight on Fridays.",
    "What were the main causes of the French Revolution?",
    "Write a Python function that reverses the words of a sentence.",
    "Calculate the compound interest on 2,000 euros at 3 percent over five years.",
    "Plan a week of vegetarian dinners for a family of four.",
    "Summarise the rules of chess for someone who has never played.",
    "Compare electric and diesel buses for a mid-sized city.",
)
SANITY_CALLS = 2 * len(_SANITY_TEXTS)
"""What `sanity_accuracy` asks of the reviewer."""


def sanity_accuracy(reviewer: Reviewer) -> float:
    """Share of plain cases judged right: ten texts with themselves, ten unrelated pairs.

    An answer that is neither option is wrong, whatever the case.

    Raises:
        EngineError: The reviewer gave up on every case.
    """
    count = len(_SANITY_TEXTS)
    same = [Pair(before=text, after=text) for text in _SANITY_TEXTS]
    different = [
        Pair(before=text, after=_SANITY_TEXTS[(number + 1) % count])
        for number, text in enumerate(_SANITY_TEXTS)
    ]
    verdicts = reviewer.judge([*same, *different])
    refuse_if_all_failed(verdicts)
    right = sum(verdict.is_parsed and verdict.p_not_equal < 0.5 for verdict in verdicts[:count])
    right += sum(verdict.p_not_equal >= 0.5 for verdict in verdicts[count:])
    return right / (2 * count)


def refuse_if_all_failed(verdicts: Sequence[Verdict]) -> None:
    """A batch without a single verdict means that the reviewer is out of order.

    Raises:
        EngineError: There are verdicts, and each is an error.
    """
    if verdicts and all(verdict.error for verdict in verdicts):
        raise EngineError(
            f"the reviewer failed on all {len(verdicts)} pairs of a batch: {verdicts[0].error}; "
            "see reviewer.*"
        )
