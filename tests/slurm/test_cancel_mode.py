"""Where preemption cancels, and where requeueing is forbidden: work goes on, dependents wait."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_server import ChatServer

from slurm.cluster import SlurmCluster, temporary_cluster
from slurm.conftest import require_slurm
from slurm.disturbances import (
    ALONE,
    expert_words,
    finish_stage,
    stops,
    submit_until_midst,
    take_node,
    verify_rows,
    wait_until,
)
from slurm.runs import output, quiet_rows, records, rows, starts

FORBIDDEN = "site.slurm.options={no-requeue: true}"


@pytest.fixture(scope="module")
def cancelling() -> Iterator[SlurmCluster]:
    """A cluster on which preempted jobs are cancelled."""
    require_slurm()
    with temporary_cluster(preempt_mode="CANCEL") as running:
        yield running


def ended(cluster: SlurmCluster, root: Path) -> set[str]:
    """States of all jobs of the run."""
    return {job["JobState"] for r in records(root) for job in cluster.find(r.job_id)}


@pytest.mark.slurm_long
@pytest.mark.parametrize(("workers", "may_requeue"), [(1, True), (1, False), (2, False)])
def test_the_stages_behind_a_preempted_one_still_run(
    cancelling: SlurmCluster, server: ChatServer, tmp_path: Path, workers: int, may_requeue: bool
) -> None:
    cluster = cancelling
    words = (f"site.num_workers={workers}", *(() if may_requeue else (FORBIDDEN,)))
    root = submit_until_midst(cluster, server, tmp_path, ALONE, *words)
    [first] = records(root, "generate")
    later = [record.job_id for record in records(root)[1:]]
    task = first.task_ids[-1]  # an array's last task has the number of the whole array
    [before] = cluster.find(task)
    take_node(cluster, before["NodeList"], tmp_path)
    if not may_requeue:
        wait_until(lambda: len(records(root, "generate")) == 2, "a successor")
    server.delay_s = 0.0
    finish_stage(cluster, root, "sft")

    job = before["JobId"]
    assert stops(root) == [f"{job}-0"], output(root)
    successors = records(root, "generate")[1:]
    begun = starts(root, f"generate-{workers - 1:03d}")
    if may_requeue:
        assert successors == []
        assert begun == [(job, 0), (job, 1)]
    else:
        [successor] = successors
        assert successor.replaces == task
        assert successor.indices == (workers - 1,)
        assert begun == [(job, 0), (successor.job_id, 0)]
    assert [r.job_id for r in records(root) if r.stage != "generate"] == later  # moved, not new
    assert "CANCELLED" not in ended(cluster, root)
    cluster.quiet()
    quiet = quiet_rows(tmp_path / "config.yaml", tmp_path / "quiet", *expert_words(server))
    assert rows(root) == quiet
    verify_rows(cluster, root)


@pytest.fixture(autouse=True)
def quiet_cancelling(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave that cluster empty after each test."""
    running: SlurmCluster = request.getfixturevalue("cancelling")
    yield
    running.quiet()
