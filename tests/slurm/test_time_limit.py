"""Work that takes longer than a job may: requeued at the limit, with the same numbers in the end.

The fine-tuning's turn is in test_sft_stops.py.
"""

import time
from pathlib import Path

import pytest

from slurm import runs
from slurm.cluster import SlurmCluster

LONG = (
    "policy.num_members=1",
    "policy.iterations=300",
    "policy.num_envs=32",
)
LIMITS = ("site.slurm.stages.policy.time_min=1", "site.slurm.warning_s=35")


def finish_policy(cluster: SlurmCluster, roots: list[Path], timeout_s: float) -> None:
    """Wait until the policies of these runs are trained; what comes later is cancelled."""
    jobs = [record.job_id for root in roots for record in runs.records(root)]
    first = [record.job_id for root in roots for record in runs.records(root, "policy")]
    cluster.run("scancel", *(job for job in jobs if job not in first))
    deadline = time.monotonic() + timeout_s
    while cluster.active():
        said = "\n".join(runs.output(root) for root in roots)
        assert time.monotonic() < deadline, said
        time.sleep(0.5)


@pytest.mark.slurm_long
@pytest.mark.timeout(600)
def test_a_policy_that_needs_several_jobs_is_that_of_one_job(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    runs.submit(cluster, runs.write_config(whole), *LONG)
    runs.submit(cluster, runs.write_config(cut), *LONG, *LIMITS)
    finish_policy(cluster, [whole / "run", cut / "run"], 450)

    [job] = runs.records(cut / "run", "policy")
    started = runs.starts(cut / "run", "policy-000")
    assert len(started) > 1, "the work is too short for this machine"
    assert started == [(job.job_id, n) for n in range(len(started))]
    [record] = cluster.find(job.job_id)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", str(len(started) - 1))
    markers = sorted(path.name for path in (cut / "run" / "slurm" / "stopped").iterdir())
    assert markers == sorted(f"{job.job_id}-{n}" for n in range(len(started) - 1))
    assert len(runs.starts(whole / "run", "policy-000")) == 1
    for name in ("policy.safetensors", "metrics.jsonl"):
        made = [root / "run" / "policy" / "member-000" / name for root in (whole, cut)]
        assert made[0].read_bytes() == made[1].read_bytes(), name
