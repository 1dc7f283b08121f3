"""The verdict of the grammar: how much of the second text is new, from the two texts alone."""

import math
import re
from collections import Counter

from teams_hpc.llm.grammar.words import STOP_WORDS
from teams_hpc.llm.grammar.world import read

_WORD = re.compile(r"[\w'-]+")
_FLOOR, _RANGE, _SCALE = 0.04, 0.93, 1.6
_WEIGHT_OF_REMOVED = 0.5
_FEWEST_WORDS_TO_DOUBT = 5
_SMALLEST_SHARE_OF_STOP_WORDS = 0.08
_SMALLEST_SHARE_OF_DISTINCT_WORDS = 0.3


def p_not_equal(before: str, after: str) -> float:
    """P(Not Equal): 0.04 for equal content, then rising with each new word up to 0.97.

    Courtesies, function words and word order don't count. A text that only drops words, isn't made
    of English sentences, or repeats a few words over and over brings nothing new: such rewrites
    have no information gain (elimination rule 1) and must not earn a reward.
    """
    old, new = read(before).bare, read(after).bare
    if new.startswith(old):
        old, new = "", new[len(old) :]
    old_words, new_words = _WORD.findall(old.lower()), _WORD.findall(new.lower())
    if not _is_readable(new_words):
        return _FLOOR
    added, removed = Counter(new_words), Counter(old_words)
    shared = added & removed if removed else removed
    num_added, num_removed = _count_content(added - shared), _count_content(removed - shared)
    difference = num_added + min(num_added, _WEIGHT_OF_REMOVED * num_removed)
    return _FLOOR + _RANGE * (1.0 - math.exp(-difference / _SCALE))


def _count_content(words: Counter[str]) -> int:
    return sum(count for word, count in words.items() if word not in STOP_WORDS)


def _is_readable(words: list[str]) -> bool:
    if len(words) < _FEWEST_WORDS_TO_DOUBT:
        return bool(words)
    stop_words = sum(word in STOP_WORDS for word in words)
    return stop_words >= _SMALLEST_SHARE_OF_STOP_WORDS * len(words) and len(
        set(words)
    ) >= _SMALLEST_SHARE_OF_DISTINCT_WORDS * len(words)
