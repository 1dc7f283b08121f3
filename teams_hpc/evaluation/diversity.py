"""How varied the data set is, beside the seeds it came from."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teams_hpc.rewriting.near_duplicates import words

_SAMPLE = 400
_HASHED = 4096


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Distinct word n-grams over all of them (Li et al., 2016); None without any n-gram."""
    grams: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        parts = words(text)
        found = list(zip(*(parts[i:] for i in range(n)), strict=False))
        grams.update(found)
        total += len(found)
    return len(grams) / total if total else None


def self_similarity(texts: Sequence[str]) -> float | None:
    """Mean cosine of each text with its most similar other, over word 1- and 2-gram counts.

    Counts are hashed into 4,096 places; at most 400 texts, evenly spread, are compared.
    """
    if len(texts) < 2:
        return None
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(_SAMPLE, len(texts))).astype(int))
    vectors = text_vectors([texts[index] for index in chosen])
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.maximum(norms, 1e-12)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1.0)
    return float(cosines.max(axis=1).mean())


def text_vectors(texts: Sequence[str]) -> NDArray[np.float64]:
    """Counts of word 1- and 2-grams, hashed into 4,096 places, (texts, 4096)."""
    vectors = np.zeros((len(texts), _HASHED))
    for row, text in enumerate(texts):
        parts = words(text)
        for gram in [*parts, *(f"{a} {b}" for a, b in itertools.pairwise(parts))]:
            vectors[row, _bucket(gram)] += 1.0
    return vectors


def _bucket(gram: str) -> int:
    value = 0
    for byte in gram.encode():
        value = (value * 257 + byte) % 1_000_003
    return value % _HASHED


def length_quantiles(texts: Sequence[str]) -> dict[str, float]:
    """Words a text: minimum, quartiles, maximum; empty without texts."""
    if not texts:
        return {}
    counts = [len(text.split()) for text in texts]
    values = np.quantile(counts, [0.0, 0.25, 0.5, 0.75, 1.0])
    return dict(zip(("min", "q1", "median", "q3", "max"), map(float, values), strict=True))


def describe(texts: Sequence[str]) -> dict[str, Any]:
    """All measures of one set of texts."""
    return {
        "num_texts": len(texts),
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
        "self_similarity": self_similarity(texts),
        "words": length_quantiles(texts),
    }


def operation_counts(operations: Sequence[int], names: Sequence[str]) -> dict[str, int]:
    """Rows by operation."""
    counts = Counter(int(code) for code in operations)
    return {name: counts[code] for code, name in enumerate(names)}
