"""Means over seeds with bootstrap intervals; seeds are clusters, so they are resampled whole."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

LEAST_SEEDS = 2
"""Of fewer, no interval can be drawn."""

_CONFIDENCE = 0.95
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def is_above_zero(self) -> bool:
        """Beyond what rounding could make of equal rewards."""
        return self.low > _ROUNDING

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def mean_interval(by_seed: ArrayLike, num_bootstrap: int, seed: int) -> Interval:
    """Percentile bootstrap of the mean over seeds (Efron 1979), resampling seeds.

    For a paired comparison `by_seed` holds differences. Deviations are widened by
    sqrt(n / (n - 1)), because resampling understates the variance of few seeds by that much.

    Args:
        by_seed: One mean for each seed, at least `LEAST_SEEDS`.
        num_bootstrap: How often to resample.
        seed: Keys the resampling: the same numbers give the same interval.
    """
    values = np.asarray(by_seed, dtype=np.float64)
    count = len(values)
    if count < LEAST_SEEDS:
        raise ValueError(f"an interval needs {LEAST_SEEDS} seeds or more, not {count}")
    chosen = np.random.default_rng(seed).integers(count, size=(num_bootstrap, count))
    mean = float(values.mean())
    deviations = (values[chosen].mean(axis=1) - mean) * np.sqrt(count / (count - 1))
    tail = (1.0 - _CONFIDENCE) / 2.0
    low, high = np.quantile(deviations, (tail, 1.0 - tail))
    return Interval(mean, mean + float(low), mean + float(high))
