"""What Slurm says about a run's jobs: one call for all of them, then task by task and by stage."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from teams_hpc.cluster.records import JobRecord, read_records
from teams_hpc.cluster.slurm import ACTIVE_STATES, JobState, accounted_jobs, queued_jobs
from teams_hpc.config import Config
from teams_hpc.errors import ClusterError
from teams_hpc.pipeline.graph import Stage, task_name
from teams_hpc.storage.run_dir import RunDir

_ACCOUNTING_LAG_S = 600.0
_QUEUE_LAG_S = 60.0
_ASK_EVERY_S = 10.0
_ASK_AT_LEAST_EVERY_S = 60.0

SUBMITTED = "SUBMITTED"
"""Recorded a short while ago; Slurm doesn't say yet that it knows it."""

UNKNOWN = "UNKNOWN"
"""Slurm has forgotten it, or couldn't be asked."""

_HARMLESS = frozenset(("COMPLETED", "CANCELLED", UNKNOWN))
_ORDER = ("RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "PENDING", SUBMITTED, "COMPLETED")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskState:
    """One task of a run: a job, or one element of an array.

    Attributes:
        job_id: `123` or `123_4`.
        index: Which policy member or worker it is.
        state: Slurm's word, or `SUBMITTED`, or `UNKNOWN`.
        reason: Why it waits, or its exit code.
    """

    job_id: str
    stage: str
    index: int
    state: str
    reason: str = ""

    @property
    def is_active(self) -> bool:
        """It still may do something."""
        return self.state == SUBMITTED or self.state in ACTIVE_STATES

    @property
    def is_waiting(self) -> bool:
        """It is active but does not run."""
        return self.state in (SUBMITTED, "PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING")

    @property
    def is_bad(self) -> bool:
        """It ended, and not as it should; what was cancelled is no fault of its own."""
        return not self.is_active and self.state not in _HARMLESS

    @property
    def words(self) -> str:
        """`FAILED (exit 1:0)`."""
        if self.reason == "16:0":  # sacct takes 128 off 144
            return f"{self.state} (stopped on request, not requeued)"
        return f"{self.state} (exit {self.reason})" if ":" in self.reason else self.state


@dataclass(frozen=True, slots=True, kw_only=True)
class RunJobs:
    """All tasks of a run that count; one that another job took over does not.

    Attributes:
        trouble: Why Slurm couldn't be asked; empty if it could, or if there was nothing to ask.
    """

    tasks: tuple[TaskState, ...] = ()
    trouble: str = ""

    @property
    def is_active(self) -> bool:
        return any(task.is_active for task in self.tasks)

    def of(self, stage: str) -> tuple[TaskState, ...]:
        """The tasks of one stage."""
        return tuple(task for task in self.tasks if task.stage == stage)


def _current_tasks(records: Iterable[JobRecord]) -> list[tuple[JobRecord, int, str]]:
    """Record, index and Slurm's id of each task; a later job's task takes an earlier one's place.

    Args:
        records: In the order of submission.
    """
    latest = {
        (record.stage, index): (record, index, job_id)
        for record in records
        for index, job_id in zip(record.indices, record.task_ids, strict=False)
    }
    return list(latest.values())


def _ask(records: Sequence[JobRecord]) -> tuple[Mapping[str, JobState], float, str]:
    """Every job Slurm knows, for how many seconds it may not know a new one, and what is amiss."""
    trouble = ""
    try:
        found = accounted_jobs(record.job_id for record in records)
    except ClusterError as error:
        found, trouble = None, str(error)
    if found is not None:
        return found, _ACCOUNTING_LAG_S, ""
    try:
        return queued_jobs(), _QUEUE_LAG_S, trouble  # the controller knows what hasn't ended
    except ClusterError as error:
        return {}, float("-inf"), trouble or str(error)


def read_jobs(run_dir: RunDir) -> RunJobs:
    """The state of each task of a run; asks Slurm once, or not at all if nothing was submitted."""
    records = read_records(run_dir)
    if not records:
        return RunJobs()
    now = time.time()
    known, lag_s, trouble = _ask(records)
    seen = {job_id.partition("_")[0] for job_id in known}
    tasks = []
    for record, index, job_id in _current_tasks(records):
        found = known.get(job_id)
        if found is None:
            is_young = now - record.submitted < (_QUEUE_LAG_S if record.job_id in seen else lag_s)
            # accounting drops elements of an array that were cancelled before they started
            gone = "CANCELLED" if record.job_id in seen and lag_s == _ACCOUNTING_LAG_S else UNKNOWN
            found = JobState(job_id=job_id, state=SUBMITTED if is_young else gone)
        tasks.append(
            TaskState(
                job_id=job_id,
                stage=record.stage,
                index=index,
                state=found.state,
                reason=found.reason,
            )
        )
    return RunJobs(tasks=tuple(tasks), trouble=trouble)


@dataclass(slots=True)
class JobPoll:
    """Reads a run's jobs again and again, but asks Slurm ever more rarely while nothing changes.

    Args:
        run_dir: Whose jobs.
        clock: Seconds, for tests.
    """

    run_dir: RunDir
    clock: Callable[[], float] = time.monotonic
    _last: RunJobs | None = None
    _interval_s: float = _ASK_EVERY_S
    _asked: float = field(default=float("-inf"))

    def read(self) -> RunJobs:
        """What Slurm said last; asked again if it is time to."""
        now = self.clock()
        if self._last is None or now - self._asked >= self._interval_s:
            self._take(read_jobs(self.run_dir))
            self._asked = now
        if self._last is None:
            raise AssertionError("just read")
        return self._last

    def _take(self, found: RunJobs) -> None:
        last = self._last
        if last is not None and found.trouble and last.tasks:
            found = replace(last, trouble=found.trouble)  # better old news than none
        is_same = last is not None and found.tasks == last.tasks
        self._interval_s = (
            min(2 * self._interval_s, _ASK_AT_LEAST_EVERY_S) if is_same else _ASK_EVERY_S
        )
        self._last = found


def count_states(tasks: Iterable[TaskState]) -> dict[str, int]:
    """How many tasks are in each state, in the order in which a task goes through them."""
    counts = Counter(task.state for task in tasks)
    order = {state: number for number, state in enumerate(_ORDER)}
    return {
        state.lower(): counts[state]
        for state in sorted(counts, key=lambda state: (order.get(state, len(order)), state))
    }


def task_names(config: Config, stage: Stage, task: TaskState) -> list[str]:
    """Names of the processes of a task, which their logs have: one, or several ranks."""
    if stage.form == "workers":
        ranks = config.site.ranks_per_worker
        return [task_name(stage, task.index * ranks + rank) for rank in range(ranks)]
    if stage.form == "ranks":
        return [task_name(stage, rank) for rank in range(config.site.num_sft_ranks)]
    return [task_name(stage, task.index)]


def task_log(run_dir: RunDir, config: Config, stage: Stage, task: TaskState) -> Path | None:
    """Where to read about a task: its log, or what its job wrote before there was one."""
    paths = [run_dir.log(name) for name in task_names(config, stage, task)]
    early = ("_0_log.err", "_0_log.out", ".err", ".out")
    paths += [run_dir.slurm / f"{task.job_id}{ending}" for ending in early]
    return next((path for path in paths if path.exists() and path.stat().st_size), None)
