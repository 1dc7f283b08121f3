"""What the pocket Llama learns from: real prompts, the grammar's replies, no held-out word."""

import random

import pytest

from pocket.data import encode
from pocket.examples import make_examples, rewrite_example, short_answer, verdict_example
from pocket.instructions import Text, make_text
from pocket.measure import unseen_pairs, unseen_texts
from pocket.tokens import fixed_parts, train_tokenizer
from pocket.words import NOUNS, is_held_out
from teams_hpc.dataset.templates import ChatFormat, Row
from teams_hpc.llm.base import Completion
from teams_hpc.llm.grammar.judge import p_not_equal
from teams_hpc.llm.grammar.world import KINDS, is_fruitful, read
from teams_hpc.rewriting.elimination import Reason, check_answer, check_rewrite
from teams_hpc.rewriting.operations import OPERATIONS, answer_request, rewrite_request
from teams_hpc.rewriting.reviewer import Pair, verdict_messages
from teams_hpc.rewriting.seeds import read_seeds


def some_examples(count: int) -> list[tuple[str, str]]:
    return [
        (example.prompt, example.reply)
        for number in range(count)
        for example in make_examples(number)
    ]


def completion(text: str) -> Completion:
    return Completion(id="0", text=text, finish_reason="stop", prompt_tokens=1, completion_tokens=1)


def test_examples_are_a_function_of_their_seed() -> None:
    assert some_examples(30) == some_examples(30)
    assert len(set(some_examples(30))) > 60


def test_every_prompt_is_one_that_the_suite_sends() -> None:
    parts = fixed_parts()
    heads = [part for part in parts if len(part) > 50]
    for prompt, reply in some_examples(40):
        assert reply.strip()
        if not any(prompt.startswith(head) for head in heads):
            assert prompt[:1].isupper() or not prompt[:1].isalpha()  # an answer: the instruction
    text = Text("Explain tides.", "high, low")
    for operation in OPERATIONS:
        request = rewrite_request(operation, *(text.instruction, text.input), request_id="", seed=0)
        assert rewrite_example(operation, text, "x").prompt == request.messages[0].content
    pair = Pair(before="Explain tides.", after="Explain tides. Thank you.")
    example = verdict_example(pair)
    assert (example.prompt, example.reply) == (verdict_messages(pair)[0].content, "Equal")


def test_all_kinds_and_operations_come_up_fruitful_or_not() -> None:
    rng = random.Random(0)
    texts = [make_text(rng) for _ in range(400)]
    assert {read(text.instruction).kind for text in texts} == set(KINDS)
    assert sum(bool(text.input) for text in texts) > 40
    later = list(unseen_texts(60))
    for operation in OPERATIONS:
        assert {is_fruitful(operation, text.instruction) for text in later} == {True, False}


def test_held_out_words_stay_out_of_training_and_no_seed_is_in_it() -> None:
    assert min(len(NOUNS[True]), len(NOUNS[False])) > 80
    assert all(is_held_out(noun) for noun in NOUNS[True])
    seen = " ".join(prompt for prompt, _ in some_examples(400)).lower()
    words = set("".join(c if c.isalpha() else " " for c in seen).split())
    assert not words & set(NOUNS[True])
    assert not any(seed.instruction.lower() in seen for seed in read_seeds(None, None).seeds)


def test_pairs_to_measure_with_are_of_both_sorts() -> None:
    truth = [p_not_equal(pair.before, pair.after) > 0.5 for pair in unseen_pairs(60)]
    assert 15 < sum(truth) < 45


@pytest.mark.parametrize("number", range(5))
def test_what_is_to_be_learnt_passes_the_rules(number: int) -> None:
    for text in unseen_texts(20):
        answer = short_answer(text.instruction, number)
        assert check_answer(completion(answer)) is Reason.NONE
        assert len(answer.split()) < 90
    prompts = {example.reply for example in make_examples(number)}
    for reply in prompts - {"Equal", "Not Equal"}:
        reason = check_rewrite(OPERATIONS[0], "Sing.", reply, completion(reply), max_words=400)
        assert reason is Reason.NONE


def test_examples_are_encoded_as_the_chat_template_would() -> None:
    examples = [example for number in range(25) for example in make_examples(number)]
    tokenizer = train_tokenizer((example.reply for example in examples), 400, 512)
    rows = [Row(example.prompt, "", example.reply) for example in examples]
    encoded, as_sft = encode(tokenizer, examples), ChatFormat(tokenizer).encode(rows)
    assert [each.tokens for each in encoded] == [each.tokens for each in as_sft]
    for example, ours, theirs in zip(examples, encoded, as_sft, strict=True):
        learnt = tokenizer.decode(ours.tokens[ours.prompt_length : theirs.prompt_length])
        repeated = example.prompt[len(example.prompt) - example.num_repeated :]
        assert learnt == (f"{repeated}<|reply|>" if repeated else "")
    request = answer_request("Explain tides.", "", request_id="", seed=0)
    assert len(tokenizer(request.messages[0].content)["input_ids"]) > 3
