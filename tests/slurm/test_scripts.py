"""What jobs are given: scripts that a checker passes, and nothing of the submitter's own job."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm import runs
from slurm.cluster import SlurmCluster
from teams_hpc.cluster.submit import SHELL

OUTER = """
export SLURM_OUTER=1 SBATCH_OUTER=1 SRUN_OUTER=1 PMI_OUTER=1 TEAMS_HPC_OUTER=1 OUTER=1
export SBATCH_TIMELIMIT=3 SBATCH_JOB_NAME=outer SLURM_NTASKS=7
{python} -m teams_hpc submit {config} generate.policy=uniform 2>&1 | tee said
"""


def dry_run(folder: Path, *words: str) -> list[str]:
    """The scripts that `--dry-run` prints where no command is on PATH, and DeepSpeed's JSON."""
    done = subprocess.run(
        (sys.executable, "-m", "teams_hpc", "submit", "config.yaml", "--dry-run", *words),
        env={**os.environ, "PATH": "/nowhere"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [part.partition("\n")[2] for part in done.stdout.split("##### ")[1:]]


def test_a_checker_has_nothing_to_say_of_the_scripts(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    runs.write_config(tmp_path)
    words = ("site.slurm.modules=[cuda/13.0]", f"run_dir={tmp_path}/it's; a $(run)")
    for number, script in enumerate(dry_run(tmp_path, *words)[:-1]):
        path = tmp_path / f"{number}.sh"
        path.write_text(script)
        # SC2016 doubts that the dollar in a quoted folder name is meant as it stands.
        done = subprocess.run(
            ("shellcheck", "--shell=bash", "--exclude=SC2016", str(path)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}{script}"


def body(script: str) -> list[str]:
    """A script without the lines that no dry run can know: job numbers, and what is called."""
    changing = ("#SBATCH --dependency", "srun ", "#SBATCH --array")
    return [line for line in script.splitlines() if not line.startswith(changing)]


def test_what_is_submitted_is_what_a_dry_run_shows(cluster: SlurmCluster, tmp_path: Path) -> None:
    config, root = runs.write_config(tmp_path), tmp_path / "run"
    shown = dry_run(tmp_path)[:-1]
    runs.submit(cluster, config)
    cluster.cancel_all()
    for record, script in zip(runs.records(root), shown, strict=True):
        told = cluster.run("scontrol", "write", "batch_script", record.job_id, "-")
        assert (SHELL / "requeue.sh").read_text() in told
        assert (SHELL / "prologue.sh").read_text() in told
        assert body(told.rstrip("\n")) == body(script.rstrip("\n")), record.stage


def environments(job_id: str) -> Iterator[dict[str, str]]:
    """The environment of each process that belongs to a job."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        found = dict(word.split("=", 1) for word in words if "=" in word)
        if found.get("SLURM_JOB_ID") == job_id:
            yield found


def test_a_job_that_submits_hands_nothing_of_its_own_on(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    config, root = runs.write_config(tmp_path), tmp_path / "run"
    script = OUTER.format(python=sys.executable, config=config)
    options = ("--ntasks=3", "--cpus-per-task=2", "--time=7", "--job-name=outer")
    outer = cluster.submit(script, *options, folder=tmp_path)
    cluster.wait_for(outer, "COMPLETED", timeout=60)
    assert "submitted" in (tmp_path / "said").read_text()
    [generate] = runs.records(root, "generate")
    deadline = time.monotonic() + 40
    seen: list[dict[str, str]] = []
    while not any("SLURM_STEP_ID" in environment for environment in seen):
        [job, *_] = cluster.find(generate.job_id)
        assert time.monotonic() < deadline, job
        seen += environments(job["JobId"])
    cluster.cancel_all()
    for environment in seen:
        handed = {name for name in environment if name.endswith("_OUTER")}
        assert not handed
        assert environment["OUTER"] == "1"  # what has nothing to do with jobs is handed on
        assert environment["SLURM_NTASKS"] == "1"
        assert environment.get("SLURM_CPUS_PER_TASK", "1") == "1"
        assert environment["SLURM_JOB_NAME"] == "tiny-generate"
    assert job["TimeLimit"] == "00:10:00"
    assert job["JobName"] == "tiny-generate"
