"""Texts that are nearly the same, grouped.

Similarity is the Jaccard index of word 3-gram shingles. Candidates come from banded MinHash
(Broder 1997; banding as in Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, ch. 3), and
each is confirmed on the true shingle sets. Whether two texts are linked depends on those two alone,
so the groups don't depend on the order of the texts, nor on what else is among them other than
through texts that link them.
"""

import functools
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import rensa

_SHINGLE_WORDS = 3
_NUM_PERMUTATIONS = 256
_MINHASH_SEED = 543
_MOST_MISSED = 1e-3
# Some seven standard deviations of a 256-permutation estimate: only a saving, never a verdict.
_ESTIMATE_MARGIN = 0.2
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
            threshold is missed with a probability below 0.001, a closer one more rarely still.

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


class _Components:
    """Union-find over 0..count-1 whose root is the smallest member."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def find(self, item: int) -> int:
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(self, first: int, second: int) -> None:
        low, high = sorted((self.find(first), self.find(second)))
        self._parent[high] = low


def _components(normal_forms: Sequence[str], threshold: float) -> list[int]:
    """Root of each distinct normal form."""
    count = len(normal_forms)
    if threshold == 0.0:
        return [0] * count
    signatures = _sign(normal_forms)
    components = _Components(count)
    refuted: set[tuple[int, int]] = set()
    for bucket in _buckets(signatures, _band_rows(threshold)):
        _link_bucket(bucket, normal_forms, signatures, threshold, components, refuted)
    return [components.find(index) for index in range(count)]


def _sign(normal_forms: Sequence[str]) -> Signatures:
    """MinHash signatures, shape (texts, permutations)."""
    signatures = np.empty((len(normal_forms), _NUM_PERMUTATIONS), dtype=np.uint32)
    for start in range(0, len(normal_forms), _TEXTS_AT_A_TIME):
        piece = normal_forms[start : start + _TEXTS_AT_A_TIME]
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


def _buckets(signatures: Signatures, band_rows: int) -> Iterator[list[int]]:
    """Texts (two or more) whose signatures agree in a whole band, band by band."""
    for start in range(0, _NUM_PERMUTATIONS - band_rows + 1, band_rows):
        band = signatures[:, start : start + band_rows]
        together: dict[bytes, list[int]] = defaultdict(list)
        for index, row in enumerate(band):
            together[row.tobytes()].append(index)
        yield from (bucket for bucket in together.values() if len(bucket) > 1)


def _link_bucket(
    bucket: Sequence[int],
    normal_forms: Sequence[str],
    signatures: Signatures,
    threshold: float,
    components: _Components,
    refuted: set[tuple[int, int]],
) -> None:
    """Join the texts of one bucket that truly are similar; indices in the bucket ascend."""
    for position, first in enumerate(bucket[:-1]):
        root = components.find(first)
        others = [other for other in bucket[position + 1 :] if components.find(other) != root]
        if not others:
            continue
        estimates = (signatures[others] == signatures[first]).mean(axis=1)
        near = estimates >= threshold - _ESTIMATE_MARGIN
        for other in np.asarray(others)[near].tolist():
            pair = (first, other)
            if pair in refuted or components.find(first) == components.find(other):
                continue
            similarity = jaccard(
                _shingles_of(normal_forms[first]), _shingles_of(normal_forms[other])
            )
            if similarity >= threshold:
                components.join(first, other)
            else:
                refuted.add(pair)
