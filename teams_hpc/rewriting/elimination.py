"""Why a step is dropped: the four published rules, and what makes a rewrite unusable at all.

Order of the checks: unusable, copied prompt (rule 4), off length (option) on the text of the
rewrite; equal (rule 1) on the reviewer's verdict; refusal (rule 2), empty answer (rule 3) on the
answer. The first that applies is the reason.
"""

import re
from collections.abc import Iterator
from enum import StrEnum
from itertools import starmap, zip_longest
from operator import eq

from teams_hpc.llm.base import Completion
from teams_hpc.rewriting.operations import (
    BLOCK_CLOSES,
    FORBIDDEN_PHRASES,
    Operation,
    keeps_length_rule,
)

REFUSAL_WORDS = 80
"""An answer with "sorry" and fewer words than this is a refusal."""


class Reason(StrEnum):
    """Why a step was not kept. The order is the code in rows: never reorder."""

    NONE = "none"
    EQUAL = "equal"
    REFUSAL = "refusal"
    EMPTY_ANSWER = "empty_answer"
    COPIED_PROMPT = "copied_prompt"
    UNUSABLE = "unusable"
    OFF_LENGTH = "off_length"
    ENGINE_ERROR = "engine_error"


REASONS = tuple(Reason)

# Function words of English; an answer of these alone says nothing.
_STOP_WORDS = frozenset(
    """
        a about above after again all also am an and any are as at be because been before being
        below between both but by can could did do does doing down during each few for from
        further had has have having he her here hers herself him himself his how i if in into is
        it its itself just me more most my myself no nor not now of off on once only or other our
        ours ourselves out over own same she should so some such than that the their theirs them
        themselves then there these they this those through to too under until up very was we were
        what when where which while who whom why will with would you your yours yourself
        yourselves
        aren't can't couldn't didn't doesn't don't hadn't hasn't haven't he's i'd i'll i'm i've
        isn't it's let's shouldn't that's there's they're wasn't we're weren't what's won't wouldn't
        you're
    """.split()
)
# Possessive, since a word is never tried shorter: twice as fast.
_WORD = re.compile(r"[^\W_]++(?:['’][^\W_]++)*+")


def _words(text: str) -> Iterator[str]:
    return map(re.Match.group, _WORD.finditer(text.casefold()))


def normal_text(text: str) -> str:
    """A text for comparison: its words, case folded; white space and punctuation are gone."""
    return " ".join(_WORD.findall(text.casefold()))


def copies_prompt(rewrite: str, parent: str) -> bool:
    """Rule 4: the rewrite has a phrase of the rewriting prompt that its parent didn't have."""
    new = rewrite.casefold()
    # Each phrase has one of these: mostly two searches will do.
    if "prompt" in new or "<<<" in new:
        old = parent.casefold()
        if any(phrase in new and phrase not in old for phrase in FORBIDDEN_PHRASES):
            return True
    # Inside a line the closing mark may be Python's prompt.
    return _has_closing_line(rewrite) and not _has_closing_line(parent)


def _has_closing_line(text: str) -> bool:
    return BLOCK_CLOSES in text and any(line.strip() == BLOCK_CLOSES for line in text.splitlines())


def is_unusable(rewrite: str, parent: str, *, is_cut_off: bool, max_words: int) -> bool:
    """Empty, unchanged, cut off or over length."""
    # So many words need as many characters at least: mostly they need not be counted.
    if is_cut_off or (len(rewrite) > max_words and len(rewrite.split()) > max_words):
        return True
    # Word by word, since the first that differs settles it.
    new, old = _words(rewrite), _words(parent)
    first = next(new, None)
    if first is None or first != next(old, None):
        return first is None
    return all(starmap(eq, zip_longest(new, old)))


def check_rewrite(
    operation: Operation,
    parent: str,
    rewrite: str,
    completion: Completion,
    *,
    max_words: int,
    enforce_added_words: bool = False,
) -> Reason:
    """Checks that need no verdict.

    Args:
        operation: What was asked for.
        parent: The instruction it was made from.
        rewrite: The cleaned rewrite.
        completion: What the engine returned.
        max_words: A longer rewrite is unusable.
        enforce_added_words: Drop rewrites that don't add 10 to 20 words where they should.
    """
    if completion.finish_reason == "error":
        return Reason.ENGINE_ERROR
    is_cut_off = completion.finish_reason == "length"
    if is_unusable(rewrite, parent, is_cut_off=is_cut_off, max_words=max_words):
        return Reason.UNUSABLE
    if copies_prompt(rewrite, parent):
        return Reason.COPIED_PROMPT
    if enforce_added_words and keeps_length_rule(operation, parent, rewrite) is False:
        return Reason.OFF_LENGTH
    return Reason.NONE


def check_verdict(p_not_equal: float, threshold: float) -> Reason:
    """Rule 1: no information gained."""
    return Reason.EQUAL if p_not_equal < threshold else Reason.NONE


def check_answer(completion: Completion) -> Reason:
    """Rules 2 and 3."""
    if completion.finish_reason == "error":
        return Reason.ENGINE_ERROR
    text = completion.text
    if "sorry" in text.casefold() and len(text.split()) < REFUSAL_WORDS:
        return Reason.REFUSAL
    if _STOP_WORDS.issuperset(_words(text.replace("’", "'"))):
        return Reason.EMPTY_ANSWER
    return Reason.NONE
