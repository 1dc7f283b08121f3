"""Ending what belongs to a run, and nothing else."""

from collections.abc import Sequence

from teams_hpc.cluster.records import read_records
from teams_hpc.cluster.slurm import call_slurm, queued_jobs
from teams_hpc.errors import ClusterError, UsageError
from teams_hpc.storage.run_dir import RunDir

_BATCH = 500
_OVER = ("Invalid job id", "already completing or completed")


def cancel_run(run_dir: RunDir) -> tuple[str, ...]:
    """Cancel the active jobs in a run's records; says which (`123`, or `123_4`).

    Before that `slurm/cancelled` is left behind, so that no job is put back into the queue.

    Raises:
        UsageError: Nothing of this run was ever submitted.
        ClusterError: Slurm can't be reached, or refused.
    """
    records = read_records(run_dir)
    if not records:
        raise UsageError(f"{run_dir.root} has no job records: nothing of it was submitted to Slurm")
    (run_dir.slurm / "cancelled").touch(mode=0o600)
    queue = queued_jobs()
    active = [
        job_id
        for record in reversed(records)  # what depends on others first, so that none starts
        for job_id in record.task_ids
        if job_id in queue and queue[job_id].is_active
    ]
    refusals = [
        refusal
        for first in range(0, len(active), _BATCH)
        if (refusal := _cancel(active[first : first + _BATCH]))
    ]
    if refusals:
        raise ClusterError(refusals[0])
    return tuple(active)


def _cancel(job_ids: Sequence[str]) -> str:
    """Cancel some jobs; returns why not. One that has just ended by itself is no refusal."""
    try:
        call_slurm("scancel", *job_ids)
    except ClusterError as error:
        return "" if any(words in str(error) for words in _OVER) else str(error)
    return ""
