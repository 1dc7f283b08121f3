"""Elimination rules at their edges, and the order of the checks."""

import pytest

from teams_hpc.llm.base import Completion, FinishReason
from teams_hpc.rewriting.elimination import Reason, check_answer, check_rewrite, copies_prompt
from teams_hpc.rewriting.operations import Operation


def completion(text: str, finish: FinishReason = "stop") -> Completion:
    return Completion(id="c", text=text, finish_reason=finish, prompt_tokens=1, completion_tokens=1)


def test_the_first_check_that_applies_is_the_reason() -> None:
    def reason(text: str, finish: FinishReason) -> Reason:
        return check_rewrite(
            Operation.DEEPENING,
            "Sing.",
            text,
            completion(text, finish),
            max_words=50,
            enforce_added_words=True,
        )

    copied = "Sing the rewritten prompt."
    assert reason(copied, "error") is Reason.ENGINE_ERROR
    assert reason(copied, "length") is Reason.UNUSABLE
    assert reason(copied, "stop") is Reason.COPIED_PROMPT
    assert reason("Sing of the tide.", "stop") is Reason.OFF_LENGTH
    assert reason(f"Sing of {'wind ' * 9}", "stop") is Reason.NONE


def test_our_closing_line_is_a_copy_but_a_python_prompt_is_not() -> None:
    assert copies_prompt("Sing of the tide.\n>>>", "Sing.")
    assert not copies_prompt("What does this print?\n>>> 1 + 1", "Sing.")
    assert not copies_prompt("Sing of the tide.\n>>>", "Sing.\n >>> \n")


@pytest.mark.parametrize("text", ["It’s what it isn't.", "I don't.", "—\n…", "🙂", " \n"])
def test_function_words_in_any_spelling_say_nothing(text: str) -> None:
    assert check_answer(completion(text)) is Reason.EMPTY_ANSWER


@pytest.mark.parametrize("text", ["π", "Nein", "不", "It’s 4."])
def test_one_telling_word_is_an_answer(text: str) -> None:
    assert check_answer(completion(text)) is Reason.NONE


def test_a_failed_answer_is_no_refusal() -> None:
    assert check_answer(completion("", "error")) is Reason.ENGINE_ERROR
