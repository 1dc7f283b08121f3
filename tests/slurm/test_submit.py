"""`teams-hpc submit` on a real Slurm: a whole run, submitted again, with failures, by odd names."""

import time
from collections import Counter
from pathlib import Path

import pytest

from slurm import runs
from slurm.cluster import SlurmCluster, belongs_to

WHOLE = (
    "policy.num_members=8",
    "policy.iterations=1",
    "site.ranks_per_worker=2",
    "site.num_sft_ranks=2",
    "site.slurm.max_parallel_tasks=3",
    "site.slurm.stages.sft.nodes=2",
)

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = (
    "seeds.limit=40",
    "policy.iterations=2",
    "sft.schedule_steps=4",
    "evaluate.control_steps=20",
    "evaluate.num_bootstrap=100",
    "site.slurm.stages.generate.nodes=2",
)


def watch(cluster: SlurmCluster, job_id: str, timeout_s: float) -> list[int]:
    """How many tasks of an array ran, each time squeue was asked until the array ended."""
    deadline = time.monotonic() + timeout_s
    counts = []
    while text := cluster.run("squeue", "-h", "-r", "-o", "%F %T"):
        lines = [line.split() for line in text.splitlines()]
        if not any(array == job_id for array, _ in lines):
            break
        counts.append(Counter(state for array, state in lines if array == job_id)["RUNNING"])
        assert time.monotonic() < deadline, text
        time.sleep(0.2)
    return counts


@pytest.mark.timeout(240)
def test_a_whole_run_on_four_nodes(cluster: SlurmCluster, tmp_path: Path) -> None:
    config, root = runs.write_config(tmp_path), tmp_path / "run"
    said = runs.submit(cluster, config, *WHOLE)
    assert said.count("submitted") == len(runs.STAGES)
    [policy] = runs.records(root, "policy")
    assert policy.indices == tuple(range(8))
    running = watch(cluster, policy.job_id, 100)
    assert max(running) == 3
    expected = runs.quiet_rows(config, tmp_path / "quiet", *WHOLE)
    jobs = runs.finish(cluster, root)

    of = {
        stage: [j for j in jobs for r in runs.records(root, stage) if belongs_to(j, r.job_id)]
        for stage in runs.STAGES
    }
    assert {stage: len(found) for stage, found in of.items()} == {
        **dict.fromkeys(runs.STAGES, 1),
        "policy": 8,
        "generate": 2,
    }
    assert [job["NumTasks"] for job in of["generate"]] == ["2", "2"]
    assert of["sft"][0]["NumNodes"] == "2"
    assert runs.rows(root) == expected
    found = runs.final_status(cluster, root)
    assert [line["state"] for line in found["stages"]] == ["done"] * len(runs.STAGES)
    assert not found["is_running"]
    names = [f"policy-{i:03d}" for i in range(8)] + [f"generate-{i:03d}" for i in range(4)]
    for name in [*names, "select", "dataset", "sft", "sft-rank1", "evaluate", "report"]:
        assert (root / "logs" / f"{name}.log").exists(), name
    runs.verify(cluster, root)
    assert list(root.rglob("*.tmp")) == []


@pytest.mark.slurm_long
@pytest.mark.timeout(420)
def test_the_quickstart_on_four_nodes(cluster: SlurmCluster, tmp_path: Path) -> None:
    """The shipped files, with fewer seeds and steps: generation takes all nodes at once."""
    files = [str(CONFIGS / name) for name in ("quickstart.yaml", "sites/slurm-test.yaml")]
    config, root = runs.write_config(tmp_path, f"extends: {files}\n"), tmp_path / "run"
    words = (f"run_dir={root}", *QUICK)
    runs.submit(cluster, config, *words)
    jobs = runs.finish(cluster, root, 300)
    generate = runs.records(root, "generate")[0].job_id
    nodes = [job["NumNodes"] for job in jobs if belongs_to(job, generate)]
    assert nodes == ["2", "2"]
    runs.verify(cluster, root)
    assert runs.rows(root) == runs.quiet_rows(config, tmp_path / "quiet", *QUICK)
