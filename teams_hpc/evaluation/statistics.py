"""Rank statistics with intervals over clusters: pure functions of arrays.

Rows that come from one seed are not independent, so intervals resample whole seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MIN_CLUSTERS = 10
"""Fewer seeds than this on a side and an area under the curve is not reported."""

MIN_FOR_ONE_PERCENT = 100
"""A false-positive rate of 1 % needs so many non-members to exist at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


def auc(positives: Floats, negatives: Floats) -> float:
    """Area under the ROC curve: P(positive > negative) + P(equal) / 2 (Mann and Whitney)."""
    values = np.concatenate([positives, negatives])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(ranks[inverse][: len(positives)].sum())
    n, m = len(positives), len(negatives)
    return (rank_sum - n * (n + 1) / 2) / (n * m)


def true_positive_rate(positives: Floats, negatives: Floats, false_positive_rate: float) -> float:
    """Share of positives above the threshold that so many negatives exceed."""
    threshold = np.sort(negatives)[::-1][int(false_positive_rate * len(negatives))]
    return float(np.mean(positives > threshold))


def roc_curve(positives: Floats, negatives: Floats, num_points: int = 101) -> list[list[float]]:
    """Points (false-positive rate, true-positive rate) at evenly spaced false-positive rates."""
    ordered = np.sort(negatives)
    points = []
    for rate in np.linspace(0.0, 1.0, num_points):
        threshold = np.quantile(ordered, 1.0 - rate)
        points.append([float(rate), float(np.mean(positives > threshold))])
    points[-1] = [1.0, 1.0]
    return points


def cluster_bootstrap_auc(
    positives: Floats,
    positive_clusters: Sequence[str],
    negatives: Floats,
    negative_clusters: Sequence[str],
    *,
    num_bootstrap: int,
    seed: int,
) -> Interval:
    """AUC with an interval from resampling whole clusters on both sides."""
    generator = np.random.Generator(np.random.Philox(seed))
    sides = [_groups(positives, positive_clusters), _groups(negatives, negative_clusters)]
    draws = np.empty(num_bootstrap)
    for index in range(num_bootstrap):
        sample = [
            np.concatenate([side[i] for i in generator.integers(len(side), size=len(side))])
            for side in sides
        ]
        draws[index] = auc(*sample)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value=auc(positives, negatives), low=float(low), high=float(high))


def _groups(values: Floats, clusters: Sequence[str]) -> list[Floats]:
    names, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    return [values[inverse == number] for number in range(len(names))]
