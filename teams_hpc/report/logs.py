"""The logs of a run, those that matter first."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from teams_hpc.config import Config
from teams_hpc.pipeline.graph import Stage, find_stage, stage_graph
from teams_hpc.pipeline.inputs import is_done
from teams_hpc.pipeline.task import error_path
from teams_hpc.report.jobs import RunJobs, TaskState, task_log, task_names
from teams_hpc.report.status import is_held
from teams_hpc.storage.run_dir import RunDir

Group = Literal["failed", "running", "other"]
_GROUPS: tuple[Group, ...] = ("failed", "running", "other")
_TAIL_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskLog:
    """One log.

    Attributes:
        path: The log, or the file that holds the error of a task that wrote none.
        state: Slurm's word with the exit code, or what the files say.
    """

    task: str
    path: Path
    group: Group
    state: str


def find_logs(run_dir: RunDir, config: Config, jobs: RunJobs, only: str | None) -> list[TaskLog]:
    """All logs of a run, or of the stage `only`: failed tasks first, then running ones, the rest.

    Raises:
        UsageError: This run has no stage `only`.
    """
    stages = (find_stage(config, only),) if only else stage_graph(config)
    held = is_held(run_dir)
    logs = [log for stage in stages for log in _stage_logs(run_dir, config, stage, jobs, held)]
    return sorted(logs, key=lambda log: _GROUPS.index(log.group))


def _stage_logs(
    run_dir: RunDir, config: Config, stage: Stage, jobs: RunJobs, held: bool
) -> Iterator[TaskLog]:
    done = is_done(run_dir, config, stage)
    tasks: dict[str, TaskState] = {}
    paths = {path.stem: path for path in sorted(run_dir.logs.glob(f"{stage.name}*.log"))}
    for task in jobs.of(stage.name):
        names = task_names(config, stage, task)
        tasks.update(dict.fromkeys(names, task))
        if paths.keys().isdisjoint(names) and (path := task_log(run_dir, config, stage, task)):
            paths[names[0]] = path
    for path in sorted(run_dir.metrics.glob(f"{stage.name}*.error.txt")):
        paths.setdefault(path.name.removesuffix(".error.txt"), path)
    for name, path in sorted(paths.items()):
        has_error = error_path(run_dir, name).exists()
        group, state = _judge(tasks.get(name), has_error, done, held)
        yield TaskLog(task=name, path=path, group=group, state=state)


def _judge(task: TaskState | None, has_error: bool, done: bool, held: bool) -> tuple[Group, str]:
    """The group and state of a log."""
    if done:
        return "other", "done"
    if task is not None and task.is_bad:
        return "failed", task.words
    if task is not None and task.is_active:
        return ("other" if task.is_waiting else "running"), task.state.lower()
    if has_error:
        return "failed", "failed"
    if held:
        return "running", "running"
    return "other", task.state.lower() if task else "ended"


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log; of a line drawn over itself, what was to be seen last."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _TAIL_BYTES))
        lines = stream.read().decode("utf-8", errors="replace").rstrip().split("\n")
    return [line.rstrip("\r").rpartition("\r")[2] for line in lines[-count:]] if count else []


def logs_text(logs: list[TaskLog], num_lines: int) -> Iterator[str]:
    """Lines for people: the ends of logs of failed and running tasks, of the rest the paths."""
    for log in logs:
        if log.group == "other":
            yield f"{log.state:<10} {log.path}"
            continue
        yield f"{log.state}  {log.task}  {log.path}"
        yield from (f"    {line}" for line in last_lines(log.path, num_lines))
        yield ""
