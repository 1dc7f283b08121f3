"""The stage `policy`: one member is trained by one process, and resumes exactly.

The checkpoint commits an iteration. A kill before it leaves at most a line too many in
`metrics.jsonl`, which the next start cuts off, and calls that are counted as in doubt.
"""

import logging
from pathlib import Path
from typing import Any

import torch as th

from teams_hpc.config import Config
from teams_hpc.config.digest import file_digest
from teams_hpc.errors import CorruptFileError, RunInUseError, SeedError, UsageError
from teams_hpc.llm.base import Engine, RoleName
from teams_hpc.llm.ledger import Ledger
from teams_hpc.policy.attempts import begin_attempt
from teams_hpc.policy.checkpoint import Checkpoint
from teams_hpc.policy.environment import World
from teams_hpc.policy.learner import Learner
from teams_hpc.policy.setting import build_world, loaded_engines, make_observer, seeds_by_split
from teams_hpc.policy.vec_env import RewritingVecEnv
from teams_hpc.rewriting.reviewer import SANITY_ACCURACY, SANITY_CALLS, sanity_accuracy
from teams_hpc.rewriting.seeds import Seed
from teams_hpc.runtime.metrics import Progress, append_metrics, read_metrics
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import (
    naming_disk_faults,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)
from teams_hpc.storage.lease import Lease
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest

MOST_SATURATED = 0.95
"""With more saturated verdicts than this, rewards hardly grade rewrites."""

_FINAL_ITERATIONS = 10
_ROLES: tuple[RoleName, ...] = ("instructor", "reviewer")
_log = logging.getLogger(__name__)


def train_member(run_dir: RunDir, config: Config, index: int, stop: StopFlag) -> None:
    """Train member `index`; whichever finds all members done declares the stage done.

    Raises:
        StopRequested: Asked to stop, between two iterations.
        UsageError: There is no such member.
        RunInUseError: Another live process trains this member.
        SeedError: No seed fell into the split that the policy is trained on.
        EngineError: A model can't be loaded or failed.
    """
    policy = config.policy
    if not 0 <= index < policy.num_tasks:
        of_variants = f" for each of {len(policy.variants)} policy.variants"
        raise UsageError(
            f"policy member {index} doesn't exist; policy.num_members is {policy.num_members}"
            f"{of_variants if policy.variants else ''}, so the last is {policy.num_tasks - 1}"
        )
    folder = run_dir.member(index)
    with Lease(run_dir.leases / f"policy-{index:03d}", config.site.lease_s) as lease:
        if not lease.outlast():
            raise RunInUseError(f"{folder} is being worked on by another process")
        if not (folder / "result.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            run_dir.metrics.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            with loaded_engines(config) as engines:
                _train(run_dir, config, index, engines, lease, stop)
    _finish_stage(run_dir, config)


def _train(
    run_dir: RunDir,
    config: Config,
    index: int,
    engines: tuple[Engine, Engine],
    lease: Lease,
    stop: StopFlag,
) -> None:
    seeds = _training_seeds(config)
    ledger = Ledger()
    plan = config.policy.member(index)
    observer = make_observer(plan.settings, engines[0])
    world = build_world(config, engines, ledger, observer)
    # More threads than one would slow so small a network down, and change its last bits. Engines
    # have their own number.
    th.set_num_threads(1)
    environment = RewritingVecEnv(world, seeds)
    run_seed = config.seed if plan.seed is None else plan.seed
    learner = Learner(environment, plan.settings, (run_seed, "policy", plan.number))
    member = _Member(run_dir.member(index), config, index, world, learner)
    member.resume()
    progress = Progress(run_dir.progress(f"policy-{index:03d}"), unit="iterations")
    total = config.policy.iterations
    progress.update(member.iteration, total)
    while member.iteration < total:
        stop.raise_if_set(f"{member.iteration} of {total} iterations")
        lease.refuse_if_lost(f"policy member {index}")
        metrics = member.advance()
        progress.update(member.iteration, total, f"reward {metrics['mean_reward']:.3f}")
    member.finish(len(seeds))


def _training_seeds(config: Config) -> list[Seed]:
    seeds = seeds_by_split(config)["policy_train"]
    if not seeds:
        raise SeedError(
            "no seed fell into the split policy_train, so there is nothing to train the policy "
            "on; give more seeds, raise seeds.policy_train_share, or set generate.policy=uniform"
        )
    return seeds


class _Member:
    """A member's learner with the files that make its progress durable."""

    def __init__(
        self, folder: Path, config: Config, index: int, world: World, learner: Learner
    ) -> None:
        self.iteration = 0
        self._folder = folder
        self._config = config
        self._index = index
        self._world = world
        self._learner = learner
        self._sanity_accuracy = 0.0
        self._has_warned = False

    def resume(self) -> None:
        """Go back to the last checkpoint, or make the first one."""
        found = Checkpoint.load(self._folder / "state.safetensors")
        if found is None:
            bound = Ledger()
            bound.of("reviewer", self._world.reviewer.engine.content_id).in_doubt += SANITY_CALLS
            self._ledger.merge(begin_attempt(self._note, "sanity", bound))
            self._sanity_accuracy = sanity_accuracy(self._world.reviewer)
            self._trim_metrics()
            self._commit()
        else:
            self._learner.restore(found.tensors)
            self._ledger.merge(found.usage)
            self.iteration = found.iteration
            self._sanity_accuracy = found.sanity_accuracy
            self._trim_metrics()
            _log.info("going on after iteration %d", self.iteration)
        if self._sanity_accuracy < SANITY_ACCURACY:
            _log.warning(
                "the reviewer judges %.0f %% of plain cases right, fewer than %.0f %%: its rewards "
                "mean little; try another reviewer.model or reviewer.verdict",
                100 * self._sanity_accuracy,
                100 * SANITY_ACCURACY,
            )

    @property
    def _ledger(self) -> Ledger:
        return self._world.ledger

    @property
    def _note(self) -> Path:
        return self._folder / "started.json"

    @property
    def _metrics_path(self) -> Path:
        return self._folder / "metrics.jsonl"

    def advance(self) -> dict[str, Any]:
        """One iteration, durable when this returns."""
        number = self.iteration + 1
        bound = self._world.most_calls(self._config.policy.num_envs)
        self._ledger.merge(begin_attempt(self._note, f"iteration {number}", bound))
        before = {role: self._ledger.total(role).calls for role in _ROLES}
        metrics = self._learner.iterate(number)
        metrics["calls"] = {
            role: self._ledger.total(role).calls - count for role, count in before.items()
        }
        with naming_disk_faults(self._metrics_path):
            append_metrics(self._metrics_path, metrics)
        self.iteration = number
        self._commit()
        self._warn_if_saturated(metrics)
        return metrics

    def _commit(self) -> None:
        Checkpoint(
            iteration=self.iteration,
            tensors=self._learner.state(),
            usage=self._ledger,
            sanity_accuracy=self._sanity_accuracy,
        ).save(self._folder / "state.safetensors")
        write_json(self._folder / "usage.json", self._ledger.to_json())

    def _trim_metrics(self) -> None:
        """Cut off metrics of an iteration that was not committed."""
        path = self._metrics_path
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if len(lines) < self.iteration:
            raise CorruptFileError(
                f"{path} has {len(lines)} lines, but {self.iteration} iterations were done; "
                "run again with --rerun-from policy"
            )
        write_text(path, b"".join(line + b"\n" for line in lines[: self.iteration]).decode())

    def _warn_if_saturated(self, metrics: dict[str, Any]) -> None:
        # Generated verdicts are 0 or 1 by nature; that says nothing about them.
        if self._has_warned or self._config.reviewer.verdict == "generated":
            return
        if metrics["saturated_share"] > MOST_SATURATED:
            self._has_warned = True
            _log.warning(
                "%.0f %% of verdicts in iteration %d are below 0.02 or above 0.98: rewards hardly "
                "grade rewrites",
                100 * metrics["saturated_share"],
                self.iteration,
            )

    def finish(self, num_seeds: int) -> None:
        """Export the policy and write the result, last."""
        folder = self._folder
        metadata = {**self._world.observer.metadata(), "member": str(self._index)}
        self._learner.export(metadata).save(folder / "policy.safetensors")
        rewards = [line["mean_reward"] for line in read_metrics(self._metrics_path)]
        final = rewards[-_FINAL_ITERATIONS:]
        files = ("policy.safetensors", "metrics.jsonl")
        write_json(
            folder / "result.json",
            {
                "member": self._index,
                **self._variant(),
                "iterations": self.iteration,
                "num_seeds": num_seeds,
                "mean_reward_first": rewards[0],
                "mean_reward_final": sum(final) / len(final),
                "sanity_accuracy": self._sanity_accuracy,
                "files": {name: file_digest(folder / name) for name in files},
                "usage": self._ledger.to_json(),
            },
        )

    def _variant(self) -> dict[str, str]:
        """Which variant it belongs to, if there are any."""
        variant = self._config.policy.member(self._index).variant
        return {"variant": variant} if variant else {}


def _finish_stage(run_dir: RunDir, config: Config) -> None:
    """Write the manifest if every member is done; two members that both do write the same."""
    folders = [run_dir.member(index) for index in range(config.policy.num_tasks)]
    if read_manifest(run_dir, "policy") is not None:
        return
    if not all((folder / "result.json").exists() for folder in folders):
        return
    results = [read_json(folder / "result.json") for folder in folders]
    usage = Ledger()
    for result in results:
        usage.merge(Ledger.from_json(result["usage"]))
    write_manifest(
        run_dir,
        "policy",
        {
            "num_seeds": results[0]["num_seeds"],
            "members": [
                {key: value for key, value in result.items() if key not in ("files", "usage")}
                for result in results
            ],
            "files": {
                f"{folder.name}/{name}": digest
                for folder, result in zip(folders, results, strict=True)
                for name, digest in result["files"].items()
            },
            "usage": usage.to_json(),
        },
    )
