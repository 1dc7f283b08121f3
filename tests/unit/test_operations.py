"""What the rewriting prompts must say, and how a rewrite is cleaned and measured."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teams_hpc.rewriting.operations import (
    OPERATIONS,
    Operation,
    added_words,
    clean_rewrite,
    count_words,
    rewrite_request,
)

WORDS = st.lists(st.sampled_from(["sea", "tide", "well-known", "can't", "x2", "Über"]), max_size=8)


def prompt_of(operation: Operation, input_text: str = "") -> str:
    request = rewrite_request(operation, "Sum the list.", input_text, request_id="r", seed=1)
    assert request.task.operation == operation
    assert [message.role for message in request.messages] == ["user"]  # base models take no system
    return request.messages[0].content


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_prompt_asks_for_a_reasonable_answerable_prompt_alone(operation: Operation) -> None:
    prompt = prompt_of(operation)
    for asked in ("reasonable", "understand and answer", "at most 2048 words", "without intro"):
        assert asked in prompt


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_input_is_shown_once_and_stays(operation: Operation) -> None:
    with_input, without = prompt_of(operation, "3, 4"), prompt_of(operation)
    assert with_input.count("<<<INPUT\n3, 4\n>>>") == 1
    assert "<<<INPUT" not in without
    if operation is Operation.BREADTH:
        assert "must stand on its own" in with_input
    else:
        assert "stays as it is" in with_input
        assert "stays as it is" not in without
        assert "harder for" in without
        assert "tables and code" in without


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("“A” and “B”", "“A” and “B”"),
        ("'Don't sing'", "'Don't sing'"),
        ("“Say 'no' to it.”", "Say 'no' to it."),
        ('"', '"'),
    ],
)
def test_only_a_pair_of_quotes_around_everything_comes_off(text: str, cleaned: str) -> None:
    assert clean_rewrite(text) == cleaned


@given(WORDS, WORDS)
def test_added_words_are_the_difference_of_two_multisets(
    before: list[str], more: list[str]
) -> None:
    old = " ".join(before)
    assert added_words(old, f"{' - '.join([*more, *before])}.") == len(more)
    assert added_words(f"{old} {' '.join(more)}", old.upper()) == 0
    new = " ".join([*more, *before[1:]])
    assert added_words(old, new) == (count_words(new) - count_words(old)).total()


@given(st.text(alphabet="aZ09_'’-–. ,\n\t\x1c|ßİé", max_size=40))
def test_words_are_counted_alike_in_plain_texts_and_others(text: str) -> None:
    """Plain texts are split in a faster way."""
    assert count_words(text) == Counter(re.findall(r"\w+(?:['’-]\w+)*", text.casefold()))
