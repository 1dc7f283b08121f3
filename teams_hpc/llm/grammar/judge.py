"""The verdict of the grammar: how much content two texts don't share."""

import math
import re
from collections import Counter

from teams_hpc.llm.grammar.world import bare

_WORD = re.compile(r"\w+")
_FLOOR, _RANGE, _SCALE = 0.04, 0.93, 1.6
_EMPTY = frozenset(
    "a an and are as at be by can could do does for from have i in is it its me my of on or please "
    "so that the this to us was we what which with would you your".split()
)


def p_not_equal(before: str, after: str) -> float:
    """P(Not Equal), from 0.04 for equal content to 0.97, rising with each word not shared."""
    old, new = (Counter(_WORD.findall(bare(text).lower())) for text in (before, after))
    difference = sum(
        count for word, count in ((old - new) + (new - old)).items() if word not in _EMPTY
    )
    return _FLOOR + _RANGE * (1.0 - math.exp(-difference / _SCALE))
