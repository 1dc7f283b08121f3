"""Steps of generation that srun and MPI join over two nodes; a wrong --mpi is said."""

import os
import signal
from pathlib import Path

import pytest
from chat_server import ChatServer

from slurm.cluster import SlurmCluster
from slurm.disturbances import ranks, submit_until_midst
from slurm.runs import output, quiet_rows, records, rows, submit, wait_for_end, write_config

PMIX = [
    Path("/usr/lib") / arch / "pmix2/lib/libpmix.so"
    for arch in ("x86_64-linux-gnu", "aarch64-linux-gnu")
]
MPI = (
    "generate.policy=uniform",
    "site.num_workers=2",
    "site.ranks_per_worker=2",
    "site.slurm.stages.generate.nodes=2",
    # Nodes that share a host confuse Open MPI's shared memory, and this host has no fast network.
    "site.slurm.environment={OMPI_MCA_btl: 'self,tcp', OMPI_MCA_pml: ob1, OMPI_MCA_osc: '^ucx'}",
)


@pytest.fixture(autouse=True)
def _has_pmix() -> None:
    if not any(path.exists() for path in PMIX):
        reason = "NOT TESTED: srun --mpi=pmix needs libpmix.so (Debian: libpmix-dev)"
        if os.environ.get("TEAMS_HPC_REQUIRE_SLURM") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


def last_job(root: Path, stage: str) -> str:
    return records(root, stage)[-1].job_id


def test_two_nodes_are_one_step(cluster: SlurmCluster, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    submit(cluster, config, *MPI, "site.slurm.mpi=pmix")
    root = tmp_path / "run"
    cluster.wait_for(last_job(root, "dataset"), "COMPLETED", timeout=150)
    cluster.cancel_all()
    for index in (0, 2):  # the first rank of each of the two steps
        log = (root / "logs" / f"generate-{index:03d}.log").read_text()
        assert "MPI joined 2 processes" in log, output(root)
    assert rows(root) == quiet_rows(config, tmp_path / "quiet", "generate.policy=uniform")


@pytest.mark.slurm_long
def test_a_wrong_mpi_type_fails_and_says_so(cluster: SlurmCluster, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    submit(cluster, config, *MPI, "site.slurm.mpi=pmi2")
    root = tmp_path / "run"
    wait_for_end(cluster, root, 120)
    assert not (root / "generate" / "manifest.json").exists()
    errors = "".join(path.read_text() for path in (root / "metrics").glob("generate*.error.txt"))
    assert "MPI joined 1 of the 2 processes" in errors + output(root)


@pytest.mark.slurm_long
def test_a_killed_rank_ends_its_step(
    cluster: SlurmCluster, server: ChatServer, tmp_path: Path
) -> None:
    """The other would wait for it for ever."""
    words = ("site.slurm.mpi=pmix", "site.slurm.stages.generate.cpus_per_task=8")
    root = submit_until_midst(cluster, server, tmp_path, *MPI, *words)
    [array] = records(root, "generate")
    task = array.task_ids[0]
    [before] = cluster.find(task)
    [victim] = ranks(root, job=before["JobId"], rank=1)
    os.kill(victim, signal.SIGKILL)
    [ended] = cluster.wait_for(task, "FAILED", timeout=30)
    assert ended["Restarts"] == "0"
    cluster.cancel_all()
