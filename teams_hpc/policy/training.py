"""The stage `policy`: independently seeded members, each resumable at every iteration."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from teams_hpc.config import Config
from teams_hpc.config.digest import file_digest
from teams_hpc.errors import CorruptFileError, RunInUseError, SeedError
from teams_hpc.llm.base import RoleName
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.load import load_engines
from teams_hpc.policy.environment import Episode, RewritingWorld, Step, saturated_share
from teams_hpc.policy.learner import (
    RewritingVecEnv,
    Tensors,
    build_trpo,
    export_actor,
    restore_tensors,
    run_iteration,
    state_tensors,
    summarise,
)
from teams_hpc.rewriting.identity import keyed_seed
from teams_hpc.rewriting.reviewer import SANITY_ACCURACY, Reviewer, ZeroReason, sanity_accuracy
from teams_hpc.rewriting.seeds import Seed, read_seeds
from teams_hpc.rewriting.splits import split_seeds
from teams_hpc.runtime.metrics import Progress, append_metrics, read_metrics
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import read_json, remove_leftovers, replacing, write_json, write_text
from teams_hpc.storage.lease import Lease
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest

_log = logging.getLogger(__name__)
_SATURATED_WARNING = 0.95
_LEASE_WAIT_S = 10.0


def seeds_of_split(config: Config, split: str) -> list[Seed]:
    """Seeds of one split, in file order."""
    seeds = read_seeds(config.seeds.path, config.seeds.limit).seeds
    splits = split_seeds(seeds, config.seeds, config.seed)
    return [seed for seed in seeds if splits[seed.id] == split]


def build_world(config: Config) -> RewritingWorld:
    """Load instructor and reviewer."""
    instructor, judge = load_engines(config.instructor, config.reviewer)
    return RewritingWorld(config, instructor, Reviewer(judge, config.reviewer.verdict, Ledger()))


def train_member(run_dir: RunDir, config: Config, index: int, stop: StopFlag) -> None:
    """Train one member to the end of `policy.iterations`.

    An iteration is a pure function of (parameters, optimiser state, member, iteration), so a
    member that was killed continues with the numbers of an uninterrupted one.

    Raises:
        RunInUseError: Another live process trains this member.
        SeedError: No seed falls into `policy_train`.
        StopRequested: Asked to stop between iterations.
    """
    member = _Member(run_dir, config, index)
    with Lease(run_dir.leases / f"policy-{index:03d}", config.site.lease_s) as lease:
        if not lease.acquire_within(_LEASE_WAIT_S):
            raise RunInUseError(f"{member.folder} is being worked on by another process")
        remove_leftovers(member.folder)
        if not member.result.exists():
            member.train(stop)
    _finish_stage(run_dir, config)


@dataclass(slots=True)
class _Checkpoint:
    """All there is to know after an iteration."""

    iteration: int
    tensors: Tensors
    ledger: Ledger


@dataclass(slots=True)
class _Member:
    run_dir: RunDir
    config: Config
    index: int

    @property
    def folder(self) -> Path:
        return self.run_dir.member(self.index)

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def started(self) -> Path:
        """Which iteration was begun, and how often."""
        return self.folder / "started.json"

    def train(self, stop: StopFlag) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = self.config.policy
        train_seeds = seeds_of_split(self.config, "policy_train")
        if not train_seeds:
            raise SeedError("no seed falls into policy_train; raise seeds.limit or give more seeds")
        world = build_world(self.config)
        self._check_reviewer(world)
        iteration = 0
        env = RewritingVecEnv(world, lambda number: self._episode(train_seeds, iteration, number))
        model = build_trpo(
            env, settings, keyed_seed(self.config.seed, "policy", self.index, "initial")
        )
        found = self._load_checkpoint()
        if found is not None:
            restore_tensors(model, found.tensors)
            world.ledger.merge(found.ledger)
            iteration = found.iteration
        self._cut_metrics(iteration)
        progress = Progress(self.run_dir.progress(f"policy-{self.index:03d}"), unit="iterations")
        progress.update(iteration, settings.iterations)
        while iteration < settings.iterations:
            stop.raise_if_set(f"{iteration} of {settings.iterations} iterations")
            attempts = self._note_start(iteration)
            before = _calls_by_row(world.ledger)
            numbers = run_iteration(model, self._key(iteration, "iteration"))
            calls = _calls_by_row(world.ledger) - before
            for row, count in calls.items():  # earlier attempts asked for as much, to no avail
                world.ledger.of(*row).in_doubt += (attempts - 1) * count
            line = {
                "iteration": iteration,
                **summarise(env.steps),
                **numbers,
                "calls": calls.total(),
            }
            line |= _zero_counts(env.steps)
            append_metrics(self.metrics, line)
            iteration += 1
            self._save_checkpoint(_Checkpoint(iteration, state_tensors(model), world.ledger))
            progress.update(iteration, settings.iterations, f"reward {line['mean_reward']:.3f}")
        self._finish(model)

    def _key(self, *parts: str | int) -> int:
        return keyed_seed(self.config.seed, "policy", self.index, *parts)

    def _episode(self, seeds: Sequence[Seed], iteration: int, number: int) -> Episode:
        chosen = seeds[self._key(iteration, number, "seed") % len(seeds)]
        return Episode.begin(f"{self._key(iteration, number, 'episode'):x}", chosen)

    def _check_reviewer(self, world: RewritingWorld) -> None:
        """Judge the sanity set once a start; these calls are not the member's own."""
        probe = Reviewer(world.reviewer.engine, world.reviewer.verdict, Ledger())
        accuracy = sanity_accuracy(probe)
        if accuracy < SANITY_ACCURACY:
            _log.warning(
                "the reviewer judges only %.2f of plain cases right (%.1f is needed): its rewards "
                "mean little; try another reviewer.model",
                accuracy,
                SANITY_ACCURACY,
            )

    def _note_start(self, iteration: int) -> int:
        """Say durably that an iteration begins; returns how often it did."""
        note = read_json(self.started) if self.started.exists() else {}
        attempts = int(note["attempts"]) + 1 if note.get("iteration") == iteration else 1
        write_json(self.started, {"iteration": iteration, "attempts": attempts})
        return attempts

    def _load_checkpoint(self) -> _Checkpoint | None:
        if not self.checkpoint.exists():
            return None
        try:
            with safe_open(self.checkpoint, framework="pt") as file:
                notes = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            ledger = Ledger.from_json(json.loads(notes["usage"]))
            return _Checkpoint(int(notes["iteration"]), tensors, ledger)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CorruptFileError(
                f"{self.checkpoint} is damaged ({error}); run again with --rerun-from policy"
            ) from None

    def _save_checkpoint(self, state: _Checkpoint) -> None:
        usage = state.ledger.to_json()
        notes = {"iteration": str(state.iteration), "usage": json.dumps(usage)}
        with replacing(self.checkpoint) as temporary:
            save_file(state.tensors, temporary, metadata=notes)
        write_json(self.folder / "usage.json", usage)

    def _cut_metrics(self, iteration: int) -> None:
        """Drop lines of iterations that the checkpoint does not know of."""
        lines = [line for line in read_metrics(self.metrics) if line["iteration"] < iteration]
        write_text(self.metrics, "".join(f"{json.dumps(line)}\n" for line in lines))

    def _finish(self, model: Any) -> None:
        digest = read_json(self.run_dir.inputs("policy"))["digest"]
        metadata = {
            "observation": self.config.policy.observation,
            "member": str(self.index),
            "digest": digest,
        }
        path = self.folder / "policy.safetensors"
        export_actor(model, metadata).save(path)
        last = list(read_metrics(self.metrics))[-1]
        if last["saturated_share"] > _SATURATED_WARNING:
            _log.warning(
                "%.0f %% of verdicts are saturated: the reward hardly tells rewrites apart",
                100 * last["saturated_share"],
            )
        write_json(
            self.result,
            {
                "digest": digest,
                "member": self.index,
                "final_reward": last["mean_reward"],
                "policy_sha256": file_digest(path),
                "metrics_sha256": file_digest(self.metrics),
                "usage": read_json(self.folder / "usage.json"),
            },
        )


def _calls_by_row(ledger: Ledger) -> Counter[tuple[RoleName, str]]:
    return Counter({row: usage.calls for row, usage in ledger.rows.items()})


def _zero_counts(rollout: Sequence[Sequence[Step]]) -> dict[str, Any]:
    flat = [step for steps in rollout for step in steps]
    zeros = {
        str(reason): sum(step.zero is reason for step in flat)
        for reason in ZeroReason
        if reason is not ZeroReason.NONE
    }
    return {"zero_rewards": zeros, "saturated_share": saturated_share(flat)}


def _finish_stage(run_dir: RunDir, config: Config) -> None:
    """Write the stage's manifest once every member has its result."""
    paths = [run_dir.member(i) / "result.json" for i in range(config.policy.num_members)]
    if read_manifest(run_dir, "policy") is not None or not all(path.exists() for path in paths):
        return
    results = [read_json(path) for path in paths]
    ledger = Ledger()
    files = {}
    for path, result in zip(paths, results, strict=True):
        ledger.merge(Ledger.from_json(result.pop("usage")))
        files[f"{path.parent.name}/policy.safetensors"] = result["policy_sha256"]
        files[f"{path.parent.name}/metrics.jsonl"] = result["metrics_sha256"]
    write_manifest(
        run_dir, "policy", {"members": results, "files": files, "usage": ledger.to_json()}
    )
