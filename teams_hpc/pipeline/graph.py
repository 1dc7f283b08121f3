"""The stages of a run and what each reads."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from teams_hpc.config import Config
from teams_hpc.errors import UsageError
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.run_dir import RunDir

StageFunction = Callable[[RunDir, Config, int, StopFlag], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One node of the graph.

    Attributes:
        name: Also its folder in the run directory.
        entry: `module:function`, imported in the stage's own process.
        reads: Stages whose manifests it reads.
        form: `members` and `workers` are many processes, `ranks` one world, `one` a single process.
        does: What it does, for people.
    """

    name: str
    entry: str
    reads: tuple[str, ...]
    form: Literal["members", "workers", "ranks", "one"]
    does: str

    def load(self) -> StageFunction:
        """Import the stage's function."""
        module, _, function = self.entry.partition(":")
        loaded: StageFunction = getattr(importlib.import_module(module), function)
        return loaded


_STAGES = (
    Stage(
        name="policy",
        entry="teams_hpc.policy.training:train_member",
        reads=(),
        form="members",
        does="train policies",
    ),
    Stage(
        name="select",
        entry="teams_hpc.policy.selection:select_member",
        reads=("policy",),
        form="one",
        does="choose the best policy",
    ),
    Stage(
        name="generate",
        entry="teams_hpc.generation.worker:generate",
        reads=("select",),
        form="workers",
        does="evolve and answer the seeds",
    ),
    Stage(
        name="dataset",
        entry="teams_hpc.dataset.build:build_dataset",
        reads=("generate",),
        form="one",
        does="merge, filter and pack",
    ),
    Stage(
        name="sft",
        entry="teams_hpc.sft.training:train",
        reads=("dataset",),
        form="ranks",
        does="fine-tune the model",
    ),
    Stage(
        name="evaluate",
        entry="teams_hpc.evaluation.run:evaluate",
        reads=("generate", "dataset", "sft"),
        form="one",
        does="measure the result",
    ),
    Stage(
        name="report",
        entry="teams_hpc.report.html:write_report",
        reads=("select", "generate", "dataset", "sft", "evaluate"),
        form="one",
        does="write the report",
    ),
)
STAGE_NAMES = tuple(stage.name for stage in _STAGES)


def stage_graph(config: Config) -> tuple[Stage, ...]:
    """The stages of this configuration, in order; without a learned policy none is trained."""
    if config.generate.policy == "learned":
        return _STAGES
    without = {"policy", "select"}
    return tuple(
        replace(stage, reads=tuple(name for name in stage.reads if name not in without))
        for stage in _STAGES
        if stage.name not in without
    )


def find_stage(config: Config, name: str) -> Stage:
    """The stage called `name`.

    Raises:
        UsageError: This run has no such stage.
    """
    for stage in stage_graph(config):
        if stage.name == name:
            return stage
    names = ", ".join(stage.name for stage in stage_graph(config))
    raise UsageError(f"no stage {name!r} in this run; there are: {names}")


def task_name(stage: Stage, index: int) -> str:
    """Name of a task's log and progress: `policy-003`, `sft-rank1`, or the stage's own name."""
    if stage.form in ("members", "workers"):
        return f"{stage.name}-{index:03d}"
    return f"{stage.name}-rank{index}" if index else stage.name
