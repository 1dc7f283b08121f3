"""Rank statistics against scikit-learn, the attack on known cases, and diversity by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from teams_hpc.evaluation.diversity import distinct_n, length_quantiles, self_similarity
from teams_hpc.evaluation.losses import ExampleLosses
from teams_hpc.evaluation.membership import attack, control_auc, judge_controls
from teams_hpc.evaluation.statistics import (
    auc,
    cluster_bootstrap_auc,
    roc_curve,
    true_positive_rate,
)


def losses(values: np.ndarray, first_row: int = 0) -> ExampleLosses:
    count = len(values)
    return ExampleLosses(
        rows=np.arange(first_row, first_row + count),
        nll=values * 10.0,
        tokens=np.full(count, 10),
    )


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_that_of_scikit_learn_ties_included(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positives = rng.integers(0, 12, 40).astype(float) + 1.5
    negatives = rng.integers(0, 12, 70).astype(float)
    labels = [1] * 40 + [0] * 70
    expected = roc_auc_score(labels, np.concatenate([positives, negatives]))
    assert auc(positives, negatives) == pytest.approx(expected, abs=1e-12)


def test_true_positive_rate_at_one_percent() -> None:
    negatives = np.arange(200.0)  # 1 % of 200 may lie above the threshold: 199 and 198
    assert true_positive_rate(np.array([197.5, 198.5, 250.0, 3.0]), negatives, 0.01) == 0.75
    assert true_positive_rate(np.array([1.0, 2.0]), negatives, 0.01) == 0.0


def test_the_roc_curve_rises_and_its_area_is_the_auc() -> None:
    rng = np.random.default_rng(1)
    positives, negatives = rng.normal(1, 1, 400), rng.normal(0, 1, 400)
    points = np.array(roc_curve(positives, negatives))
    assert (np.diff(points, axis=0) >= 0).all()
    area = np.trapezoid(points[:, 1], points[:, 0])
    assert area == pytest.approx(auc(positives, negatives), abs=0.01)


def test_intervals_over_clusters_are_wider_than_over_rows() -> None:
    rng = np.random.default_rng(2)
    centres = rng.normal(0, 1, 40)
    values = np.repeat(centres, 8) + rng.normal(0, 0.1, 320)
    clusters = [str(number) for number in np.repeat(np.arange(40), 8)]
    rows = [str(number) for number in range(320)]
    others = rng.normal(0, 1, 300)
    other_rows = [f"o{number}" for number in range(300)]
    widths = []
    for names in (clusters, rows):
        found = cluster_bootstrap_auc(values, names, others, other_rows, num_bootstrap=300, seed=1)
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    assert widths[0] > 1.5 * widths[1]


def test_the_attack_finds_memorised_members_and_nothing_elsewhere() -> None:
    rng = np.random.default_rng(3)
    seeds = [f"s{row // 4}" for row in range(600)]
    known = attack(
        losses(rng.normal(1, 0.3, 300)), losses(rng.normal(3, 0.3, 300), 300), seeds,
        num_bootstrap=100, seed=0,
    )  # fmt: skip
    assert known.auc is not None
    assert known.auc.value > 0.99
    assert known.tpr_at_1_percent_fpr == 1.0
    assert known.advantage == pytest.approx(0.5, abs=0.01)
    blind = attack(
        losses(rng.normal(2, 0.3, 300)), losses(rng.normal(2, 0.3, 300), 300), seeds,
        num_bootstrap=100, seed=0,
    )  # fmt: skip
    assert blind.auc is not None
    assert blind.auc.low < 0.5 < blind.auc.high
    assert judge_controls(blind, 0.95) == []
    assert len(judge_controls(known, 0.6)) == 2


def test_too_few_examples_are_not_measurable() -> None:
    seeds = [f"s{row}" for row in range(40)]
    few = attack(losses(np.ones(30)), losses(np.ones(5), 30), seeds, num_bootstrap=100, seed=0)
    assert (few.auc, few.tpr_at_1_percent_fpr, few.advantage) == (None, None, None)
    assert few.note == "not measurable (n=5 seeds; 10 are needed)"
    some = attack(losses(np.ones(20)), losses(np.ones(20), 20), seeds, num_bootstrap=100, seed=0)
    assert some.auc is not None
    assert some.tpr_at_1_percent_fpr is None
    assert "n=20" in some.note
    assert control_auc([], [1.0]) is None


def test_diversity_by_hand() -> None:
    assert distinct_n(["a b a", "a b"], 1) == 2 / 5
    assert distinct_n(["a b a", "a b"], 2) == 2 / 3
    assert distinct_n(["a"], 2) is None
    assert self_similarity(["the cat sat", "the cat sat", "the cat sat"]) == pytest.approx(1.0)
    varied = self_similarity(["red fox", "blue whale", "green tea"])
    assert varied is not None
    assert varied < 0.1
    assert length_quantiles(["a", "a b c"]) == {
        "min": 1.0, "q1": 1.5, "median": 2.0, "q3": 2.5, "max": 3.0,
    }  # fmt: skip
