"""The stage `select`: the best member on seeds of its own, reported on others beside baselines."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from teams_hpc.config import Config
from teams_hpc.config.digest import file_digest
from teams_hpc.errors import WorkError
from teams_hpc.policy.environment import Episode, RewritingWorld, Step, saturated_share
from teams_hpc.policy.statistics import Floats, interval, is_better
from teams_hpc.policy.training import build_world, seeds_of_split
from teams_hpc.rewriting.identity import keyed_seed, keyed_uniform
from teams_hpc.rewriting.operation_policy import (
    MlpPolicy,
    OperationPolicy,
    RoundRobinPolicy,
    UniformPolicy,
    choose,
)
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.reviewer import Reviewer, sanity_accuracy
from teams_hpc.rewriting.seeds import Seed
from teams_hpc.runtime.metrics import Progress
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """Episodes of one policy.

    Attributes:
        by_seed: Mean reward a step of each seed, shape (n,).
        steps: All steps, by step of the episode.
    """

    by_seed: Floats
    steps: list[list[Step]]

    @property
    def operations_by_step(self) -> list[list[int]]:
        return [
            np.bincount([step.operation for step in steps], minlength=len(OPERATIONS)).tolist()
            for steps in self.steps
        ]


def play(
    world: RewritingWorld, policy: OperationPolicy, seeds: Sequence[Seed], purpose: str
) -> Played:
    """Play `policy.num_eval_episodes` episodes of each seed with sampled, keyed choices.

    Two policies played for the same purpose meet the same seeds, keys and uniform numbers.
    """
    settings = world.config.policy
    repeats = settings.num_eval_episodes
    episodes = [
        Episode.begin(f"{keyed_seed(world.config.seed, purpose, seed.id, repeat):x}", seed)
        for seed in seeds
        for repeat in range(repeats)
    ]
    rollout: list[list[Step]] = []
    for number in range(settings.episode_length):
        steps: list[Step] = []
        for start in range(0, len(episodes), settings.num_envs):
            batch = episodes[start : start + settings.num_envs]
            operations = [
                choose(
                    policy.probabilities(world.observe(episode), episode.history),
                    keyed_uniform(episode.key, number, "operation"),
                    "sample",
                )
                for episode in batch
            ]
            steps += world.step(batch, operations)
        rollout.append(steps)
    rewards = np.array([[step.reward for step in steps] for steps in rollout]).mean(axis=0)
    return Played(by_seed=rewards.reshape(len(seeds), repeats).mean(axis=1), steps=rollout)


def select_member(run_dir: RunDir, config: Config, index: int, stop: StopFlag) -> None:
    """Choose the member with the best mean reward on `policy_select`; report on `policy_report`.

    Raises:
        WorkError: The members are not trained.
        StopRequested: Asked to stop between policies.
    """
    if read_manifest(run_dir, "policy") is None:
        raise WorkError("select needs policy, which is not done; run policy first")
    world = build_world(config)
    count = config.policy.num_members
    progress = Progress(run_dir.progress("select"), unit="policies")
    split, seeds = _select_seeds(config)
    scores = []
    policies = [MlpPolicy.load(run_dir.member(i) / "policy.safetensors") for i in range(count)]
    for number, policy in enumerate(policies):
        stop.raise_if_set(f"{number} of {count} members")
        scores.append(float(play(world, policy, seeds, "select").by_seed.mean()))
        progress.update(number + 1, count + 3, f"reward {scores[-1]:.3f}")
    chosen = int(np.argmax(scores))
    report, saturated = _report(world, policies[chosen], stop)
    progress.update(count + 3, count + 3, f"member {chosen}, reward {scores[chosen]:.3f}")
    policies[chosen].save(run_dir.selected_policy)
    probe = Reviewer(world.reviewer.engine, world.reviewer.verdict, world.ledger)
    write_manifest(
        run_dir,
        "select",
        {
            "chosen": chosen,
            "select": {"split": split, "num_seeds": len(seeds), "scores": scores},
            "report": report,
            "sanity_accuracy": sanity_accuracy(probe),
            "saturated_share": saturated,
            "files": {run_dir.selected_policy.name: file_digest(run_dir.selected_policy)},
            "engines": _describe(world),
            "usage": world.ledger.to_json(),
        },
    )


def _select_seeds(config: Config) -> tuple[str, list[Seed]]:
    """Seeds members are chosen on; of a tiny set without such a split, the training seeds."""
    for split in ("policy_select", "policy_train"):
        seeds = seeds_of_split(config, split)
        if seeds:
            if split != "policy_select":
                _log.warning("no seed falls into policy_select: members are chosen on %s", split)
            return split, seeds
    raise WorkError("no seed to choose a member on; raise seeds.limit or give more seeds")


def _report(
    world: RewritingWorld, policy: MlpPolicy, stop: StopFlag
) -> tuple[dict[str, Any], float]:
    """The chosen policy beside the baselines, and the share of saturated verdicts."""
    seeds = seeds_of_split(world.config, "policy_report")
    settings = world.config.policy
    report: dict[str, Any] = {
        "num_seeds": len(seeds),
        "num_episodes": settings.num_eval_episodes,
        "policies": {},
        "differences": {},
        "note": "",
    }
    if not seeds:
        report["note"] = "not measurable (n=0): no seed falls into policy_report"
        return report, 0.0
    candidates: Mapping[str, OperationPolicy] = {
        "learned": policy,
        "uniform": UniformPolicy(),
        "round_robin": RoundRobinPolicy(),
    }
    key = keyed_seed(world.config.seed, "report", "bootstrap")
    played: dict[str, Played] = {}
    for name, candidate in candidates.items():
        stop.raise_if_set(f"the report on {len(played)} policies")
        played[name] = play(world, candidate, seeds, "report")
        report["policies"][name] = {
            "mean_reward": interval(played[name].by_seed, settings.num_bootstrap, key),
            "operations_by_step": played[name].operations_by_step,
        }
    for name in ("uniform", "round_robin"):
        difference = interval(
            played["learned"].by_seed - played[name].by_seed, settings.num_bootstrap, key
        )
        report["differences"][name] = {**difference, "is_better": is_better(difference)}
    flat = [step for steps in played["learned"].steps for step in steps]
    return report, saturated_share(flat)


def _describe(world: RewritingWorld) -> dict[str, Any]:
    engines = {"instructor": world.instructor, "reviewer": world.reviewer.engine}
    return {
        role: {"content_id": engine.content_id, "is_model": engine.is_model}
        for role, engine in engines.items()
    }
