"""Texts that are nearly the same, grouped.

Similarity is the Jaccard index of word 3-gram shingles. Candidates come from banded MinHash
(Broder 1997; banding as in Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3), and
each is confirmed on the true shingle sets. Whether two texts are linked depends on those two alone,
so the groups don't depend on the order of the texts, nor on what else is among them other than
through texts that link them.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from teams_hpc.rewriting.similar_sets import SimilarSets

_SHINGLE_WORDS = 3

# Arithmetic signs count as words, or 3 + 4 and 3 - 4 were the same question. Chinese and Japanese
# are written without spaces: there each character counts.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[-+*/^=<>%]")


def words(text: str) -> list[str]:
    """The words and arithmetic signs of a text, case and compatibility forms folded."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(text: str) -> frozenset[str]:
    """The set of word 3-grams; of a shorter text its words as one shingle; never empty."""
    # A text without any word stands for itself.
    parts = words(text) or text.strip().split(" ")
    count = max(1, len(parts) - _SHINGLE_WORDS + 1)
    return frozenset(" ".join(parts[start : start + _SHINGLE_WORDS]) for start in range(count))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Size of the intersection over size of the union of two shingle sets, in [0, 1]."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def cluster(texts: Sequence[str], threshold: float, scratch: Path | None = None) -> list[int]:
    """Group texts that are linked, directly or through others, by a similarity at or above a bound.

    Args:
        texts: Any texts, in any order; equal ones are always together.
        threshold: Jaccard index in [0, 1]; 0 puts all texts together. A pair exactly at the
            threshold (0.03 or more) is missed with a probability below 0.001, a closer one more
            rarely still.
        scratch: Where some 0.7 KB a text may be written for the while; None: with temporary files.

    Returns:
        For each text the index of its group's representative: the text of the group that sorts
        first (of equal texts the first in order).
    """
    index = SimilarSets(threshold, scratch)
    for text in texts:
        index.add(shingles(text))
    roots = index.groups().tolist()
    index.close()
    members: dict[int, list[int]] = defaultdict(list)
    for number, root in enumerate(roots):
        members[root].append(number)
    representatives = {
        root: min(group, key=lambda number: (texts[number], number))
        for root, group in members.items()
    }
    return [representatives[root] for root in roots]
