"""The reviewer: what it asks, counts and believes, and what a broken one leads to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from teams_hpc.config.policy import PolicyConfig
from teams_hpc.config.schema import TemplateEngineConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Completion, Request, Score, ScoreRequest
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.template_engine import TemplateEngine
from teams_hpc.policy.environment import ENGINE_ERROR, Episode, World
from teams_hpc.rewriting.elimination import Reason, check_verdict
from teams_hpc.rewriting.observation import Observer
from teams_hpc.rewriting.reviewer import (
    OPTIONS,
    Pair,
    Reviewer,
    Verdict,
    parse_verdict,
    sanity_accuracy,
)
from teams_hpc.rewriting.seeds import Seed

PAIRS = [
    Pair(before="Sing.", before_input="a verse", after=f"Sing {n}.", request_id=str(n), seed=n)
    for n in range(3)
]


@dataclass
class Judge:
    """An engine that only judges: by a reply (None: it fails) or by two log-probabilities."""

    reply: Callable[[Request], str | None] = lambda request: "Not Equal"
    sums: tuple[float, float] = (-2.0, -1.0)
    lost: int = 0
    asked: list[Request | ScoreRequest] = field(default_factory=list)
    pending: list[Request] = field(default_factory=list)

    content_id = "judge:1"
    exactness = "exact"
    is_model = False

    @property
    def num_pending(self) -> int:
        return len(self.pending)

    def add(self, request: Request) -> None:
        self.asked.append(request)
        self.pending.append(request)

    def step(self) -> list[Completion]:
        request = self.pending.pop()  # the last first: callers may not rely on an order
        text = self.reply(request)
        return [
            Completion(
                id=request.id,
                text=text or "",
                finish_reason="error" if text is None else "stop",
                prompt_tokens=7,
                completion_tokens=2,
                error="no route" if text is None else "",
                lost=self.lost,
            )
        ]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        self.asked += requests
        return [Score(log_probabilities=self.sums, prompt_tokens=7) for _ in requests]

    def close(self) -> None:
        """Nothing to free."""


def reviewer_of(judge: Judge, verdict: str) -> Reviewer:
    return Reviewer(judge, verdict, Ledger())  # type: ignore[arg-type]


@pytest.mark.parametrize(("verdict", "completion_tokens"), [("likelihood", 0), ("generated", 6)])
def test_a_pair_is_one_call_that_shows_both_texts(verdict: str, completion_tokens: int) -> None:
    judge = Judge()
    reviewer = reviewer_of(judge, verdict)
    assert len(reviewer.judge(PAIRS)) == len(judge.asked) == 3
    assert reviewer.ledger.to_json() == [
        {
            "role": "reviewer",
            "model": "judge:1",
            "calls": 3,
            "prompt_tokens": 21,
            "completion_tokens": completion_tokens,
            "in_doubt": 0,
        }
    ]
    for pair, request in zip(PAIRS, judge.asked, strict=True):
        prompt = request.messages[-1].content
        for part in (pair.before, pair.before_input, pair.after, *OPTIONS, "depth and breadth"):
            assert part in prompt
        assert (request.task.kind, request.task.other) == ("judge", pair.after)
    assert reviewer.judge([]) == []


def test_lost_tries_of_verdicts_are_in_doubt() -> None:
    reviewer = reviewer_of(Judge(lost=2), "generated")
    reviewer.judge(PAIRS)
    usage = reviewer.ledger.total("reviewer")
    assert (usage.calls, usage.in_doubt) == (3, 6)


def test_a_likelihood_verdict_does_not_divide_by_length() -> None:
    (verdict,) = reviewer_of(Judge(sums=(-2.0, -1.0)), "likelihood").judge(PAIRS[:1])
    assert verdict.p_not_equal == pytest.approx(math.exp(-1) / (math.exp(-2) + math.exp(-1)))


def test_generated_verdicts_come_back_in_the_order_of_pairs() -> None:
    judge = Judge(reply=lambda request: "Equal" if request.seed == 1 else "not equal.")
    assert [v.p_not_equal for v in reviewer_of(judge, "generated").judge(PAIRS)] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("text", ["Not-Equal", "**Not  Equal**", "not\nequal!", '"Not Equal"'])
def test_punctuation_and_case_do_not_count(text: str) -> None:
    assert parse_verdict(text) == Verdict(p_not_equal=1.0)


@pytest.mark.parametrize("text", ["Equal 2", "не equal", "Equal, not Equal", "unequal", "7", ""])
def test_any_other_word_is_no_verdict(text: str) -> None:
    assert parse_verdict(text) == Verdict(p_not_equal=0.0, is_parsed=False)


@pytest.mark.parametrize("sums", [(math.nan, -1.0), (-math.inf, -math.inf)])
def test_a_score_that_is_no_number_never_passes_rule_1(sums: tuple[float, float]) -> None:
    (verdict,) = reviewer_of(Judge(sums=sums), "likelihood").judge(PAIRS[:1])
    assert verdict.error
    assert check_verdict(verdict.p_not_equal, 0.5) is Reason.EQUAL


def test_a_reviewer_that_always_says_the_same_or_rambles_is_found_out() -> None:
    for reply, accuracy in (("Equal", 0.5), ("Not Equal", 0.5), ("Well, it depends.", 0.0)):
        judge = Judge(reply=lambda request, reply=reply: reply)  # type: ignore[misc]
        assert sanity_accuracy(reviewer_of(judge, "generated")) == accuracy
    with pytest.raises(EngineError, match="no route"):
        sanity_accuracy(reviewer_of(Judge(reply=lambda request: None), "generated"))


def world_of(judge: Judge) -> tuple[World, list[Episode]]:
    world = World(
        settings=PolicyConfig(),
        instructor=TemplateEngine(TemplateEngineConfig()),
        reviewer=reviewer_of(judge, "generated"),
        ledger=Ledger(),
        observer=Observer(kind="features", episode_length=6),
    )
    seeds = [Seed(f"Describe the harbour of town number {n}.") for n in range(4)]
    return world, [Episode.begin((1, "test", n), seed) for n, seed in enumerate(seeds)]


def test_a_pair_without_verdict_earns_nothing_and_says_why() -> None:
    judge = Judge(reply=lambda request: None if "number 2" in request.task.other else "Not Equal")
    world, episodes = world_of(judge)
    outcomes = world.step(episodes, [0] * 4)
    assert [outcome.reward for outcome in outcomes] == [1.0, 1.0, 0.0, 1.0]
    assert outcomes[2].zero == ENGINE_ERROR
    assert outcomes[2].p_not_equal is None
    assert len(episodes[2].texts) == 1


def test_training_stops_where_the_reviewer_answers_nothing() -> None:
    world, episodes = world_of(Judge(reply=lambda request: None))
    with pytest.raises(EngineError, match=r"reviewer failed on all 4 pairs.*no route"):
        world.step(episodes, [0] * 4)
