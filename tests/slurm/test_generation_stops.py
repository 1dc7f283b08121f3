"""Generation that loses a node or a process, or is preempted, makes the rows of a quiet run."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slurm.cluster import SlurmCluster
from slurm.runs import TINY, output, quiet_rows, records, starts, submit, write_config
from teams_hpc.storage.run_dir import RunDir, read_manifest

MANY = (
    "generate.policy=uniform",
    "generate.num_trajectories=300",
    "generate.unit_size=100",
    "site.slurm.options={exclusive: true}",  # one array task a node
)


def eventually(holds: Callable[[], object], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("quiet")
    found = quiet_rows(write_config(folder, TINY), folder / "run", *MANY)
    return {name: found[name] for name in ("counts", "units", "sha256")}


def start(cluster: SlurmCluster, folder: Path, *words: str) -> tuple[Path, str]:
    """Submit, and wait until generation is in its midst; the run and the array's number."""
    root = folder / "run"
    submit(cluster, write_config(folder, TINY), *MANY, *words)
    (array,) = records(root, "generate")
    shards = root / "generate" / "shards"
    eventually(lambda: len(list(shards.glob("unit-*.h5"))) > 20, timeout=60)
    assert not (root / "generate" / "manifest.json").exists()
    return root, array.job_id


def finish(cluster: SlurmCluster, root: Path, quiet: dict[str, Any]) -> None:
    """Wait for all rows; none is lost and none doubled."""
    manifest = root / "generate" / "manifest.json"
    eventually(lambda: manifest.exists() or not cluster.active(), timeout=200)
    cluster.cancel_all()
    found = read_manifest(RunDir(root), "generate")
    assert found is not None, output(root)
    assert {name: found[name] for name in ("counts", "units", "sha256")} == quiet


@pytest.mark.slurm_long
def test_a_lost_node(cluster: SlurmCluster, quiet: dict[str, Any], tmp_path: Path) -> None:
    root, array = start(cluster, tmp_path)
    (task,) = cluster.find(f"{array}_1")
    cluster.node_down(task["NodeList"])
    finish(cluster, root, quiet)
    assert [restart for _, restart in starts(root, "generate-001")] == [0, 1]


@pytest.mark.slurm_long
def test_a_preempted_task(cluster: SlurmCluster, quiet: dict[str, Any], tmp_path: Path) -> None:
    root, array = start(cluster, tmp_path)
    (task,) = cluster.find(f"{array}_0")
    options = ("--partition=high", "--exclusive", f"--nodelist={task['NodeList']}")
    urgent = cluster.submit("sleep 2", *options, folder=tmp_path)
    cluster.wait_for(urgent, "COMPLETED", timeout=60)
    finish(cluster, root, quiet)
    assert [restart for _, restart in starts(root, "generate-000")] == [0, 1]
    assert [restart for _, restart in starts(root, "generate-001")] == [0]
    assert len(list((root / "slurm" / "stopped").iterdir())) == 1


@pytest.mark.slurm_long
def test_a_killed_process_fails_the_task_and_submitting_again_goes_on(
    cluster: SlurmCluster, quiet: dict[str, Any], tmp_path: Path
) -> None:
    root, array = start(cluster, tmp_path, "site.ranks_per_worker=2")
    victims = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/environ")
        if is_rank_of(path, root)
    ]
    assert len(victims) >= 2
    os.kill(victims[0], signal.SIGKILL)
    (select,) = records(root, "dataset")
    cluster.wait_for(select.job_id, "CANCELLED", timeout=150)
    submit(cluster, tmp_path / "config.yaml", *MANY)
    finish(cluster, root, quiet)
    assert records(root, "generate")[0].job_id == array


def is_rank_of(environ: Path, root: Path) -> bool:
    try:
        words = environ.read_bytes().split(b"\0")
    except OSError:
        return False
    is_ours = f"TEAMS_HPC_RUN_DIR={root}".encode() in words
    return is_ours and b"SLURM_PROCID=1" in words and b"SLURM_STEP_ID=0" in words
