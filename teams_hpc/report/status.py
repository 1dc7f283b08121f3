"""Where a run stands, read from its directory alone."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from teams_hpc.config import Config
from teams_hpc.llm.ledger import WIZARDLM_CALLS, Ledger
from teams_hpc.pipeline.graph import Stage, stage_graph, task_name
from teams_hpc.pipeline.inputs import is_done
from teams_hpc.pipeline.local import error_path
from teams_hpc.report.usage import collect_usage
from teams_hpc.runtime.metrics import read_metrics
from teams_hpc.storage.atomic import read_json
from teams_hpc.storage.lease import read_holder
from teams_hpc.storage.run_dir import RunDir, read_manifest

State = Literal["done", "running", "failed", "interrupted", "waiting"]


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
    """One line of `status`."""

    stage: str
    state: State
    progress: StageProgress | None
    restarts: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A whole run at one moment."""

    name: str
    run_dir: str
    is_running: bool
    stages: tuple[StageStatus, ...]
    rows: dict[str, int]
    expert_calls: int
    expert_calls_in_doubt: int
    budget: int | None
    usage: dict[str, list[dict[str, Any]]]

    @property
    def wizardlm_share(self) -> float:
        """Expert calls as a share of WizardLM's total."""
        return self.expert_calls / WIZARDLM_CALLS


def _is_running(run_dir: RunDir) -> bool:
    found = read_holder(run_dir.leases / "run")
    if found is None:
        return False
    holder = found[0]
    return not holder.is_on_this_host() or holder.is_alive_here()


def _stage_status(run_dir: RunDir, config: Config, stage: Stage, is_running: bool) -> StageStatus:
    progress = stage_progress(run_dir, stage.name)
    errors = [
        path.read_text(encoding="utf-8").strip()
        for index in range(config.policy.num_members if stage.form == "members" else 64)
        if (path := error_path(run_dir, task_name(stage, index))).exists()
    ]
    restarts = sum(
        int(line["restarts"])
        for line in read_metrics(run_dir.metrics / "restarts.jsonl")
        if line["stage"] == stage.name
    )
    state: State = "waiting"
    if is_done(run_dir, config, stage):
        state = "done"
    elif run_dir.inputs(stage.name).exists():
        state = "running" if is_running else "failed" if errors else "interrupted"
    return StageStatus(
        stage=stage.name,
        state=state,
        progress=progress,
        restarts=restarts,
        error=errors[-1] if errors and state != "done" else "",
    )


def read_status(run_dir: RunDir, config: Config) -> RunStatus:
    """Where every stage stands; reads small files only."""
    is_running = _is_running(run_dir)
    stages = []
    for stage in stage_graph(config):
        status = _stage_status(run_dir, config, stage, is_running)
        stages.append(status)
        is_running = is_running and status.state != "running"
    usage = collect_usage(run_dir)
    total = Ledger()
    for ledger in usage.values():
        total.merge(ledger)
    expert = total.total("expert")
    rows = (read_manifest(run_dir, "generate") or {}).get("counts", {})
    return RunStatus(
        name=config.name,
        run_dir=str(run_dir.root),
        is_running=_is_running(run_dir),
        stages=tuple(stages),
        rows={key: value for key, value in rows.items() if isinstance(value, int)},
        expert_calls=expert.calls,
        expert_calls_in_doubt=expert.in_doubt,
        budget=config.budget.max_expert_calls,
        usage={name: ledger.to_json() for name, ledger in usage.items()},
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
    "failed": "red",
    "interrupted": "yellow",
    "waiting": "dim",
}


def status_table(status: RunStatus) -> Table:
    """The status for people."""
    table = Table(title=escape(f"{status.name}  {status.run_dir}"), title_justify="left", box=None)
    for heading in ("stage", "state", "progress", "rate", "left", "restarts", ""):
        table.add_column(heading, overflow="fold")
    for line in status.stages:
        progress = line.progress
        message = progress.message if progress else ""
        show_rate = progress is not None and line.state == "running"
        table.add_row(
            line.stage,
            f"[{_COLOURS[line.state]}]{line.state}[/]",
            f"{progress.done:g}/{progress.total:g} {progress.unit}" if progress else "",
            f"{progress.rate_per_s:.3g}/s" if progress and show_rate else "",
            format_seconds(progress.eta_s) if progress and show_rate and progress.eta_s else "",
            str(line.restarts or ""),
            escape(line.error.splitlines()[0] if line.error else message),
        )
    budget = "no limit" if status.budget is None else f"limit {status.budget:,}"
    doubt = f" + {status.expert_calls_in_doubt} in doubt" if status.expert_calls_in_doubt else ""
    table.caption = (
        f"expert calls {status.expert_calls:,}{doubt} ({budget}; "
        f"{100 * status.wizardlm_share:.3f} % of WizardLM's {WIZARDLM_CALLS:,})"
    )
    table.caption_justify = "left"
    return table


def closing_lines(run_dir: RunDir, config: Config) -> list[str]:
    """What a finished run says of itself."""
    status = read_status(run_dir, config)
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
