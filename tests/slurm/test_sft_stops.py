"""A fine-tuning on two nodes that is stopped or loses a node ends with the same numbers."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.cluster import SlurmCluster
from slurm.runs import TINY, output, quiet_rows, records, starts, submit, write_config

SFT = (
    "generate.policy=uniform",
    "site.num_sft_ranks=2",
    "site.slurm.stages.sft.nodes=2",
    "sft.schedule_steps=400",
    "sft.checkpoint_interval_steps=40",
    "sft.eval_interval_steps=200",
)


def eventually(holds: Callable[[], object], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has its data set and nothing more."""
    folder = tmp_path_factory.mktemp("data")
    quiet_rows(write_config(folder), folder / "run", *SFT)
    return folder / "run"


def start(cluster: SlurmCluster, data: Path, folder: Path, *words: str) -> Path:
    """Submit what comes after the data set; the run's folder."""
    root = folder / "run"
    for name in ("generate", "dataset"):
        shutil.copytree(data / name, root / name)
    root.chmod(0o700)
    submit(cluster, write_config(folder, TINY), *SFT, *words)
    return root


def finish(cluster: SlurmCluster, root: Path, timeout: float = 240) -> tuple[str, list[float]]:
    """Wait for the model; SHA-256 of its files and the loss of every step."""
    eventually(
        lambda: (root / "sft" / "manifest.json").exists() or not cluster.active(), timeout=timeout
    )
    cluster.cancel_all()
    assert (root / "sft" / "manifest.json").exists(), output(root)
    files = json.loads((root / "sft" / "manifest.json").read_text())["files"]
    lines = [json.loads(line) for line in (root / "sft" / "metrics.jsonl").read_text().splitlines()]
    return json.dumps(files), [line["loss"] for line in lines if "loss" in line]


def reach(root: Path, step: int) -> None:
    def steps() -> int:
        path = root / "sft" / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    eventually(lambda: steps() > step, timeout=120)


@pytest.fixture(scope="module")
def undisturbed(
    cluster: SlurmCluster, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[float]]:
    found = finish(cluster, start(cluster, data, tmp_path_factory.mktemp("undisturbed")))
    assert len(found[1]) == 400
    return found


def restarts(root: Path) -> list[int]:
    return [restart for _, restart in starts(root, "sft")]


@pytest.mark.slurm_long
def test_a_preempted_fine_tuning(
    cluster: SlurmCluster, data: Path, undisturbed: tuple[str, list[float]], tmp_path: Path
) -> None:
    root = start(cluster, data, tmp_path)
    reach(root, 60)
    urgent = cluster.submit("true", "--partition=high", "--nodes=4", "--exclusive", folder=tmp_path)
    cluster.wait_for(urgent, "COMPLETED", timeout=60)
    assert finish(cluster, root) == undisturbed
    assert restarts(root) == [0, 1]
    (job,) = records(root, "sft")
    assert (root / "slurm" / "stopped" / f"{job.job_id}-0").exists()


@pytest.mark.slurm_long
def test_a_fine_tuning_that_reaches_its_time_limit(
    cluster: SlurmCluster, data: Path, undisturbed: tuple[str, list[float]], tmp_path: Path
) -> None:
    limits = (
        "site.slurm.stages.sft.time_min=1",
        "site.slurm.warning_s=35",
        "site.max_restarts_without_progress=8",  # a busy machine hardly starts within 25 s
    )
    root = start(cluster, data, tmp_path, *limits)
    assert finish(cluster, root, timeout=600) == undisturbed
    assert restarts(root)[:2] == [0, 1]


@pytest.mark.slurm_long
def test_a_node_lost_in_mid_training(
    cluster: SlurmCluster, data: Path, undisturbed: tuple[str, list[float]], tmp_path: Path
) -> None:
    root = start(cluster, data, tmp_path)
    reach(root, 90)
    (job,) = records(root, "sft")
    (found,) = cluster.find(job.job_id)
    lost = next(node for node in cluster.nodes if node in expanded(cluster, found["NodeList"]))
    cluster.node_down(lost)
    cluster.wait_for(job.job_id, "RUNNING", timeout=60)
    assert finish(cluster, root) == undisturbed
    assert restarts(root) == [0, 1]


def expanded(cluster: SlurmCluster, nodes: str) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", nodes).split()
