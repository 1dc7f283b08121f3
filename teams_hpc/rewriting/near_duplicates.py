"""Texts that are nearly the same, grouped.

Similarity is the Jaccard index of word 3-gram shingles. Candidates come from banded MinHash
(Broder 1997; banding as in Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3), and
each is confirmed on the true shingle sets. Whether two texts are linked depends on those two alone,
so the groups don't depend on the order of the texts, nor on what else is among them other than
through texts that link them.
"""

import functools
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt
import rensa

_SHINGLE_WORDS = 3
_NUM_PERMUTATIONS = 256
_MINHASH_SEED = 543
_MOST_MISSED = 1e-3
# So far below the threshold an estimate is trusted: wrong for one pair in a million at most.
_ESTIMATE_DEVIATIONS = 5.0
_TEXTS_AT_A_TIME = 2048
_REMEMBERED_SETS = 16384

# Arithmetic signs count as words, or 3 + 4 and 3 - 4 were the same question. Chinese and Japanese
# are written without spaces: there each character counts.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[-+*/^=<>%]")

Signatures = npt.NDArray[np.uint32]


def words(text: str) -> list[str]:
    """The words and arithmetic signs of a text, case and compatibility forms folded."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def shingles(text: str) -> frozenset[str]:
    """The set of word 3-grams; of a shorter text its words as one shingle; never empty."""
    return _shingles_of(_normal_form(text))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Size of the intersection over size of the union of two shingle sets, in [0, 1]."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def cluster(texts: Sequence[str], threshold: float) -> list[int]:
    """Group texts that are linked, directly or through others, by a similarity at or above a bound.

    Args:
        texts: Any texts, in any order; equal ones are always together.
        threshold: Jaccard index in [0, 1]; 0 puts all texts together. A pair exactly at the
            threshold (0.03 or more) is missed with a probability below 0.001, a closer one more
            rarely still.

    Returns:
        For each text the index of its group's representative: the text of the group that sorts
        first (of equal texts the first in order).
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold {threshold} is not between 0 and 1")
    members_of: dict[str, list[int]] = defaultdict(list)
    for index, text in enumerate(texts):
        members_of[_normal_form(text)].append(index)
    normal_forms = list(members_of)
    groups: dict[int, list[int]] = defaultdict(list)
    for form, root in zip(normal_forms, _components(normal_forms, threshold), strict=True):
        groups[root].extend(members_of[form])
    representatives = [0] * len(texts)
    for members in groups.values():
        first = min(members, key=lambda index: (texts[index], index))
        for index in members:
            representatives[index] = first
    return representatives


def _normal_form(text: str) -> str:
    """Words joined by spaces; a text without any word stands for itself."""
    return " ".join(words(text)) or text.strip()


@functools.lru_cache(maxsize=_REMEMBERED_SETS)
def _shingles_of(normal_form: str) -> frozenset[str]:
    parts = normal_form.split(" ")
    count = max(1, len(parts) - _SHINGLE_WORDS + 1)
    return frozenset(" ".join(parts[start : start + _SHINGLE_WORDS]) for start in range(count))


def _components(forms: Sequence[str], threshold: float) -> list[int]:
    """Root of each distinct normal form: equal roots, one group."""
    if threshold == 0.0:
        return [0] * len(forms)
    signatures = _sign(forms)
    parent = list(range(len(forms)))
    for band, bucket in _buckets(signatures, _band_rows(threshold)):
        roots = np.array([_find(parent, int(index)) for index in bucket])
        for position, index in enumerate(bucket[:-1].tolist()):
            later = np.flatnonzero(roots[position + 1 :] != roots[position]) + position + 1
            later = later[_plausible(signatures, index, bucket[later], band, threshold)]
            for other in later.tolist():
                low, high = sorted((int(roots[position]), int(roots[other])))
                if low != high and _are_similar(forms[index], forms[bucket[other]], threshold):
                    parent[high] = low
                    roots[roots == high] = low
    return [_find(parent, index) for index in range(len(parent))]


def _are_similar(first: str, second: str, threshold: float) -> bool:
    return jaccard(_shingles_of(first), _shingles_of(second)) >= threshold


def _find(parent: list[int], item: int) -> int:
    """Root of an item in a union-find forest, shortening the way there."""
    while parent[item] != item:
        parent[item] = parent[parent[item]]
        item = parent[item]
    return item


def _sign(forms: Sequence[str]) -> Signatures:
    """MinHash signatures, shape (texts, permutations)."""
    signatures = np.empty((len(forms), _NUM_PERMUTATIONS), dtype=np.uint32)
    for start in range(0, len(forms), _TEXTS_AT_A_TIME):
        piece = forms[start : start + _TEXTS_AT_A_TIME]
        matrix = rensa.RMinHash.digest_matrix_from_token_sets(
            [list(_shingles_of.__wrapped__(form)) for form in piece],
            _NUM_PERMUTATIONS,
            _MINHASH_SEED,
        )
        signatures[start : start + len(piece)] = matrix.to_rows()
    return signatures


def _band_rows(threshold: float) -> int:
    """The longest band that still misses a pair at the threshold only with `_MOST_MISSED`."""
    rows = 1
    while rows < _NUM_PERMUTATIONS:
        longer = rows + 1
        missed = (1.0 - threshold**longer) ** (_NUM_PERMUTATIONS // longer)
        if missed > _MOST_MISSED:
            break
        rows = longer
    return rows


def _buckets(
    signatures: Signatures, band_rows: int
) -> Iterator[tuple[slice, npt.NDArray[np.intp]]]:
    """Band by band, the texts (two or more, ascending) whose signatures agree in all of it."""
    for start in range(0, _NUM_PERMUTATIONS - band_rows + 1, band_rows):
        band = slice(start, start + band_rows)
        together: dict[bytes, list[int]] = defaultdict(list)
        for index, row in enumerate(signatures[:, band]):
            together[row.tobytes()].append(index)
        for bucket in together.values():
            if len(bucket) > 1:
                yield band, np.array(bucket)


def _plausible(
    signatures: Signatures,
    first: int,
    others: npt.NDArray[np.intp],
    band: slice,
    threshold: float,
) -> npt.NDArray[np.bool_]:
    """Which pairs deserve a look at their shingles: estimated near, and met in no earlier band."""
    band_rows = band.stop - band.start
    agreeing = signatures[others] == signatures[first]
    met = agreeing[:, : band.start].reshape(len(others), band.start // band_rows, band_rows)
    deviation = math.sqrt(threshold * (1.0 - threshold) / _NUM_PERMUTATIONS)
    near = agreeing.mean(axis=1) >= threshold - _ESTIMATE_DEVIATIONS * deviation
    return cast("npt.NDArray[np.bool_]", near & ~met.all(axis=2).any(axis=1))
