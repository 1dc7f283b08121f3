"""Where a run stands: what its directory says, and what Slurm says about its jobs."""

import json
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from teams_hpc.config import Config
from teams_hpc.llm.ledger import WIZARDLM_CALLS, Ledger
from teams_hpc.pipeline.graph import Stage, stage_graph
from teams_hpc.pipeline.inputs import is_done
from teams_hpc.report.jobs import (
    RunJobs,
    TaskState,
    count_states,
    read_jobs,
    task_log,
    task_names,
)
from teams_hpc.report.usage import collect_usage
from teams_hpc.runtime.metrics import read_metrics
from teams_hpc.storage.atomic import read_json
from teams_hpc.storage.lease import read_holder
from teams_hpc.storage.run_dir import RunDir, read_manifest

State = Literal[
    "done", "running", "queued", "failed", "cancelled", "started", "interrupted", "waiting"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProgress:
    """All tasks of one stage together."""

    done: float
    total: float
    unit: str
    rate_per_s: float
    message: str

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the present rate; None before there is one."""
        if self.rate_per_s <= 0 or self.done >= self.total:
            return None
        return (self.total - self.done) / self.rate_per_s


def stage_progress(run_dir: RunDir, stage: str) -> StageProgress | None:
    """Sum of the progress files of a stage's tasks; None before the first is written."""
    found = [read_json(path) for path in sorted(run_dir.metrics.glob(f"{stage}*.progress.json"))]
    if not found:
        return None
    return StageProgress(
        done=sum(float(value["done"]) for value in found),
        total=sum(float(value["total"]) for value in found),
        unit=str(found[0]["unit"]),
        rate_per_s=sum(float(value["rate_per_s"]) for value in found),
        message=str(max(found, key=lambda value: value["updated"])["message"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """One line of `status`.

    Attributes:
        note: What there is to say of its state: why it was cancelled.
        error: The last error, with `log` to read more.
        num_tasks: How many of its Slurm tasks are in each state; empty without Slurm.
        tokens_per_s: Tokens trained on, or written by models.
    """

    stage: str
    state: State
    progress: StageProgress | None
    restarts: int
    error: str
    log: str = ""
    note: str = ""
    num_tasks: dict[str, int] = field(default_factory=dict)
    tokens_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A whole run at one moment.

    Attributes:
        is_running: A process works on it, here or on the cluster.
        is_active: Something runs or waits in the queue.
        slurm_trouble: Why Slurm couldn't be asked about its jobs.
    """

    name: str
    run_dir: str
    is_running: bool
    stages: tuple[StageStatus, ...]
    rows: dict[str, int]
    expert_calls: int
    expert_calls_in_doubt: int
    budget: int | None
    usage: dict[str, list[dict[str, Any]]]
    is_active: bool = False
    slurm_trouble: str = ""
    tasks: tuple[TaskState, ...] = ()

    @property
    def wizardlm_share(self) -> float:
        """Expert calls as a share of WizardLM's total."""
        return self.expert_calls / WIZARDLM_CALLS


def is_held(run_dir: RunDir) -> bool:
    """Whether a process that runs the whole pipeline holds the run."""
    found = read_holder(run_dir.leases / "run")
    if found is None:
        return False
    holder = found[0]
    return not holder.is_on_this_host() or holder.is_alive_here()


def _last_error(
    run_dir: RunDir, config: Config, stage: Stage, tasks: tuple[TaskState, ...]
) -> tuple[str, Path | None]:
    """The newest error of a stage and the log to read; or the task that ended badly last."""
    paths = list(run_dir.metrics.glob(f"{stage.name}*.error.txt"))
    if paths:
        newest = max(paths, key=lambda path: path.stat().st_mtime)
        log = run_dir.log(newest.name.removesuffix(".error.txt"))
        return newest.read_text(encoding="utf-8").strip(), log if log.exists() else None
    bad = [task for task in tasks if task.is_bad]
    if not bad:
        return "", None
    last = bad[-1]
    name = task_names(config, stage, last)[0]
    return f"{name}: {last.words}, job {last.job_id}", task_log(run_dir, config, stage, last)


def _restarts(run_dir: RunDir, stage: str) -> int:
    """How often tasks were started again, by the process that watches them or by Slurm."""
    here = sum(
        int(line["restarts"])
        for line in read_metrics(run_dir.metrics / "restarts.jsonl")
        if line["stage"] == stage
    )
    starts = (
        path.read_bytes().count(b"\n") for path in run_dir.metrics.glob(f"{stage}*.starts.jsonl")
    )
    return here + sum(max(0, count - 1) for count in starts)


def _state(
    run_dir: RunDir, stage: Stage, jobs: RunJobs, tasks: tuple[TaskState, ...], has_error: bool
) -> State:
    """The state of a stage that isn't done and that no process of this machine works on."""
    if any(task.is_active and not task.is_waiting for task in tasks):
        return "running"
    if any(task.is_active for task in tasks):
        return "queued"
    if any(task.is_bad for task in tasks):
        return "failed"
    if any(task.state == "CANCELLED" for task in tasks):
        return "cancelled"
    if not run_dir.inputs(stage.name).exists():
        return "waiting"
    if has_error:
        return "failed"
    return "started" if tasks and jobs.trouble else "interrupted"


def _tokens_per_s(
    run_dir: RunDir, stage: str, progress: StageProgress | None, usage: Mapping[str, Ledger]
) -> float | None:
    """Tokens trained on, or written, each second; None where nothing says it."""
    if stage == "sft":
        lines = deque(read_metrics(run_dir.sft / "metrics.jsonl"), maxlen=1)
        # The line of step 0 tells of held-out rows alone.
        return lines[0].get("tokens_per_s") if lines else None
    if stage != "generate" or stage not in usage or progress is None or not progress.done:
        return None
    tokens = sum(row.completion_tokens for row in usage[stage].rows.values())
    return tokens / progress.done * progress.rate_per_s or None


def _stage_status(
    run_dir: RunDir,
    config: Config,
    stage: Stage,
    *,
    held: bool,
    jobs: RunJobs,
    usage: Mapping[str, Ledger],
) -> StageStatus:
    progress = stage_progress(run_dir, stage.name)
    tasks = jobs.of(stage.name)
    error, log = _last_error(run_dir, config, stage, tasks)
    if is_done(run_dir, config, stage):
        state: State = "done"
    elif held and run_dir.inputs(stage.name).exists():
        state = "running"
    else:
        state = _state(run_dir, stage, jobs, tasks, bool(error))
    return StageStatus(
        stage=stage.name,
        state=state,
        progress=progress,
        restarts=_restarts(run_dir, stage.name),
        error=error if state != "done" else "",
        log=str(log) if log and state != "done" else "",
        num_tasks=count_states(tasks),
        tokens_per_s=_tokens_per_s(run_dir, stage.name, progress, usage),
    )


def _with_causes(
    run_dir: RunDir, graph: Iterable[Stage], found: Iterable[StageStatus]
) -> list[StageStatus]:
    """Say of each stage that can't run any more which other one is to blame."""
    cause: dict[str, str] = {}
    stages = []
    for stage, status in zip(graph, found, strict=True):
        upstream = next((cause[name] for name in stage.reads if name in cause), None)
        note = ""
        if status.state == "failed":
            cause[stage.name] = f"{stage.name} failed"
        elif status.state == "cancelled":
            asked = (run_dir.slurm / "cancelled").exists()
            note = upstream or ("as you asked" if asked else "")
            cause[stage.name] = upstream or f"{stage.name} was cancelled"
        elif status.state == "queued" and upstream:
            note = f"waits in vain: {upstream}"
            cause[stage.name] = upstream
        stages.append(replace(status, note=note))
    return stages


def read_status(run_dir: RunDir, config: Config, jobs: RunJobs | None = None) -> RunStatus:
    """Where every stage stands; reads small files, and asks Slurm once if jobs were submitted.

    Args:
        jobs: What Slurm said, if it was asked before.
    """
    jobs = read_jobs(run_dir) if jobs is None else jobs
    usage = collect_usage(run_dir)
    is_running = held = is_held(run_dir)
    stages = []
    for stage in stage_graph(config):
        status = _stage_status(run_dir, config, stage, held=held, jobs=jobs, usage=usage)
        stages.append(status)
        held = held and status.state != "running"
    total = Ledger()
    for ledger in usage.values():
        total.merge(ledger)
    expert = total.total("expert")
    rows = (read_manifest(run_dir, "generate") or {}).get("counts", {})
    return RunStatus(
        name=config.name,
        run_dir=str(run_dir.root),
        is_running=is_running or any(status.state == "running" for status in stages),
        is_active=is_running or jobs.is_active,
        stages=tuple(_with_causes(run_dir, stage_graph(config), stages)),
        rows={key: value for key, value in rows.items() if isinstance(value, int)},
        expert_calls=expert.calls,
        expert_calls_in_doubt=expert.in_doubt,
        budget=config.budget.max_expert_calls,
        usage={name: ledger.to_json() for name, ledger in usage.items()},
        slurm_trouble=jobs.trouble,
        tasks=jobs.tasks,
    )


def status_json(status: RunStatus) -> str:
    """The status for programs."""
    value = asdict(status)
    for stage, line in zip(status.stages, value["stages"], strict=True):
        line["eta_s"] = stage.progress.eta_s if stage.progress else None
    value["wizardlm_share"] = status.wizardlm_share
    return json.dumps(value, indent=1)


_COLOURS: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "queued": "blue",
    "failed": "red",
    "cancelled": "yellow",
    "started": "yellow",
    "interrupted": "yellow",
    "waiting": "dim",
}


def _rates(line: StageStatus) -> tuple[str, str]:
    """Rate and time left of a stage at work."""
    progress = line.progress
    if line.state != "running":
        return "", ""
    rates = [f"{progress.rate_per_s:.3g}/s"] if progress else []
    rates += [f"{line.tokens_per_s:,.0f} tok/s"] if line.tokens_per_s else []
    left = format_seconds(progress.eta_s) if progress and progress.eta_s else ""
    return "\n".join(rates), left


def _error_lines(line: StageStatus) -> list[str]:
    """The last error of a stage and where to read on."""
    first = f"[{_COLOURS['failed']}]{line.stage}[/]: {escape(line.error.splitlines()[0])}"
    return [first, f"    {escape(line.log)}"] if line.log else [first]


def status_table(status: RunStatus) -> RenderableType:
    """The status for people: a table, then the last errors with their logs."""
    table = Table(title=escape(f"{status.name}  {status.run_dir}"), title_justify="left", box=None)
    with_tasks = any(line.num_tasks for line in status.stages)
    table.add_column("stage", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for heading in (*(("tasks",) if with_tasks else ()), "progress", "rate", "left", "restarts"):
        table.add_column(heading, overflow="fold")
    table.add_column("", overflow="fold")
    for line in status.stages:
        progress = line.progress
        counts = "\n".join(f"{count} {state}" for state, count in line.num_tasks.items())
        table.add_row(
            line.stage,
            f"[{_COLOURS[line.state]}]{line.state}[/]",
            *((counts,) if with_tasks else ()),
            f"{progress.done:g}/{progress.total:g} {progress.unit}" if progress else "",
            *_rates(line),
            str(line.restarts or ""),
            escape(line.note or (progress.message if progress else "")),
        )
    lines = [text for line in status.stages if line.error for text in _error_lines(line)]
    if status.slurm_trouble:
        lines.insert(0, f"[yellow]Slurm can't be asked: {escape(status.slurm_trouble)}[/]")
    texts = (Text.from_markup(line, overflow="fold") for line in lines)
    return Group(table, Text(_spending(status), style="dim"), *texts)


def _spending(status: RunStatus) -> str:
    """What was asked of experts, against the budget and the literature."""
    budget = "no limit" if status.budget is None else f"limit {status.budget:,}"
    doubt = f" + {status.expert_calls_in_doubt} in doubt" if status.expert_calls_in_doubt else ""
    return (
        f"expert calls {status.expert_calls:,}{doubt} ({budget}; "
        f"{100 * status.wizardlm_share:.3f} % of WizardLM's {WIZARDLM_CALLS:,})"
    )


def closing_lines(run_dir: RunDir, config: Config) -> list[str]:
    """What a finished run says of itself."""
    status = read_status(run_dir, config, RunJobs())
    lines = [f"{config.name}: all {len(status.stages)} stages done"]
    generate = read_manifest(run_dir, "generate") or {}
    counts = generate.get("counts")
    if counts:
        eliminated = sum(counts["eliminated"].values())
        lines.append(
            f"  rows      {counts['attempted']} attempted = {counts['kept']} kept + "
            f"{eliminated} eliminated + {counts['failed']} failed"
        )
    sft = read_manifest(run_dir, "sft") or {}
    held_out = sft.get("held_out_loss") or {}
    if held_out.get("before") is not None:
        lines.append(
            f"  held-out  loss {held_out['before']:.3f} before, {held_out['after']:.3f} after "
            f"{sft['steps']} steps"
        )
    lines.append(
        f"  expert    {status.expert_calls:,} calls, {100 * status.wizardlm_share:.3f} % of "
        f"WizardLM's {WIZARDLM_CALLS:,}"
    )
    lines.append(f"  model     {run_dir.model}")
    lines.append(f"  report    {run_dir.report}")
    return lines


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
