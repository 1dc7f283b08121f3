"""The grammar: readable, exact, and a world whose best policy is known."""

import random
from collections.abc import Callable
from functools import cache

import pytest

from teams_hpc.config import TemplateEngineConfig
from teams_hpc.llm.base import ScoreRequest, Task, complete_all
from teams_hpc.llm.grammar.judge import p_not_equal
from teams_hpc.llm.grammar.world import FRUITFUL, applied, instruction_kind, is_fruitful, rewrite
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.template_engine import TemplateEngine
from teams_hpc.rewriting.elimination import Reason, check_answer, check_rewrite
from teams_hpc.rewriting.operations import (
    OPERATIONS,
    Operation,
    answer_request,
    has_length_rule,
    keeps_length_rule,
    rewrite_request,
)
from teams_hpc.rewriting.reviewer import Pair, Reviewer, sanity_accuracy
from teams_hpc.rewriting.seeds import read_seeds

STEPS = 6
SEEDS = [seed.instruction for seed in read_seeds(None, None).seeds]


def walk(instruction: str, rng: random.Random) -> list[tuple[str, str, str, bool]]:
    """A random chain; each entry is (before, operation, after, fruitful)."""
    text, steps = instruction, []
    for _ in range(STEPS):
        operation = str(rng.choice(OPERATIONS))
        after = rewrite(operation, text, rng.getrandbits(60))
        steps.append((text, operation, after, is_fruitful(operation, text)))
        text = after
    return steps


def all_steps() -> list[tuple[str, str, str, bool]]:
    rng = random.Random(1)
    return [step for instruction in SEEDS for step in walk(instruction, rng)]


def test_the_judge_agrees_with_the_grammar_on_its_own_rewrites() -> None:
    steps = all_steps()
    agreed = sum((p_not_equal(a, b) > 0.5) == fruitful for a, _, b, fruitful in steps)
    assert agreed / len(steps) > 0.99


def test_rewrites_differ_keep_the_length_rule_and_add_what_they_claim() -> None:
    kept = []
    for before, operation, after, fruitful in all_steps():
        assert after != before
        assert "{" not in after.replace('{"', "") or "{" in before
        if not fruitful:
            assert applied(after) == applied(before)
            assert instruction_kind(after) == instruction_kind(before)
        elif operation == "breadth":
            assert applied(after) == frozenset()
        else:
            assert applied(after) == applied(before) | {operation}
            assert instruction_kind(after) == instruction_kind(before)
            if has_length_rule(Operation(operation)):
                kept.append(keeps_length_rule(Operation(operation), before, after))
    assert sum(map(bool, kept)) / len(kept) > 0.8


def test_every_kind_occurs_among_the_shipped_seeds() -> None:
    assert {instruction_kind(text) for text in SEEDS} == set(FRUITFUL)


@cache
def best(kind: str, done: frozenset[str], left: int) -> int:
    """Most fruitful steps that any policy can take."""
    if left == 0:
        return 0
    values = [best(kind, done, left - 1)]
    values += [1 + best(kind, done | {name}, left - 1) for name in FRUITFUL[kind] - done]
    if len(done) >= 2:
        values.append(1 + best(kind, frozenset(), left - 1))
    return max(values)


def mean_fruitful(choose: Callable[[int], float | str], kind: str) -> float:
    """Expected fruitful steps of a policy that looks at the step alone, or of a random one."""

    def value(done: frozenset[str], step: int) -> float:
        if step == STEPS:
            return 0.0
        chosen = choose(step)
        names = [str(name) for name in OPERATIONS] if isinstance(chosen, float) else [chosen]
        total = 0.0
        for name in names:
            if name == "breadth":
                gain, after = (1, frozenset()) if len(done) >= 2 else (0, done)
            else:
                gain = int(name in FRUITFUL[kind] - done)
                after = done | {name} if gain else done
            total += gain + value(after, step + 1)
        return total / len(names)

    return value(frozenset(), 0)


def test_simple_policies_reach_at_most_three_quarters_of_the_best() -> None:
    kinds = sorted(FRUITFUL)
    optimum = sum(best(kind, frozenset(), STEPS) for kind in kinds) / len(kinds)
    assert optimum == STEPS
    simple = {
        "random": lambda step: 0.0,
        "round robin": lambda step: str(OPERATIONS[step]),
        **{str(name): (lambda step, name=str(name): name) for name in OPERATIONS},
    }
    for name, choose in simple.items():
        reached = sum(mean_fruitful(choose, kind) for kind in kinds) / len(kinds)
        assert reached <= 0.75 * optimum, name


def test_the_world_is_what_the_search_believes() -> None:
    """Playing the search's rules on real texts: the same steps are fruitful."""
    rng = random.Random(3)
    for instruction in SEEDS[:60]:
        kind, done = instruction_kind(instruction), frozenset[str]()
        for before, operation, _, fruitful in walk(instruction, rng):
            if applied(before) != done or instruction_kind(before) != kind:
                break
            if operation == "breadth":
                assert fruitful == (len(done) >= 2)
                done = frozenset() if fruitful else done
            else:
                assert fruitful == (operation in FRUITFUL[kind] - done)
                done = done | {operation} if fruitful else done


def test_the_engine_is_exact_and_feeds_every_rule() -> None:
    requests = [
        rewrite_request(OPERATIONS[i % 6], SEEDS[i % len(SEEDS)], "", request_id=f"r{i}", seed=i)
        for i in range(2000)
    ]
    answers = [
        answer_request(SEEDS[i % len(SEEDS)], "", request_id=f"a{i}", seed=i) for i in range(2000)
    ]
    engine = TemplateEngine(TemplateEngineConfig())
    first = complete_all(engine, [*requests, *answers])
    again = complete_all(TemplateEngine(TemplateEngineConfig()), [*answers, *requests][::-1])
    assert sorted(first, key=lambda c: c.id) == sorted(again, key=lambda c: c.id)
    reasons = [
        check_rewrite(
            Operation(request.task.operation),
            request.task.instruction,
            completion.text,
            completion,
            max_words=2048,
        )
        for request, completion in zip(requests, first, strict=False)
    ]
    assert 5 <= reasons.count(Reason.COPIED_PROMPT) <= 60
    verdicts = [check_answer(completion) for completion in first[len(requests) :]]
    assert 20 <= verdicts.count(Reason.REFUSAL) <= 100
    assert 5 <= verdicts.count(Reason.EMPTY_ANSWER) <= 50


def test_a_reply_over_max_tokens_is_cut_off() -> None:
    engine = TemplateEngine(TemplateEngineConfig(max_tokens=5))
    (completion,) = complete_all(engine, [answer_request(SEEDS[0], "", request_id="a", seed=3)])
    assert completion.finish_reason == "length"
    assert completion.completion_tokens == len(completion.text.split(" ")) == 5


def test_scores_follow_the_options_order() -> None:
    engine = TemplateEngine(TemplateEngineConfig())
    task = Task(kind="judge", instruction=SEEDS[0], other=SEEDS[1])
    scores = [
        engine.score([ScoreRequest(messages=(), task=task, options=options)])[0]
        for options in (("Equal", "Not Equal"), ("Not Equal", "Equal"))
    ]
    assert scores[0].log_probabilities == scores[1].log_probabilities[::-1]
    assert scores[0].log_probabilities[1] > scores[0].log_probabilities[0]


@pytest.mark.parametrize("verdict", ["likelihood", "generated"])
def test_the_methods_own_example_is_judged_not_equal(verdict: str) -> None:
    engine = TemplateEngine(TemplateEngineConfig())
    ledger = Ledger()
    reviewer = Reviewer(engine, verdict, ledger)  # type: ignore[arg-type]
    pair = Pair(
        before="What is the process of photosynthesis?",
        after="What is the process of photosynthesis, and how do light intensity and temperature "
        "affect its rate in aquatic plants?",
    )
    assert reviewer.judge([pair])[0].p_not_equal > 0.5
    assert sanity_accuracy(reviewer) == 1.0
    assert ledger.total("reviewer").calls == 21
