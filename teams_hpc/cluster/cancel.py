"""Ending what belongs to a run, and nothing else."""

from collections.abc import Sequence

from teams_hpc.cluster.records import read_records
from teams_hpc.cluster.slurm import JobState, call_slurm, queued_jobs
from teams_hpc.errors import ClusterError, UsageError
from teams_hpc.storage.run_dir import RunDir

_BATCH = 500
_OVER = ("Invalid job id", "already completing or completed")


def cancel_run(run_dir: RunDir) -> tuple[JobState, ...]:
    """Cancel the active jobs in a run's records; returns the tasks that were active.

    Arrays are cancelled whole: elements cancelled one by one would be missing from accounting.
    Before that `slurm/cancelled` is left behind, so that no job is put back into the queue.

    Raises:
        UsageError: Nothing of this run was ever submitted.
        ClusterError: Slurm can't be reached, or refused.
    """
    if not read_records(run_dir):
        raise UsageError(f"{run_dir.root} has no job records: nothing of it was submitted to Slurm")
    (run_dir.slurm / "cancelled").touch(mode=0o600)
    records = read_records(run_dir)  # who adds one now sees that mark
    queue = queued_jobs()
    active = {
        record.job_id: found
        for record in reversed(records)  # what depends on others first, so that none starts
        if (
            found := [
                queue[one] for one in record.task_ids if one in queue and queue[one].is_active
            ]
        )
    }
    job_ids = list(active)
    batches = [job_ids[first : first + _BATCH] for first in range(0, len(job_ids), _BATCH)]
    refusals = [refusal for batch in batches if (refusal := _cancel(batch))]
    if refusals:
        raise ClusterError(refusals[0])
    return tuple(state for found in active.values() for state in found)


def _cancel(job_ids: Sequence[str]) -> str:
    """Cancel some jobs; returns why not. One that has just ended by itself is no refusal."""
    try:
        call_slurm("scancel", *job_ids)
    except ClusterError as error:
        return "" if any(words in str(error) for words in _OVER) else str(error)
    return ""
