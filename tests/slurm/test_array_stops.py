"""Every task of an array stops and comes back, the last one too, which has the array's number."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.cluster import SlurmCluster
from slurm.runs import output, records, starts, submit, write_config

MEMBERS = 3
LONG = (f"policy.num_members={MEMBERS}", "policy.iterations=80", "policy.num_envs=32")


def eventually(holds: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def preempt(cluster: SlurmCluster, root: Path) -> None:
    """Let a more important job take all nodes for a moment, once every member is at work."""
    (array,) = records(root, "policy")
    for index in range(MEMBERS):
        cluster.wait_for(f"{array.job_id}_{index}", "RUNNING", timeout=60)
    eventually(
        lambda: all(
            (root / "policy" / f"member-{i:03d}" / "metrics.jsonl").exists() for i in range(MEMBERS)
        ),
        timeout=60,
    )
    urgent = cluster.submit(
        "sleep 3", "--partition=high", "--nodes=4", "--exclusive", folder=root.parent
    )
    cluster.wait_for(urgent, "COMPLETED", timeout=90)


def finish_policy(cluster: SlurmCluster, root: Path) -> None:
    eventually((root / "select" / "manifest.json").exists, timeout=200)
    cluster.cancel_all()


def policies(root: Path) -> list[str]:
    """SHA-256 of each member's policy and metrics, from its result."""
    results = sorted(root.glob("policy/member-*/result.json"))
    return [json.dumps(json.loads(path.read_text())["files"]) for path in results]


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    submit(cluster, write_config(folder), *LONG)
    finish_policy(cluster, folder / "run")
    return policies(folder / "run")


@pytest.mark.slurm_long
def test_preempted_members_are_requeued_and_end_as_if_nothing_had_been(
    cluster: SlurmCluster, undisturbed: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    submit(cluster, write_config(tmp_path), *LONG)
    preempt(cluster, root)
    finish_policy(cluster, root)
    for index in range(MEMBERS):
        counts = [restart for _, restart in starts(root, f"policy-{index:03d}")]
        assert counts == [0, 1], output(root)
    assert policies(root) == undisturbed
    assert len(undisturbed) == MEMBERS


@pytest.mark.slurm_long
def test_where_requeueing_is_forbidden_others_go_on_and_dependents_move(
    cluster: SlurmCluster, undisturbed: list[str], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    submit(cluster, write_config(tmp_path), *LONG, "site.slurm.options={no-requeue: true}")
    (select,) = records(root, "select")
    preempt(cluster, root)
    finish_policy(cluster, root)
    first, *successors = records(root, "policy")
    assert {one.replaces for one in successors} == {f"{first.job_id}_{i}" for i in range(MEMBERS)}
    assert [record.job_id for record in records(root, "select")] == [
        select.job_id
    ]  # moved, not new
    assert policies(root) == undisturbed
