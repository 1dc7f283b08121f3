"""What a terminal shows while a run works: bars where people look, plain lines in a batch log."""

import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from teams_hpc.pipeline.graph import Stage
from teams_hpc.report.status import StageProgress, format_seconds, stage_progress
from teams_hpc.storage.run_dir import RunDir

_PLAIN_INTERVAL_S = 15.0


@dataclass(slots=True)
class LiveDisplay:
    """Tells a person how a run goes; an `Observer` of the pipeline.

    Args:
        run_dir: Whose progress files are read.
        console: Where to write; bars if it is a terminal, plain lines otherwise.
    """

    run_dir: RunDir
    console: Console
    _stage: Stage | None = None
    _bar: Progress | None = None
    _bar_task: TaskID | None = None
    _shown: float = 0.0
    _last: str = ""
    _totals: dict[str, float] = field(default_factory=dict)

    def stage_skipped(self, stage: Stage) -> None:
        self.console.print(f"[green]✓[/] {stage.name:<9} done before", highlight=False)

    def stage_started(self, stage: Stage) -> None:
        self._stage = stage
        self._shown = time.monotonic()
        self._last = ""
        if not self.console.is_terminal:
            self.console.print(f"> {stage.name:<9} {stage.does}", highlight=False)
            return
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self._bar_task = self._bar.add_task(stage.name, total=None, unit="", note=stage.does)
        self._bar.start()

    def tick(self) -> None:
        if self._stage is None:
            return
        now = time.monotonic()
        interval = 0.2 if self._bar else _PLAIN_INTERVAL_S
        if now - self._shown < interval:
            return
        self._shown = now
        progress = stage_progress(self.run_dir, self._stage.name)
        if progress is None:
            return
        if self._bar is not None and self._bar_task is not None:
            self._bar.update(
                self._bar_task,
                completed=progress.done,
                total=progress.total,
                unit=progress.unit,
                note=escape(progress.message),
            )
        elif (line := _plain_line(self._stage, progress)) != self._last:
            self._last = line
            self.console.print(line, highlight=False, markup=False)

    def stage_finished(self, stage: Stage, seconds: float, num_restarts: int) -> None:
        self.close()
        progress = stage_progress(self.run_dir, stage.name)
        what = f"{progress.done:g} {progress.unit}" if progress else stage.does
        note = f"  {escape(progress.message)}" if progress and progress.message else ""
        restarts = f"  ({num_restarts} restarts)" if num_restarts else ""
        self.console.print(
            f"[green]✓[/] {stage.name:<9} {what} in {format_seconds(seconds)}{note}{restarts}",
            highlight=False,
        )

    def close(self) -> None:
        """Take the bar away, also when the stage failed."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None
        self._stage = None


def _plain_line(stage: Stage, progress: StageProgress) -> str:
    share = f"{100 * progress.done / progress.total:.0f} %" if progress.total else ""
    eta = f", about {format_seconds(progress.eta_s)} left" if progress.eta_s is not None else ""
    return (
        f"  {stage.name:<9} {progress.done:g} of {progress.total:g} {progress.unit} ({share}{eta})"
        f"{'  ' + progress.message if progress.message else ''}"
    )
