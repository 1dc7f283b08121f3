"""Stages submitted one by one with slurm/submit.sh, as a person would."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slurm.cluster import SlurmCluster

ROOT = Path(__file__).parents[2]
CONFIG = """name: by-hand
extends: {root}/configs/sites/slurm-test.yaml
seeds: {{limit: 40}}
policy: {{num_members: 2, iterations: 2, num_envs: 4, episode_length: 3, num_bootstrap: 100}}
generate: {{num_steps: 2, unit_size: 8}}
site: {{num_sft_ranks: 1, slurm: {{stages: {{sft: {{nodes: 1}}}}}}}}
"""
STAGES = ("policy", "select", "generate", "dataset")


def environment(cluster: SlurmCluster) -> dict[str, str]:
    command = str(Path(sys.executable).with_name("teams-hpc"))
    return {**os.environ, **cluster.environment, "TEAMS_HPC": command}


def by_hand(cluster: SlurmCluster, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ("bash", str(ROOT / "slurm" / "submit.sh"), *words),
        env=environment(cluster),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.slurm_long
def test_stages_follow_each_other(cluster: SlurmCluster, tmp_path: Path) -> None:
    config, run = tmp_path / "hand.yaml", tmp_path / "it's a run"
    config.write_text(CONFIG.format(root=ROOT), encoding="utf-8")
    last: list[str] = []
    jobs = []
    for stage in STAGES:
        done = by_hand(cluster, stage, str(config), f"run_dir={run}", "--", *last)
        assert done.returncode == 0, done.stderr
        found = re.search(r"as job (\d+)", done.stdout)
        assert found is not None, done.stdout
        jobs.append(found[1])
        last = [f"--dependency=afterok:{found[1]}"]
    cluster.wait_for(jobs, "COMPLETED", timeout=120)
    assert all((run / stage / "manifest.json").exists() for stage in STAGES)
    records = [json.loads(path.read_text()) for path in (run / "slurm" / "jobs").iterdir()]
    assert {record["job_id"] for record in records} == set(jobs)
    shown = subprocess.run(
        (sys.executable, "-m", "teams_hpc", "status", str(run), "--json"),
        env=environment(cluster),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    states = {line["stage"]: line["state"] for line in json.loads(shown.stdout)["stages"]}
    assert [states[stage] for stage in STAGES] == ["done"] * len(STAGES)


def test_a_wrong_stage_or_config_submits_nothing(cluster: SlurmCluster, tmp_path: Path) -> None:
    config = tmp_path / "hand.yaml"
    config.write_text(CONFIG.format(root=ROOT), encoding="utf-8")
    done = by_hand(cluster, "nonsense", str(config))
    assert (done.returncode, "no stage 'nonsense'" in done.stderr) == (2, True), done.stderr
    words = (f"run_dir={tmp_path / 'r'}", "site.slurm.partition=nowhere")
    done = by_hand(cluster, "policy", str(config), *words)
    assert (done.returncode, "nowhere" in done.stderr) == (2, True), done.stderr
    assert by_hand(cluster, "policy").returncode == 2
    assert not cluster.active()
    assert not (tmp_path / "r").exists()


@pytest.mark.slurm_long
def test_the_pipeline_script_submits_from_a_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Nothing of the small job's own allocation reaches the jobs it submits."""
    config, run = tmp_path / "hand.yaml", tmp_path / "run"
    words = "generate: {policy: uniform}"
    text = CONFIG.format(root=ROOT).replace("generate: {", "generate: {policy: uniform, ")
    assert words[:-1] in text
    config.write_text(text, encoding="utf-8")
    done = subprocess.run(
        ("sbatch", "--parsable", "--cpus-per-task=3", str(ROOT / "slurm" / "pipeline.sbatch"),
         str(config), f"run_dir={run}"),
        env=environment(cluster), cwd=tmp_path, capture_output=True, text=True, timeout=60,
        check=True,
    )  # fmt: skip
    cluster.wait_for(done.stdout.strip(), "COMPLETED", timeout=60)
    records = [json.loads(path.read_text()) for path in (run / "slurm" / "jobs").iterdir()]
    generate = next(record["job_id"] for record in records if record["stage"] == "generate")
    cluster.wait_for(generate, "COMPLETED", timeout=90)
    (found, *_) = cluster.find(generate)
    assert found["CPUs/Task"] == "1"
    cluster.cancel_all()
