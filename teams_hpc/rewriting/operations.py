"""The six textual operations and the prompts that ask for them.

The wording is ours; what each prompt asks for follows the paper's published rules.
"""

import hashlib
import re
from collections import Counter
from enum import StrEnum

from teams_hpc.llm.base import Message, Request, Task

PROMPT_SCHEMA = 2
"""Counted into digests: raise it when any prompt changes."""

FEWEST_ADDED_WORDS = 10
MOST_ADDED_WORDS = 20


class Operation(StrEnum):
    """What can be done to an instruction. The order is the code in rows: never reorder."""

    ADD_CONSTRAINTS = "add_constraints"
    DEEPENING = "deepening"
    CONCRETIZING = "concretizing"
    INCREASE_REASONING_STEPS = "increase_reasoning_steps"
    COMPLICATE_INPUT = "complicate_input"
    BREADTH = "breadth"


OPERATIONS = tuple(Operation)

_METHODS = {
    Operation.ADD_CONSTRAINTS: (
        "Add one more constraint or requirement to it. Add or replace only 10 to 20 words."
    ),
    Operation.DEEPENING: (
        "If it asks about an issue, increase the depth and breadth of what it asks. "
        "Add only 10 to 20 words."
    ),
    Operation.CONCRETIZING: (
        "Replace its general concepts with more specific ones. Add only 10 to 20 words."
    ),
    Operation.INCREASE_REASONING_STEPS: (
        "If a few simple steps of thought would solve it, make it ask explicitly for reasoning in "
        "several steps. Add only 10 to 20 words."
    ),
    Operation.COMPLICATE_INPUT: (
        "Make it more complex by putting data into it in a format such as a table, code, JSON or "
        "a formula, which has to be used to solve it."
    ),
}

INSTRUCTION_OPENS = "<<<INSTRUCTION"
INPUT_OPENS = "<<<INPUT"
BLOCK_CLOSES = ">>>"

FORBIDDEN_PHRASES = (
    "given prompt",
    "rewritten prompt",
    "created prompt",
    "#rewritten prompt#",
    "#created prompt#",
    INSTRUCTION_OPENS.lower(),
    INPUT_OPENS.lower(),
)
"""What a rewrite must not have copied from the prompt that asked for it (rule 4)."""

_REWRITER = (
    "You are a prompt rewriter. You turn an instruction into a version that is a bit harder for "
    "well-known AI systems, yet reasonable, and that people can understand and answer."
)
_CREATOR = (
    "You are a prompt creator. Inspired by an instruction, you write a brand-new one that is "
    "reasonable, and that people can understand and answer."
)
_COMMON = (
    "Don't repeat conditions it already has, and don't say what your task is. Write at most 2048 "
    'words. The phrases "given prompt", "rewritten prompt" and "created prompt" must not appear. '
    "Answer with the new instruction alone, without introduction or explanation."
)


def _blocks(instruction: str, input_text: str) -> str:
    block = f"{INSTRUCTION_OPENS}\n{instruction}\n{BLOCK_CLOSES}"
    return f"{block}\n{INPUT_OPENS}\n{input_text}\n{BLOCK_CLOSES}" if input_text else block


def _rewrite_text(operation: Operation, instruction: str, input_text: str) -> str:
    if operation is Operation.BREADTH:
        task = (
            "Write a new instruction of the same domain as the one below, but rarer. Its length "
            "and difficulty should be similar. It must stand on its own."
        )
        return f"{_CREATOR}\n\n{task} {_COMMON}\n\n{_blocks(instruction, input_text)}"
    keep = "Keep everything in it that is not text, such as tables and code."
    if input_text:
        keep += " The input below belongs to it and stays as it is: don't repeat or change it."
    method = f"Rewrite the instruction below by this method: {_METHODS[operation]}"
    return f"{_REWRITER}\n\n{method} {keep} {_COMMON}\n\n{_blocks(instruction, input_text)}"


def rewrite_request(
    operation: Operation, instruction: str, input_text: str, *, request_id: str, seed: int
) -> Request:
    """The request to rewrite an instruction by one operation."""
    message = Message("user", _rewrite_text(operation, instruction, input_text))
    task = Task("rewrite", instruction, input_text, str(operation))
    return Request(request_id, (message,), task, seed)


def answer_request(instruction: str, input_text: str, *, request_id: str, seed: int) -> Request:
    """The request to answer an instruction; its input follows after an empty line."""
    content = f"{instruction}\n\n{input_text}" if input_text else instruction
    task = Task("answer", instruction, input_text)
    return Request(request_id, (Message("user", content),), task, seed)


def prompt_hash(request: Request) -> str:
    """16 hexadecimal digits over the messages of a request."""
    state = hashlib.blake2b(digest_size=8)
    for message in request.messages:
        state.update(f"{message.role}\0{message.content}\0".encode("utf-8", "surrogatepass"))
    return state.hexdigest()


def carried_input(operation: Operation, input_text: str) -> str:
    """The input that belongs to the rewrite: breadth makes a new prompt that stands alone."""
    return "" if operation is Operation.BREADTH else input_text


_QUOTES = {'"': '"', "“": "”", "'": "'"}


def clean_rewrite(text: str) -> str:
    """A model's rewrite without surrounding white space and one pair of enclosing quotes."""
    text = text.strip()
    closing = _QUOTES.get(text[:1])
    # Quotes inside may belong to other quotations: then the outer two may not be a pair.
    if closing and len(text) > 2 and text.endswith(closing) and closing not in text[1:-1]:
        text = text[1:-1].strip()
    return text


# Possessive, since a word is never tried shorter: twice as fast.
_WORD = re.compile(r"\w++(?:['’-]\w++)*+")
# What each ASCII character is to words: itself, case folded, or between two of them.
_FOLDED = "".join(
    char.casefold() if re.match(r"[\w'-]", char) else " " for char in map(chr, range(128))
)


def count_words(text: str) -> Counter[str]:
    """How often each word stands in a text, for `num_added`."""
    if not text.isascii():
        return Counter(_WORD.findall(text.casefold()))
    # The same words, but the pattern is asked only about what is more than letters: twice as fast.
    folded = text.translate(_FOLDED)
    counted = Counter(folded.split())
    if "'" in folded or "-" in folded:
        for piece in [one for one in counted if "'" in one or "-" in one]:
            number = counted.pop(piece)
            for word in _WORD.findall(piece):
                counted[word] += number
    return counted


def added_words(before: str, after: str) -> int:
    """Words of `after` not matched in `before`: the size of the difference of the two multisets.

    Case, order and marks standing alone (a dash, the rule of a table) don't count; "can't" and
    "well-known" are one word each. Words taken out are not subtracted.
    """
    return num_added(count_words(before), count_words(after))


def num_added(old: Counter[str], new: Counter[str]) -> int:
    """`added_words` of counted texts: a parent is compared with each of its rewrites."""
    added = 0
    for word, number in new.items():
        more = number - old.get(word, 0)
        if more > 0:
            added += more
    return added


def has_length_rule(operation: Operation) -> bool:
    """Whether the operation should add 10 to 20 words."""
    return operation not in (Operation.COMPLICATE_INPUT, Operation.BREADTH)


def keeps_length_rule(operation: Operation, before: str, after: str) -> bool | None:
    """Whether 10 to 20 words were added; None for operations without that rule."""
    if not has_length_rule(operation):
        return None
    return FEWEST_ADDED_WORDS <= added_words(before, after) <= MOST_ADDED_WORDS
