"""A warning at any moment of a start stops a job once, whole, or not at all; it never kills."""

import time
from pathlib import Path

import pytest

from slurm.cluster import SlurmCluster
from slurm.runs import output, records, starts, submit, write_config

OFFSETS_S = (0.0, 0.3, 0.8, 1.5, 2.5, 4.0, 6.0, 9.0)
"""Before the step, during the imports, during the work: two cores import eight times at once."""


@pytest.mark.slurm_long
def test_a_signal_at_any_moment(cluster: SlurmCluster, tmp_path: Path) -> None:
    root = tmp_path / "run"
    members = len(OFFSETS_S)
    settings = (f"policy.num_members={members}", "policy.iterations=60", "policy.num_envs=16")
    submit(cluster, write_config(tmp_path), *settings, "site.slurm.max_parallel_tasks=8")
    (array,) = records(root, "policy")
    for index in range(members):
        cluster.wait_for(f"{array.job_id}_{index}", "RUNNING", timeout=60)
    begun = time.monotonic()
    for index, offset in enumerate(OFFSETS_S):
        time.sleep(max(0.0, begun + offset - time.monotonic()))
        # As Slurm sends it before the time limit: to the steps, if there are any yet.
        cluster.run("scancel", "--signal=USR2", f"{array.job_id}_{index}")
    (select,) = records(root, "select")
    cluster.wait_for(select.job_id, "COMPLETED", timeout=200)
    cluster.cancel_all()
    counts = [[restart for _, restart in starts(root, f"policy-{i:03d}")] for i in range(members)]
    # A signal before there is a step reaches nobody; else the job stops and is requeued, once.
    assert all(found in ([0], [0, 1]) for found in counts), f"{counts}\n{output(root)}"
    assert sum(found == [0, 1] for found in counts) >= 4, counts
    markers = [path.name for path in (root / "slurm" / "stopped").iterdir()]
    assert len(markers) == sum(found == [0, 1] for found in counts)
