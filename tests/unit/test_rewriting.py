"""Operations, elimination rules, verdict, reward, observation and the policy network."""

import math
from pathlib import Path

import numpy as np
import pytest

from teams_hpc.errors import CorruptFileError
from teams_hpc.llm.base import Completion
from teams_hpc.rewriting.elimination import (
    Reason,
    check_answer,
    check_rewrite,
    check_verdict,
    copies_prompt,
)
from teams_hpc.rewriting.identity import keyed_seed, keyed_uniform, record_id, seed_id
from teams_hpc.rewriting.observation import FEATURE_NAMES, History, observation_size, observe
from teams_hpc.rewriting.operation_policy import (
    MlpPolicy,
    RoundRobinPolicy,
    UniformPolicy,
    choose,
)
from teams_hpc.rewriting.operations import (
    FORBIDDEN_PHRASES,
    OPERATIONS,
    Operation,
    added_words,
    answer_request,
    carried_input,
    clean_rewrite,
    keeps_length_rule,
    prompt_hash,
    rewrite_request,
)
from teams_hpc.rewriting.reviewer import (
    Verdict,
    ZeroReason,
    nearly_same,
    parse_verdict,
    reward,
    softmax_not_equal,
    zero_reason,
)

SEED = "What is the process of photosynthesis?"
REWRITE = (
    "What is the process of photosynthesis, and how do light intensity and temperature affect its "
    "rate in aquatic plants?"
)


def completion(text: str, finish: str = "stop") -> Completion:
    return Completion(
        id="c",
        text=text,
        finish_reason=finish,  # type: ignore[arg-type]
        prompt_tokens=1,
        completion_tokens=1,
    )


def check(rewrite: str, *, finish: str = "stop", max_words: int = 2048, strict: bool = False):  # type: ignore[no-untyped-def]
    return check_rewrite(
        Operation.ADD_CONSTRAINTS,
        SEED,
        rewrite,
        completion(rewrite, finish),
        max_words=max_words,
        enforce_added_words=strict,
    )


def test_the_methods_own_example() -> None:
    request = rewrite_request(Operation.ADD_CONSTRAINTS, SEED, "", request_id="r", seed=1)
    prompt = request.messages[-1].content
    assert SEED in prompt
    assert "10 to 20 words" in prompt
    assert "constraint" in prompt
    assert check(REWRITE, strict=True) is Reason.NONE
    assert 10 <= added_words(SEED, REWRITE) <= 20
    assert keeps_length_rule(Operation.ADD_CONSTRAINTS, SEED, REWRITE) is True


@pytest.mark.parametrize("operation", OPERATIONS)
def test_prompts_ask_for_what_was_published(operation: Operation) -> None:
    request = rewrite_request(operation, "Sum the list.", "3, 4", request_id="r", seed=1)
    prompt = request.messages[-1].content
    assert "Sum the list." in prompt
    assert "3, 4" in prompt
    assert ("creator" in prompt) == (operation is Operation.BREADTH)
    has_rule = keeps_length_rule(operation, "a", "b") is not None
    assert ("10 to 20 words" in prompt) == has_rule
    for phrase in ("given prompt", "rewritten prompt", "created prompt"):
        assert f'"{phrase}"' in prompt  # named once, as forbidden
        assert prompt.lower().count(phrase) == 1
    assert carried_input(operation, "3, 4") == ("" if operation is Operation.BREADTH else "3, 4")
    hashes = {prompt_hash(rewrite_request(other, "Sum the list.", "", request_id="r", seed=1))
              for other in OPERATIONS}  # fmt: skip
    assert len(hashes) == len(OPERATIONS)


def test_an_answer_request_shows_instruction_and_input() -> None:
    request = answer_request("Sum the list.", "3, 4", request_id="r", seed=1)
    assert request.messages[-1].content == "Sum the list.\n\n3, 4"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  Sing.\n", "Sing."),
        ('"Sing a song."', "Sing a song."),
        ('"A" and "B"', '"A" and "B"'),
        ("“Sing.”", "Sing."),
        ('"', '"'),
    ],
)
def test_clean_rewrite_takes_off_white_space_and_one_pair_of_quotes(
    text: str, cleaned: str
) -> None:
    assert clean_rewrite(text) == cleaned


@pytest.mark.parametrize("text", ["", "  ", "?!", SEED, "what is the process of PHOTOSYNTHESIS"])
def test_an_empty_or_unchanged_rewrite_is_unusable(text: str) -> None:
    assert check(text) is Reason.UNUSABLE


def test_a_cut_off_long_or_failed_rewrite_is_dropped() -> None:
    assert check(REWRITE, finish="length") is Reason.UNUSABLE
    assert check(REWRITE, max_words=5) is Reason.UNUSABLE
    assert check("", finish="error") is Reason.ENGINE_ERROR
    assert check(f"{SEED} Briefly.", strict=True) is Reason.OFF_LENGTH


@pytest.mark.parametrize("phrase", FORBIDDEN_PHRASES)
def test_rule_4_drops_words_of_the_prompt_unless_they_were_there(phrase: str) -> None:
    assert check(f"{REWRITE} {phrase.upper()}") is Reason.COPIED_PROMPT
    assert not copies_prompt(f"{REWRITE} {phrase}", f"{SEED} {phrase}")


def test_rule_1_is_about_the_verdict() -> None:
    assert check_verdict(0.49, 0.5) is Reason.EQUAL
    assert check_verdict(0.5, 0.5) is Reason.NONE


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I'm sorry, but I can't.", Reason.REFUSAL),
        ("Sorry! " + "word " * 78, Reason.REFUSAL),
        ("Sorry! " + "word " * 79, Reason.NONE),
        ("", Reason.EMPTY_ANSWER),
        ("... - !", Reason.EMPTY_ANSWER),
        ("It is what it is.", Reason.EMPTY_ANSWER),
        ("It is 7.", Reason.NONE),
        ("Chlorophyll.", Reason.NONE),
    ],
)
def test_rules_2_and_3_are_about_the_answer(text: str, reason: Reason) -> None:
    assert check_answer(completion(text)) is reason


def test_the_likelihood_verdict_is_a_softmax_of_two_sums() -> None:
    for equal, other in ((-1.0, -1.0), (-3.0, -0.5), (-900.0, -1.0), (-1.0, -900.0)):
        difference = equal - other
        expected = 1.0 / (1.0 + math.exp(difference)) if difference < 500 else 0.0
        assert softmax_not_equal(equal, other) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "p", "is_parsed"),
    [
        ("Not Equal", 1.0, True),
        (" not equal.\n", 1.0, True),
        ("Equal", 0.0, True),
        ("They are not equal", 0.0, False),
        ("", 0.0, False),
    ],
)
def test_a_generated_verdict_is_parsed_as_published(text: str, p: float, is_parsed: bool) -> None:
    assert parse_verdict(text) == Verdict(p_not_equal=p, is_parsed=is_parsed)


def zero(rewrite: str, *earlier: str, cut_off: bool = False) -> ZeroReason:
    return zero_reason(rewrite, [SEED, *earlier], is_cut_off=cut_off, max_words=100)


def test_reward_is_the_verdict_unless_the_rewrite_is_worthless() -> None:
    verdicts = [Verdict(p_not_equal=0.8), Verdict(p_not_equal=0.6)]
    assert reward(verdicts[:1], ZeroReason.NONE, "probability") == 0.8
    assert reward(verdicts, ZeroReason.NONE, "probability") == 0.6
    assert reward(verdicts, ZeroReason.NONE, "binary") == 1.0
    assert reward([Verdict(p_not_equal=0.5)], ZeroReason.NONE, "binary") == 0.0
    assert reward([], ZeroReason.NONE, "probability") == 0.0
    assert zero(REWRITE) is ZeroReason.NONE
    assert zero(SEED.upper()) is ZeroReason.UNUSABLE
    assert zero(REWRITE, cut_off=True) is ZeroReason.UNUSABLE
    assert zero(f"{REWRITE} rewritten prompt") is ZeroReason.COPIED_PROMPT
    assert zero(f"{SEED} ", REWRITE) is ZeroReason.REPEATS_EARLIER
    for reason in ZeroReason:
        if reason is not ZeroReason.NONE:
            assert reward(verdicts, reason, "probability") == 0.0


def test_nearly_the_same_is_about_word_3_grams() -> None:
    text = " ".join(f"word{number}" for number in range(60))
    assert nearly_same(text, f"{text} more")
    assert not nearly_same(text, " ".join(reversed(text.split())))


def test_identities_depend_on_every_part_and_on_nothing_else() -> None:
    ids = {
        record_id(run_seed, instruction, text, trajectory, step)
        for run_seed in (1, 2)
        for instruction, text in (("ab", "c"), ("a", "bc"), ("abc", ""))
        for trajectory in (0, 1)
        for step in (0, 1)
    }
    assert len(ids) == 24
    assert record_id(1, "ab", "c", 0, 0) == record_id(1, "ab", "c", 0, 0)
    assert seed_id("ab", "c") != seed_id("a", "bc")
    draws = [keyed_uniform("x", number) for number in range(4000)]
    assert 0.0 <= min(draws) < max(draws) < 1.0
    assert np.mean(draws) == pytest.approx(0.5, abs=0.03)


def test_history_remembers_what_stands_in_the_text() -> None:
    breadth = OPERATIONS.index(Operation.BREADTH)
    history = History.start().after(0).after(2).after(0)
    assert (history.step, history.last) == (3, 0)
    assert history.counts == (2, 0, 1, 0, 0, 0)
    after = history.after(breadth)
    assert after.counts == (2, 0, 1, 0, 0, 1)
    assert after.since_breadth == (0,) * 6


def test_observations_are_bounded_and_tell_kinds_apart() -> None:
    texts = [SEED, "Write a Python function {x}.", "List 7 ideas | step by step", "", "x " * 5000]
    seen = [observe("features", text, "in", History.start().after(3), 6) for text in texts]
    for values in seen:
        assert values.shape == (observation_size("features"),) == (len(FEATURE_NAMES),)
        assert values.dtype == np.float32
        assert (values >= 0).all()
        assert (values <= 1).all()
    assert not np.array_equal(seen[0], seen[1])
    bare = observe("one_hot", SEED, "", History.start().after(3), 6)
    assert bare.tolist() == [0, 0, 0, 1, 0, 0]
    assert observe("one_hot", SEED, "", History.start(), 6).sum() == 0


def make_policy() -> MlpPolicy:
    rng = np.random.default_rng(0)
    shapes = {
        "hidden_0.weight": (8, 6), "hidden_0.bias": (8,), "hidden_1.weight": (8, 8),
        "hidden_1.bias": (8,), "head.weight": (6, 8), "head.bias": (6,),
    }  # fmt: skip
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return MlpPolicy(weights=weights, metadata={"observation": "one_hot", "member": "2"})


def test_a_policy_survives_its_file_and_damage_is_noticed(tmp_path: Path) -> None:
    policy, path = make_policy(), tmp_path / "policy.safetensors"
    policy.save(path)
    loaded = MlpPolicy.load(path)
    assert loaded.metadata == policy.metadata
    observation = np.eye(6)[1]
    expected = policy.probabilities(observation, History.start())
    assert np.array_equal(loaded.probabilities(observation, History.start()), expected)
    assert expected.sum() == pytest.approx(1.0)
    broken = MlpPolicy(
        weights={**policy.weights, "head.bias": np.zeros(5)}, metadata=policy.metadata
    )
    broken.save(path)
    with pytest.raises(CorruptFileError, match=r"head\.bias"):
        MlpPolicy.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(CorruptFileError, match=r"policy\.safetensors"):
        MlpPolicy.load(path)


def test_choices_follow_the_probabilities_and_never_take_the_impossible() -> None:
    probabilities = np.array([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    chosen = [choose(probabilities, keyed_uniform(n), "sample") for n in range(4000)]
    shares = np.bincount(chosen, minlength=6) / 4000
    assert np.abs(shares - probabilities).max() < 0.03
    assert choose(probabilities, 0.0, "sample") == 1
    assert choose(probabilities * (1 - 1e-12), 1.0 - 2**-53, "sample") == 4
    assert choose(np.full(6, 1 / 6), 0.9, "argmax") == 0


def test_baselines() -> None:
    history = History.start()
    for step in range(7):
        expected = np.eye(6)[step % 6]
        found = RoundRobinPolicy().probabilities(np.zeros(1), history)
        assert np.array_equal(found, expected)
        history = history.after(0)
    assert UniformPolicy().probabilities(np.zeros(1), history).tolist() == [1 / 6] * 6


def test_identities_are_what_they_were() -> None:
    """Runs that have begun go on with later versions, and their rows keep their names."""
    assert seed_id("ß", "K") == "7aae8cd30c5eb8dca8f9addb242e8174"
    assert record_id(7, "ß", "", 0, 1) == "77b536a48407768aa065a278408436d6"
    assert keyed_seed("r", "rewrite") == 7920867174323168766
