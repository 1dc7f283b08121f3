"""The grammar: readable, exact, and a world whose best policy is known."""

import itertools
import random
import re
import statistics
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from teams_hpc.config import TemplateEngineConfig
from teams_hpc.llm.base import ScoreRequest, Task, complete_all
from teams_hpc.llm.grammar.additions import HEADS, MARKERS, TAILS
from teams_hpc.llm.grammar.answers import answer
from teams_hpc.llm.grammar.judge import p_not_equal
from teams_hpc.llm.grammar.slots import Draws, Slots
from teams_hpc.llm.grammar.subjects import DOMAINS, FRAMES, SUBJECTS
from teams_hpc.llm.grammar.topics import domain_of, topics
from teams_hpc.llm.grammar.world import (
    FRUITFUL,
    KINDS,
    P_SAME_KIND,
    applied,
    instruction_kind,
    is_fruitful,
    read,
    rewrite,
)
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.template_engine import TemplateEngine
from teams_hpc.rewriting.elimination import Reason, check_answer, check_rewrite, normal_text
from teams_hpc.rewriting.operations import (
    FORBIDDEN_PHRASES,
    OPERATIONS,
    Operation,
    answer_request,
    has_length_rule,
    keeps_length_rule,
    rewrite_request,
)
from teams_hpc.rewriting.reviewer import Pair, Reviewer, nearly_same, sanity_accuracy
from teams_hpc.rewriting.seeds import read_seeds

STEPS = 6
NAMES = tuple(str(name) for name in OPERATIONS)
SEEDS = [seed.instruction for seed in read_seeds(None, None).seeds]
INSTRUCTIONS = {
    "question": (
        "Why do cats purr when nobody is near?",
        "What is the difference between weather and climate?",
        "How does a canal lock lift a boat?",
    ),
    "explain": (
        "Explain the process of photosynthesis.",
        "Describe how glass is made from sand.",
        "Discuss whether zoos protect animals.",
    ),
    "code": (
        "Write a Python function that merges two sorted lists.",
        "Write an SQL query that finds the ten oldest customers.",
        "Find the error in this bash script and repair it.",
    ),
    "mathematics": (
        "A baker sells 120 rolls at 0.40 euros. What does she earn?",
        "Calculate the area of a circle with a radius of 7 cm.",
        "Solve the equation and check the solution.",
    ),
    "list": (
        "List five ways to save water at home.",
        "Compare tea with coffee with regard to price and taste.",
        "Plan a picnic for twelve people with one small car.",
    ),
    "writing": (
        "Write a short poem about a lighthouse in winter.",
        "Draft a letter that thanks a neighbour for a key.",
        "Invent a legend about the origin of salt.",
    ),
    "transform": (
        "Translate this sentence into Spanish: the library is closed.",
        "Summarise the following paragraph in one sentence.",
        "Classify these animals by what they eat.",
    ),
}


@cache
def steps() -> tuple[tuple[str, str, str, bool], ...]:
    """Random chains over all seeds; each entry is (before, operation, after, fruitful)."""
    rng, found = random.Random(1), []
    for instruction in [*SEEDS, *itertools.chain(*INSTRUCTIONS.values())]:
        text = instruction
        for _ in range(STEPS):
            operation = rng.choice(NAMES)
            after = rewrite(operation, text, rng.getrandbits(60))
            found.append((text, operation, after, is_fruitful(operation, text)))
            text = after
    return tuple(found)


def test_kinds_are_read_off_the_text_and_all_occur_among_the_seeds() -> None:
    for kind, texts in INSTRUCTIONS.items():
        assert [instruction_kind(text) for text in texts] == [kind] * len(texts)
    assert {instruction_kind(text) for text in SEEDS} == set(KINDS)


def test_the_judge_agrees_with_the_grammar_on_its_own_rewrites() -> None:
    agreed = sum((p_not_equal(a, b) > 0.5) == fruitful for a, _, b, fruitful in steps())
    assert agreed / len(steps()) > 0.99
    gained = [p_not_equal(a, b) for a, _, b, fruitful in steps() if fruitful]
    pointless = [p_not_equal(a, b) for a, _, b, fruitful in steps() if not fruitful]
    assert statistics.mean(gained) > 0.95
    assert max(pointless) < 0.08


def test_rewrites_do_what_their_operation_says() -> None:
    for before, operation, after, fruitful in steps():
        assert normal_text(after) != normal_text(before)
        assert not any(phrase in after.lower() for phrase in FORBIDDEN_PHRASES)
        assert not re.search(r"\{\w+\}", after)
        if not fruitful:
            assert read(after).bare == read(before).bare
            assert len(after) <= len(read(before).bare) + 80
        elif operation == "breadth":
            assert applied(after) == frozenset()
            assert after == read(after).bare
        else:
            assert applied(after) == applied(before) | {operation}
            assert read(after).core.rstrip(".") == read(before).core.rstrip(".")
            assert after.startswith(read(before).bare)


def test_additions_have_10_to_20_words() -> None:
    kept = [
        keeps_length_rule(Operation(operation), before, after)
        for before, operation, after, fruitful in steps()
        if fruitful and has_length_rule(Operation(operation))
    ]
    assert len(kept) > 200
    assert sum(map(bool, kept)) / len(kept) > 0.99


def fruitful_text(operation: str) -> str:
    """A text on which the operation is fruitful."""
    if operation == "breadth":
        return rewrite("deepening", rewrite("add_constraints", "Explain how bees dance.", 1), 2)
    return next(some[0] for some in INSTRUCTIONS.values() if is_fruitful(operation, some[0]))


@pytest.mark.parametrize("operation", NAMES)
def test_many_rewrites_of_one_text_do_not_look_alike(operation: str) -> None:
    text = fruitful_text(operation)
    assert len({rewrite(operation, text, seed) for seed in range(600)}) > 200


def test_markers_belong_to_one_operation_and_every_pair_has_its_tails() -> None:
    for operation, heads in HEADS.items():
        assert {MARKERS[" ".join(head.split()[:3])] for head in heads} == {operation}
    assert not any("{" in marker for marker in MARKERS)
    assert set(TAILS) == {
        (operation, kind) for kind, some in FRUITFUL.items() for operation in some & set(HEADS)
    }


def test_new_prompts_have_the_kind_and_domain_they_were_made_for() -> None:
    for kind, frames in FRAMES.items():
        for number, frame in enumerate(frames):
            for domain in DOMAINS:
                draws = Draws(number, domain)
                text = Slots(draws, (), SUBJECTS[domain]).fill(frame)
                assert instruction_kind(text) == kind, text
                assert domain_of(text) == domain, text
                assert any(subject in topics(text)[0] for subject in SUBJECTS[domain]), text


def test_additions_to_data_start_a_new_line_and_leave_it_intact() -> None:
    text = "Which town is largest?\n| town | people |\n|---|---|\n| Pune | 12 |"
    after = rewrite("concretizing", text, 5)
    assert after.startswith(f"{text}\n")
    assert read(rewrite("breadth", text, 5)).bare == text


@given(st.text(max_size=300), st.sampled_from(NAMES), st.integers(0, 2**63 - 1))
@settings(max_examples=150, deadline=None)
@example("", "breadth", 0)
@example("Please ", "deepening", 1)
@example("{t} {0} %s {{", "complicate_input", 2)
def test_any_text_can_be_rewritten_judged_and_answered(text: str, name: str, seed: int) -> None:
    after = rewrite(name, text, seed)
    assert after != text
    assert 0.0 < p_not_equal(text, after) < 1.0
    assert p_not_equal(text, text) < 0.1
    assert answer(after, text, seed)


def test_paraphrases_never_pile_up() -> None:
    text = start = "Explain the process of photosynthesis."
    for seed in range(20):
        text = rewrite("breadth", text, seed)
        assert len(text) < len(start) + 60
        assert read(text).bare == start


def test_gaming_the_judge_earns_nothing() -> None:
    before = "Explain how soap gets grease off a plate, and why warm water helps."
    for after in (
        "Explain how soap gets grease off a plate",
        f"Please {before[0].lower()}{before[1:]} Thank you.",
        "xqzt vrrk plomf zzyx qwrt bnmm",
        f"{before} xqzt vrrk plomf zzyx qwrt bnmm",
        "more soap " * 30,
    ):
        assert p_not_equal(before, after) < 0.1, after
    unrelated = "Write a haiku about the first frost on a bicycle saddle."
    assert p_not_equal(before, unrelated) > 0.95


# A policy of the search chooses an operation from (kind, operations applied, step); breadth leads
# to the same kind with P_SAME_KIND and otherwise to each other kind alike.
Policy = Callable[[str, frozenset[str], int], dict[str, float]]


def mean_reward(policy: Policy, kind: str) -> float:
    """Exact mean reward of a step over an episode; the verdict counts 1 if fruitful, else 0."""

    @cache
    def value(kind: str, done: frozenset[str], step: int) -> float:
        if step == STEPS:
            return 0.0
        return sum(
            share * after(name, kind, done, step)
            for name, share in policy(kind, done, step).items()
        )

    def after(name: str, kind: str, done: frozenset[str], step: int) -> float:
        return outcome(name, kind, done, lambda kind, done: value(kind, done, step + 1))

    return value(kind, frozenset(), 0) / STEPS


def outcome(
    name: str, kind: str, done: frozenset[str], then: Callable[[str, frozenset[str]], float]
) -> float:
    """Reward of an operation now and later."""
    if name == "breadth" and len(done) >= 2:
        others = [other for other in KINDS if other != kind]
        later = P_SAME_KIND * then(kind, frozenset())
        later += (1 - P_SAME_KIND) * sum(then(k, frozenset()) for k in others) / len(others)
        return 1.0 + later
    if name in FRUITFUL[kind] - done:
        return 1.0 + then(kind, done | {name})
    return then(kind, done)


@cache
def optimum(kind: str, done: frozenset[str] = frozenset(), step: int = 0) -> float:
    """Most that any policy can earn from here on."""
    if step == STEPS:
        return 0.0
    return max(outcome(name, kind, done, lambda k, d: optimum(k, d, step + 1)) for name in NAMES)


def by_kind_and_step(kind: str, done: frozenset[str], step: int) -> dict[str, float]:
    """Three fruitful additions, breadth, and again."""
    order = [*sorted(FRUITFUL[kind]), "breadth"]
    return {order[step % 4]: 1.0}


def test_simple_policies_reach_at_most_three_quarters_of_the_best() -> None:
    best = {kind: optimum(kind) / STEPS for kind in KINDS}
    assert min(best.values()) >= 0.8
    simple: dict[str, Policy] = {
        "random": lambda kind, done, step: dict.fromkeys(NAMES, 1 / 6),
        "round robin": lambda kind, done, step: {NAMES[step]: 1.0},
        **{name: (lambda kind, done, step, name=name: {name: 1.0}) for name in NAMES},
    }
    for name, policy in simple.items():
        for kind in KINDS:
            assert mean_reward(policy, kind) <= 0.75 * best[kind], (name, kind)
    for kind in KINDS:
        assert mean_reward(by_kind_and_step, kind) == pytest.approx(best[kind])


def test_the_world_is_what_the_search_believes() -> None:
    """Playing the search's rules on real texts and verdicts: the same steps are rewarded."""
    rng = random.Random(3)
    for instruction in itertools.chain(*INSTRUCTIONS.values()):
        text, earlier, done = instruction, [instruction], frozenset[str]()
        for _ in range(2 * STEPS):
            operation, kind = rng.choice(NAMES), instruction_kind(text)
            after = rewrite(operation, text, rng.getrandbits(60))
            expected = outcome(operation, kind, done, lambda kind, done: 0.0)
            assert (p_not_equal(text, after) > 0.5) == bool(expected)
            if expected:
                assert not any(nearly_same(after, old) for old in earlier[:-1])
                done = frozenset() if operation == "breadth" else done | {operation}
            assert applied(after) == done
            text = after
            earlier.append(text)


def test_breadth_keeps_the_kind_about_as_often_as_it_should() -> None:
    text = fruitful_text("breadth")
    kinds = [instruction_kind(rewrite("breadth", text, seed)) for seed in range(600)]
    assert abs(kinds.count("explain") / 600 - P_SAME_KIND) < 0.08
    assert set(kinds) == set(KINDS)


def test_the_engine_is_exact_and_feeds_every_rule() -> None:
    rewrites = [
        rewrite_request(OPERATIONS[i % 6], SEEDS[i % len(SEEDS)], "", request_id=f"r{i}", seed=i)
        for i in range(2000)
    ]
    answers = [
        answer_request(SEEDS[i % len(SEEDS)], "", request_id=f"a{i}", seed=i) for i in range(2000)
    ]
    engine = TemplateEngine(TemplateEngineConfig())
    first = complete_all(engine, [*rewrites, *answers])
    again = complete_all(TemplateEngine(TemplateEngineConfig()), [*answers, *rewrites][::-1])
    assert sorted(first, key=lambda c: c.id) == sorted(again, key=lambda c: c.id)
    reasons = [
        check_rewrite(
            Operation(request.task.operation),
            request.task.instruction,
            completion.text,
            completion,
            max_words=2048,
        )
        for request, completion in zip(rewrites, first, strict=False)
    ]
    assert 5 <= reasons.count(Reason.COPIED_PROMPT) <= 60
    assert reasons.count(Reason.COPIED_PROMPT) + reasons.count(Reason.NONE) == 2000
    verdicts = [check_answer(completion) for completion in first[2000:]]
    assert 25 <= verdicts.count(Reason.REFUSAL) <= 80
    assert 5 <= verdicts.count(Reason.EMPTY_ANSWER) <= 45


def test_answers_are_of_fair_length_and_use_the_words_of_the_instruction() -> None:
    answers = [
        (after, answer(after, "", number)) for number, (_, _, after, _) in enumerate(steps())
    ]
    lengths = [len(text.split()) for _, text in answers]
    assert sum(40 <= length <= 150 for length in lengths) / len(lengths) > 0.97
    grounded = [
        any(topic.removeprefix("the ") in text for topic in topics(read(after).core))
        for after, text in answers
    ]
    assert all(grounded)
    steps_asked = "Why do cats purr when nobody is near? Reason step by step, and check the last."
    assert "\n1. " in answer(steps_asked, "", 3)
    assert "| aspect |" in answer("Compare tea and coffee in a table.", "", 4)
    assert "```python" in answer("Write a Python function that counts bees.", "", 5)
    assert "4, 7, 12" in "".join(
        answer("Compute the mean of these times.", "4, 7, 12", seed) for seed in range(9)
    )


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
