"""Child processes of one stage on one machine: started, watched, restarted, never left behind."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from teams_hpc.errors import StopRequested, WorkError
from teams_hpc.runtime.preemption import PARENT_VARIABLE, StopFlag

_POLL_S = 0.1
_GRACE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One process to run: its name, its arguments, its log, additions to the environment."""

    name: str
    argv: tuple[str, ...]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Child:
    task: Task
    process: subprocess.Popen[bytes]


@dataclass(slots=True, kw_only=True)
class TaskGroup:
    """Runs tasks until all have ended well.

    A task killed by a signal is started again; one that fails ends the group. Killing this process
    kills every child (`preemption.die_with_parent`).

    Args:
        tasks: What to run, in this order.
        num_parallel: How many at a time.
        together: Tasks that talk to each other: when one dies, all are started again.
        max_restarts: Restarts in a row without progress.
        progress: Any value that changes when the work advanced.
        explain: A failed task's own words, for the error.
        on_tick: Called about ten times a second.
    """

    tasks: Sequence[Task]
    num_parallel: int
    together: bool = False
    max_restarts: int = 2
    progress: Callable[[], object] = lambda: None
    explain: Callable[[Task], str] = lambda task: ""
    on_tick: Callable[[], None] = lambda: None
    num_restarts: int = 0
    _waiting: list[Task] = field(default_factory=list)
    _running: list[_Child] = field(default_factory=list)
    _without_progress: int = 0
    _last_progress: object = None

    def run(self, stop: StopFlag) -> None:
        """Run everything.

        Raises:
            StopRequested: Asked to stop; every child has reached a safe point or was ended.
            WorkError: A task failed; the message names it, its log and its last words.
        """
        self._waiting = list(self.tasks)
        self._last_progress = self.progress()
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < self.num_parallel:
                    self._start(self._waiting.pop(0))
                self.on_tick()
                time.sleep(_POLL_S)
                if stop.is_set:
                    self._end_all(_GRACE_S)
                    raise StopRequested(f"stopped on {stop.reason}; the same command goes on")
                self._reap()
        finally:
            self._end_all(0.0)

    def _start(self, task: Task) -> None:
        task.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **task.environment, PARENT_VARIABLE: str(os.getpid())}
        with task.log.open("ab") as log:
            process = subprocess.Popen(
                task.argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running.append(_Child(task, process))

    def _reap(self) -> None:
        for child in list(self._running):
            code = child.process.poll()
            if code is None:
                continue
            self._running.remove(child)
            if code == 0:
                continue
            if code == StopRequested.exit_code:
                self._end_all(_GRACE_S)
                raise StopRequested(f"{child.task.name} was asked to stop; run again to go on")
            if code > 0:
                self._fail(child.task, f"failed with exit code {code}")
            self._restart(child.task, signal.Signals(-code).name)
            return

    def _restart(self, task: Task, reason: str) -> None:
        now = self.progress()
        self._without_progress = 1 if now != self._last_progress else self._without_progress + 1
        self._last_progress = now
        if self._without_progress > self.max_restarts:
            self._fail(
                task,
                f"was killed by {reason} and restarted {self.max_restarts} times without progress "
                "(out of memory? see the log; site.max_restarts_without_progress allows more)",
            )
        self.num_restarts += 1
        if self.together:
            self._end_all(0.0)
            self._waiting = list(self.tasks)
        else:
            self._waiting.insert(0, task)

    def _fail(self, task: Task, what: str) -> None:
        self._end_all(0.0 if self.together else _GRACE_S)
        words = self.explain(task)
        raise WorkError(f"{task.name} {what}{': ' + words if words else ''}\n  log: {task.log}")

    def _end_all(self, grace_s: float) -> None:
        """Ask every child to stop, then end its whole process group."""
        deadline = time.monotonic() + grace_s
        if grace_s:
            for child in self._running:
                child.process.send_signal(signal.SIGTERM)
            while time.monotonic() < deadline and any(
                child.process.poll() is None for child in self._running
            ):
                self.on_tick()
                time.sleep(_POLL_S)
        for child in self._running:
            try:
                os.killpg(child.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.process.wait()
        self._running.clear()
