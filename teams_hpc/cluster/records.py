"""Which jobs belong to a run: a small file for each submitted job, in `slurm/jobs/`.

A job that was resubmitted has a new record, which names the array tasks it took over.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from teams_hpc.cluster.slurm import queued_jobs
from teams_hpc.storage.atomic import read_json, write_json
from teams_hpc.storage.run_dir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """One job of a run.

    Attributes:
        job_id: Slurm's number, without an array index.
        stage: What it works on.
        indices: Index of each of its tasks (a policy member, a worker); an array's task k has
            the k-th of them.
        is_array: Whether Slurm knows its tasks as `<job_id>_<k>`.
        submitted: Unix time.
        replaces: The job whose work it took over, if any.
    """

    job_id: str
    stage: str
    indices: tuple[int, ...]
    is_array: bool
    submitted: float
    replaces: str | None = None

    @property
    def task_ids(self) -> tuple[str, ...]:
        """Slurm's id of each task, in the order of `indices`."""
        if not self.is_array:
            return (self.job_id,)
        return tuple(f"{self.job_id}_{number}" for number in range(len(self.indices)))


def write_record(run_dir: RunDir, record: JobRecord) -> None:
    """Keep a record for good."""
    run_dir.job_records.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(run_dir.job_records / f"{record.job_id}.json", asdict(record))


def read_records(run_dir: RunDir) -> list[JobRecord]:
    """The jobs of a run, in the order of submission."""
    values: list[dict[str, Any]] = [read_json(path) for path in run_dir.job_records.glob("*.json")]
    records = [JobRecord(**{**value, "indices": tuple(value["indices"])}) for value in values]
    return sorted(records, key=lambda record: (record.submitted, int(record.job_id)))


def active_jobs(records: Sequence[JobRecord]) -> list[str]:
    """Those of these jobs and array tasks that wait or work; asks Slurm if there are any at all.

    Raises:
        ClusterError: Slurm can't be asked.
    """
    states = queued_jobs() if records else {}
    return [
        job
        for record in records
        for job in record.task_ids
        if job in states and states[job].is_active
    ]


def first_of_chain(records: Iterable[JobRecord], job: str) -> str:
    """The job whose work `job` does, after any number of resubmissions."""
    before = {one: record.replaces for record in records for one in record.task_ids}
    while (earlier := before.get(job)) is not None:
        job = earlier
    return job
