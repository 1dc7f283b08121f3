"""Playing a policy: sampled episodes on given seeds, the same luck for every policy."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teams_hpc.policy.environment import Episode, World
from teams_hpc.policy.tally import ZERO_REASONS, Tally
from teams_hpc.rewriting.identity import keyed_uniform
from teams_hpc.rewriting.kinds import KINDS, instruction_kind
from teams_hpc.rewriting.operation_policy import OperationPolicy, choose
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.seeds import Seed


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """A policy's episodes.

    Attributes:
        rewards: (seeds, episodes of each, steps), nested lists.
        operations_by_step: (steps, 6) counts.
        operations_by_kind: (6,) counts by the kind of seed that the episode began with.
        zero_reasons: Why steps earned nothing.
        verdicts: P(Not Equal) of every rewrite that was judged.
    """

    rewards: list[list[list[float]]]
    operations_by_step: list[list[int]]
    zero_reasons: dict[str, int]
    verdicts: list[float]
    operations_by_kind: dict[str, list[int]] = field(default_factory=dict)

    def by_seed(self) -> NDArray[np.float64]:
        """Mean reward a step of each seed, (seeds,)."""
        return np.asarray(np.array(self.rewards, dtype=np.float64).mean(axis=(1, 2)))

    @property
    def reward_by_step(self) -> list[float]:
        means: list[float] = np.array(self.rewards, dtype=np.float64).mean(axis=(0, 1)).tolist()
        return means

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Evaluation":
        return cls(**value)


def evaluate_policy(
    world: World, policy: OperationPolicy, seeds: Sequence[Seed], run_seed: int
) -> Evaluation:
    """Play `num_eval_episodes` from each seed, `num_envs` at a time, with sampled actions.

    Action and sampler seeds are keyed by run seed, seed, episode and step, not by the policy: two
    policies are compared under the same luck.
    """
    settings = world.settings
    length, per_seed = settings.episode_length, settings.num_eval_episodes
    started = [
        Episode.begin((run_seed, "evaluation", seed.id, number), seed)
        for seed in seeds
        for number in range(per_seed)
    ]
    rewards: list[list[float]] = []
    operations = np.zeros((length, len(OPERATIONS)), dtype=np.int64)
    by_kind = {kind: [0] * len(OPERATIONS) for kind in KINDS}
    reasons = dict.fromkeys(ZERO_REASONS, 0)
    verdicts: list[float] = []
    for first in range(0, len(started), settings.num_envs):
        episodes = started[first : first + settings.num_envs]
        kinds = [instruction_kind(episode.texts[0][0]) for episode in episodes]
        tally = _play(world, policy, episodes)
        rewards += [list(episode) for episode in zip(*tally.rewards, strict=True)]
        operations += np.array(tally.operations_by_step)
        reasons = {name: reasons[name] + count for name, count in tally.zero_reasons.items()}
        verdicts += tally.verdicts
        for step in tally.operations:
            for kind, operation in zip(kinds, step, strict=True):
                by_kind[kind][operation] += 1
    grouped = [rewards[i : i + per_seed] for i in range(0, len(rewards), per_seed)]
    return Evaluation(
        rewards=grouped,
        operations_by_step=operations.tolist(),
        zero_reasons=reasons,
        verdicts=verdicts,
        operations_by_kind={kind: counts for kind, counts in by_kind.items() if any(counts)},
    )


def _play(world: World, policy: OperationPolicy, episodes: Sequence[Episode]) -> Tally:
    tally = Tally()
    for step in range(world.settings.episode_length):
        operations = [
            choose(
                policy.probabilities(world.observation(episode), episode.history),
                keyed_uniform(*episode.key, step, "action"),
                "sample",
            )
            for episode in episodes
        ]
        tally.add(operations, world.step(episodes, operations))
    return tally
