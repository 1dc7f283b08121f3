"""The stage `select`: the best member on `policy_select`, measured on `policy_report`.

Every evaluation (one policy on one split) is a file of its own, so that a kill repeats one at most.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teams_hpc.config import Config
from teams_hpc.config.digest import file_digest
from teams_hpc.llm.base import Engine
from teams_hpc.llm.ledger import Ledger
from teams_hpc.policy.attempts import begin_attempt
from teams_hpc.policy.rollout import Evaluation, evaluate_policy
from teams_hpc.policy.setting import build_world, loaded_engines, make_observer, seeds_by_split
from teams_hpc.policy.statistics import LEAST_SEEDS, Interval, mean_interval
from teams_hpc.policy.tally import saturated_share
from teams_hpc.rewriting.identity import keyed_seed
from teams_hpc.rewriting.observation import Observer
from teams_hpc.rewriting.operation_policy import (
    MlpPolicy,
    OperationPolicy,
    RoundRobinPolicy,
    UniformPolicy,
)
from teams_hpc.rewriting.reviewer import SANITY_ACCURACY, SANITY_CALLS, sanity_accuracy
from teams_hpc.rewriting.seeds import Seed
from teams_hpc.runtime.metrics import Progress
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import read_json, replacing, write_json
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest

_log = logging.getLogger(__name__)


def select_member(run_dir: RunDir, config: Config, index: int, stop: StopFlag) -> None:
    """Choose a member, compare it with the baselines, and publish its policy.

    Raises:
        StopRequested: Asked to stop, between two evaluations.
        EngineError: A model can't be loaded or failed.
    """
    if read_manifest(run_dir, "select") is not None:
        return
    run_dir.metrics.mkdir(parents=True, exist_ok=True)
    with loaded_engines(config) as engines:
        content = _Selection(run_dir, config, engines, stop).run()
    write_manifest(run_dir, "select", content)


def best_member(scores: Sequence[float]) -> int:
    """The index of the highest score; of equals the first."""
    return max(range(len(scores)), key=lambda member: (scores[member], -member))


class _Selection:
    def __init__(
        self, run_dir: RunDir, config: Config, engines: tuple[Engine, Engine], stop: StopFlag
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._engines = engines
        self._stop = stop
        self._folder = run_dir.evaluations
        self._usage = Ledger()
        self._progress = Progress(run_dir.progress("select"), unit="evaluations")
        self._num_done = 0
        self._observers: dict[tuple[str, int], Observer] = {}

    def run(self) -> dict[str, Any]:
        """All evaluations, and the manifest's content."""
        seeds = seeds_by_split(self._config)
        accuracy = self._sanity_accuracy()
        members = [
            MlpPolicy.load(self._run_dir.member(index) / "policy.safetensors")
            for index in range(self._config.policy.num_tasks)
        ]
        chosen_on = self._choosing_split(seeds)
        evaluations = [
            self._evaluate(f"{chosen_on}-member-{index:03d}", policy, seeds[chosen_on], index)
            for index, policy in enumerate(members)
        ]
        scores = [float(evaluation.by_seed().mean()) for evaluation in evaluations]
        chosen = best_member(scores)
        reported = self._report(seeds["policy_report"], members[chosen], chosen)
        verdicts = [p for evaluation in evaluations for p in evaluation.verdicts]
        verdicts += [p for evaluation in reported.values() for p in evaluation.verdicts]
        return {
            "chosen": chosen,
            "select": self._select_part(chosen_on, evaluations, scores),
            "report": self._report_part(len(seeds["policy_report"]), reported),
            "sanity_accuracy": accuracy,
            "saturated_share": saturated_share(verdicts),
            "engines": {
                role: {"content_id": engine.content_id, "is_model": engine.is_model}
                for role, engine in zip(("instructor", "reviewer"), self._engines, strict=True)
            },
            "files": {"policy.safetensors": self._publish(chosen)},
            "usage": self._usage.to_json(),
        }

    def _choosing_split(self, seeds: Mapping[str, Sequence[Seed]]) -> str:
        if seeds["policy_select"]:
            return "policy_select"
        _log.warning(
            "no seed fell into the split policy_select: the member is chosen on the seeds it was "
            "trained on, which favours over-fitting; give more seeds"
        )
        return "policy_train"

    def _report(
        self, seeds: Sequence[Seed], learned: MlpPolicy, chosen: int
    ) -> dict[str, Evaluation]:
        if len(seeds) < LEAST_SEEDS:
            _log.warning("the policy is not measurable (n=%d seeds in policy_report)", len(seeds))
            return {}
        policies: dict[str, OperationPolicy] = {
            "learned": learned,
            "uniform": UniformPolicy(),
            "round_robin": RoundRobinPolicy(),
        }
        return {
            name: self._evaluate(
                f"policy_report-{name}", policy, seeds, chosen if policy is learned else None
            )
            for name, policy in policies.items()
        }

    def _observer_of(self, member: int) -> Observer:
        """What a member sees; one for all members that see alike, since it remembers texts."""
        settings = self._config.policy.member(member).settings
        key = (settings.observation, settings.embedding_size)
        if key not in self._observers:
            self._observers[key] = make_observer(settings, self._engines[0])
        return self._observers[key]

    def _evaluate(
        self, name: str, policy: OperationPolicy, seeds: Sequence[Seed], member: int | None
    ) -> Evaluation:
        """Play a member, or (None) a baseline, which doesn't look."""
        bound = build_world(self._config, self._engines, Ledger()).most_calls(
            len(seeds) * self._config.policy.num_eval_episodes
        )

        def work(ledger: Ledger) -> dict[str, Any]:
            observer = None if member is None else self._observer_of(member)
            world = build_world(self._config, self._engines, ledger, observer)
            return evaluate_policy(world, policy, seeds, self._config.seed).to_json()

        return Evaluation.from_json(self._once(name, bound, work))

    def _sanity_accuracy(self) -> float:
        bound = Ledger()
        bound.of("reviewer", self._engines[1].content_id).in_doubt += SANITY_CALLS
        accuracy: float = self._once(
            "sanity",
            bound,
            lambda ledger: {
                "accuracy": sanity_accuracy(
                    build_world(self._config, self._engines, ledger).reviewer
                )
            },
        )["accuracy"]
        if accuracy < SANITY_ACCURACY:
            _log.warning("the reviewer judges only %.0f %% of plain cases right", 100 * accuracy)
        return accuracy

    def _once(
        self, name: str, bound: Ledger, work: Callable[[Ledger], dict[str, Any]]
    ) -> dict[str, Any]:
        """The result of `work`, made durable with its usage; read back if it was made before."""
        path = self._folder / f"{name}.json"
        total = self._config.policy.num_tasks + 4
        self._progress.update(self._num_done, total, name)
        if not path.exists():
            self._stop.raise_if_set(f"{self._num_done} of {total} evaluations")
            self._folder.mkdir(parents=True, exist_ok=True)
            ledger = begin_attempt(self._folder / f"{name}.started.json", name, bound)
            write_json(path, {"result": work(ledger), "usage": ledger.to_json()})
        found = read_json(path)
        self._usage.merge(Ledger.from_json(found["usage"]))
        self._num_done += 1
        self._progress.update(self._num_done, total, name)
        result: dict[str, Any] = found["result"]
        return result

    def _interval(self, by_seed: NDArray[np.float64]) -> Interval:
        # One key for all: two policies on the same seeds are resampled alike.
        key = keyed_seed(self._config.seed, "bootstrap")
        return mean_interval(by_seed, self._config.policy.num_bootstrap, key)

    def _select_part(
        self, split: str, evaluations: Sequence[Evaluation], scores: Sequence[float]
    ) -> dict[str, Any]:
        num_seeds = len(evaluations[0].rewards)
        members = []
        for index, (evaluation, score) in enumerate(zip(evaluations, scores, strict=True)):
            member: dict[str, Any] = {"member": index, "score": score, "mean_reward": None}
            if variant := self._config.policy.member(index).variant:
                member["variant"] = variant
            if num_seeds >= LEAST_SEEDS:
                member["mean_reward"] = self._interval(evaluation.by_seed()).as_dict()
            members.append(member)
        note = "" if split == "policy_select" else "policy_select has no seeds: chosen on training"
        return {
            "split": split,
            "note": note,
            "num_seeds": num_seeds,
            "num_episodes": self._config.policy.num_eval_episodes,
            "members": members,
        }

    def _report_part(self, num_seeds: int, evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
        by_seed = {name: evaluation.by_seed() for name, evaluation in evaluations.items()}
        policies = {
            name: {
                "mean_reward": self._interval(by_seed[name]).as_dict(),
                "reward_by_step": evaluation.reward_by_step,
                "operations_by_step": evaluation.operations_by_step,
                "operations_by_kind": evaluation.operations_by_kind,
                "saturated_share": saturated_share(evaluation.verdicts),
                "zero_reasons": evaluation.zero_reasons,
                "by_seed": by_seed[name].tolist(),
            }
            for name, evaluation in evaluations.items()
        }
        differences = {
            name: self._interval(by_seed["learned"] - by_seed[name])
            for name in by_seed
            if name != "learned"
        }
        return {
            "num_seeds": num_seeds,
            "num_episodes": self._config.policy.num_eval_episodes,
            "note": "" if policies else f"not measurable (n={num_seeds})",
            "policies": policies,
            "differences": {
                name: {**interval.as_dict(), "is_better": interval.is_above_zero}
                for name, interval in differences.items()
            },
        }

    def _publish(self, chosen: int) -> str:
        """Copy the chosen policy to where generation reads it; returns its SHA-256."""
        source: Path = self._run_dir.member(chosen) / "policy.safetensors"
        with replacing(self._run_dir.selected_policy) as temporary:
            temporary.write_bytes(source.read_bytes())
        return file_digest(self._run_dir.selected_policy)
