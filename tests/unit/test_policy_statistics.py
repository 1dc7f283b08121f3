"""Bootstrap intervals over seeds: right in the mean, honest where there is nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teams_hpc.policy.statistics import mean_interval


@given(st.floats(0.0, 1.0), st.integers(2, 40), st.integers(0, 2**62))
def test_equal_rewards_are_never_better(reward: float, count: int, seed: int) -> None:
    interval = mean_interval([reward - reward] * count, 200, seed)
    assert not interval.is_above_zero
    assert mean_interval([reward] * count, 200, seed).value == pytest.approx(reward)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    samples = random.normal(0.0, 1.0, size=(400, 20))
    intervals = [mean_interval(sample, 300, number) for number, sample in enumerate(samples)]
    covered = np.mean([found.low <= 0.0 <= found.high for found in intervals])
    assert 0.90 <= covered <= 0.98
    assert np.mean([found.is_above_zero for found in intervals]) < 0.06


def test_a_real_difference_is_found_and_the_numbers_repeat() -> None:
    differences = np.random.default_rng(1).normal(0.3, 0.2, size=30)
    first, second = (mean_interval(differences, 500, 9) for _ in range(2))
    assert first == second
    assert first.is_above_zero
    assert first.value == pytest.approx(differences.mean())
    assert first.low < first.value < first.high
    assert mean_interval(differences, 500, 10) != first


def test_of_one_seed_no_interval_can_be_drawn() -> None:
    with pytest.raises(ValueError, match="2 seeds or more, not 1"):
        mean_interval([0.5], 100, 0)
