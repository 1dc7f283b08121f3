"""Does the tuned model give away which examples it was trained on?

The attack is by loss (Yeom et al., 2018): an example with a low loss is called a member. Members
and non-members come from the same pipeline on either side of the seed split. Two controls keep the
number honest: an over-fitted model that the attack must detect, and the untrained base, where it
must find nothing. An AUC below 0.5 is no better than 0.5, so |AUC - 0.5| is reported too.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from teams_hpc.evaluation.losses import ExampleLosses
from teams_hpc.evaluation.statistics import (
    MIN_CLUSTERS,
    MIN_FOR_ONE_PERCENT,
    Interval,
    auc,
    cluster_bootstrap_auc,
    roc_curve,
    true_positive_rate,
)

CONTROL_MUST_REACH = 0.9
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """How well the attack tells members from non-members of one model.

    `auc` and `tpr_at_1_percent_fpr` are None where there are too few examples; `note` says so.
    """

    num_members: int
    num_non_members: int
    num_member_seeds: int
    num_non_member_seeds: int
    auc: Interval | None = None
    tpr_at_1_percent_fpr: float | None = None
    roc: list[list[float]] = field(default_factory=list)
    note: str = ""

    @property
    def advantage(self) -> float | None:
        """|AUC - 0.5|: nought is best."""
        return None if self.auc is None else abs(self.auc.value - 0.5)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "advantage": self.advantage}


def attack(
    members: ExampleLosses,
    non_members: ExampleLosses,
    seed_ids: Sequence[str],
    *,
    num_bootstrap: int,
    seed: int,
) -> Attack:
    """Attack one model.

    Args:
        members: Losses of examples it was trained on.
        non_members: Losses of held-out examples.
        seed_ids: Seed id of every row of `dataset.h5`; the clusters of the bootstrap.
        num_bootstrap: Resamples of the interval.
        seed: Of the bootstrap's generator.
    """
    member_seeds = [seed_ids[row] for row in members.rows]
    other_seeds = [seed_ids[row] for row in non_members.rows]
    found = Attack(
        num_members=len(member_seeds),
        num_non_members=len(other_seeds),
        num_member_seeds=len(set(member_seeds)),
        num_non_member_seeds=len(set(other_seeds)),
    )
    fewest = min(found.num_member_seeds, found.num_non_member_seeds)
    if fewest < MIN_CLUSTERS:
        note = f"not measurable (n={fewest} seeds; {MIN_CLUSTERS} are needed)"
        return replace(found, note=note)
    positives, negatives = -members.per_token, -non_members.per_token
    interval = cluster_bootstrap_auc(
        positives, member_seeds, negatives, other_seeds, num_bootstrap=num_bootstrap, seed=seed
    )
    enough = len(negatives) >= MIN_FOR_ONE_PERCENT
    few = f"TPR at 1 % FPR not measurable (n={len(negatives)}; {MIN_FOR_ONE_PERCENT} are needed)"
    return replace(
        found,
        auc=interval,
        tpr_at_1_percent_fpr=true_positive_rate(positives, negatives, 0.01) if enough else None,
        roc=roc_curve(positives, negatives),
        note="" if enough else few,
    )


def control_auc(member_losses: Sequence[float], other_losses: Sequence[float]) -> float | None:
    """AUC of the over-fitted control; None without examples on both sides."""
    if not member_losses or not other_losses:
        return None
    return auc(-np.asarray(member_losses), -np.asarray(other_losses))


def judge_controls(base: Attack, control: float | None) -> list[str]:
    """What is wrong with the measurement itself, if anything."""
    faults = []
    if control is not None and control < CONTROL_MUST_REACH:
        faults.append(
            f"the attack found only {control:.2f} on the over-fitted control "
            f"({CONTROL_MUST_REACH} is needed): a low number elsewhere means nothing; "
            "raise evaluate.control_steps"
        )
    if base.auc is not None and not base.auc.low <= 0.5 <= base.auc.high:
        faults.append(
            f"the untrained base shows {base.auc.value:.2f} "
            f"({base.auc.low:.2f} to {base.auc.high:.2f}) instead of 0.5: members and non-members "
            "differ by more than membership"
        )
    for fault in faults:
        _log.warning("membership inference: %s", fault)
    return faults
