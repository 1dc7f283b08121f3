"""Stages of a run inside the container, on two nodes of a real Slurm; requeueing stays outside."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slurm.cluster import CommandError, SlurmCluster
from slurm.disturbances import stops, wait_until
from slurm.runs import (
    command,
    finish,
    output,
    quiet_rows,
    records,
    rows,
    starts,
    submit,
    wait_for_end,
    write_config,
)

from containers.apptainer import Apptainer
from containers.conftest import PROJECT
from containers.test_apptainer import HELLO, worlds

pytestmark = [pytest.mark.containers_long, pytest.mark.timeout(2400)]
TASK = str(PROJECT / "slurm" / "task.sh")
# Nodes that share a host would find shared memory between them.
ONE_HOST = {"UCX_TLS": "tcp,self"}
ITERATIONS = 60


def site(sandbox: Path, apptainer: Apptainer, **more: str) -> tuple[str, ...]:
    """Settings with which every task enters the container, as root of this machine can."""
    own = {name: value for name, value in apptainer.environment.items() if name != "PATH"}
    told = json.dumps({**own, **more})
    return (
        f"site.container={{kind: apptainer, image: '{sandbox}', environment: {{INSIDE: '1'}}}}",
        f"site.slurm.environment={told}",
    )


def environments(root: Path) -> list[dict[str, str]]:
    """The environment of each process that is in the container and works on this run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            text = path.read_text(errors="replace")
        except OSError:
            continue
        words = dict(word.split("=", 1) for word in text.split("\0") if "=" in word)
        if words.get("TEAMS_HPC_RUN_DIR") == str(root) and "APPTAINER_CONTAINER" in words:
            found.append(words)
    return found


@pytest.fixture
def two_tasks(
    cluster: SlurmCluster, sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    """`srun` for one task on each of two nodes, each in the container."""
    for name, value in {**ONE_HOST, "TEAMS_HPC_IMAGE": str(sandbox)}.items():
        monkeypatch.setenv(name, value)
    return ("srun", "--nodes=2", "--ntasks=2", "--mpi=pmix", TASK)


def test_two_nodes_are_one_world(cluster: SlurmCluster, two_tasks: tuple[str, ...]) -> None:
    found = cluster.run(*two_tasks, "python3", "-c", HELLO, timeout=120)
    assert worlds(found) == ["0 of 2, 2", "1 of 2, 2"]
    # The folder where srun and its processes meet may lie where nothing else is bound.
    seen = cluster.run(*two_tasks, "sh", "-c", 'ls -d "$PMIX_SERVER_TMPDIR"', timeout=60)
    assert len(seen.splitlines()) == 2


def test_doctor_tries_mpi_in_the_container(
    cluster: SlurmCluster,
    apptainer: Apptainer,
    sandbox: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    words = ("site.slurm.mpi=pmix", *site(sandbox, apptainer, **ONE_HOST))
    said = command(cluster, "doctor", str(write_config(tmp_path)), *words, folder=tmp_path)
    lines = [line for line in said.text.splitlines() if "MPI with --mpi=pmix" in line]
    assert len(lines) == 1, said.text
    assert "size 2 and 2" in lines[0], said.text


def test_a_container_that_drops_srun_s_variables_is_caught(
    cluster: SlurmCluster,
    two_tasks: tuple[str, ...],
    apptainer: Apptainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both tasks would think they were alone; `srun` would end well."""
    stage = ("python3", "-m", "teams_hpc", "stage", "generate", str(tmp_path / "run"))
    monkeypatch.setenv("APPTAINER_CLEANENV", "1")
    with pytest.raises(CommandError, match="unset APPTAINER_CLEANENV"):
        cluster.run(*two_tasks, *stage, timeout=120)
    monkeypatch.delenv("APPTAINER_CLEANENV")
    wrapper = tmp_path / "apptainer"
    wrapper.write_text(f'#!/bin/sh\nshift\nexec {apptainer.program} exec --cleanenv "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    alone = cluster.run(*two_tasks, "python3", "-c", HELLO, timeout=120)
    assert worlds(alone) == ["0 of 1, 1", "0 of 1, 1"]
    with pytest.raises(CommandError, match="one of 2 of its step, but finds no variables"):
        cluster.run(*two_tasks, *stage, timeout=120)


def test_a_stage_of_the_quickstart_is_stopped_in_the_container_and_requeued_by_the_host(
    cluster: SlurmCluster, apptainer: Apptainer, sandbox: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    words = (
        *(f"{role}.kind=template" for role in ("instructor", "reviewer", "expert")),
        f"run_dir={root}", f"policy.iterations={ITERATIONS}", "policy.num_members=2",
        "site.executor=slurm", "site.slurm.time_min=10", "site.slurm.warning_s=30",
        "site.slurm.mem_gb=2", "site.slurm.stages.policy.cpus_per_task=8",
    )  # fmt: skip
    config = PROJECT / "configs" / "quickstart.yaml"
    said = command(
        cluster, "submit", str(config), *words, *site(sandbox, apptainer), folder=tmp_path
    )
    assert said.code == 0, said.text
    [array] = records(root, "policy")
    assert array.is_array
    task = array.task_ids[1]
    metrics = root / "policy" / "member-001" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, "progress")
    inside = environments(root)
    assert inside, output(root)
    for found in inside:
        assert found["APPTAINER_CONTAINER"] == str(sandbox)
        assert (found["HF_HUB_OFFLINE"], found["INSIDE"]) == ("1", "1")
        scratch = Path("/tmp", f"teams-hpc-{found['SLURM_JOB_ID']}")
        for name in ("TORCH_EXTENSIONS_DIR", "HF_HOME", "TRITON_CACHE_DIR"):
            assert Path(found[name]).is_relative_to(scratch), found
        assert (scratch.stat().st_mode & 0o777, scratch.stat().st_uid) == (0o700, os.getuid())
    [before] = cluster.find(task)
    cluster.run("scancel", "--signal=USR2", task)
    wait_until(lambda: stops(root), "a stop")
    cluster.wait_for(array.job_id, "COMPLETED", timeout=180)
    cluster.cancel_all()

    [after] = cluster.find(task)
    assert after["Restarts"] == "1", output(root)
    assert starts(root, "policy-001") == [(before["JobId"], 0), (before["JobId"], 1)]
    done = [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]
    assert done == [done[0] + n for n in range(ITERATIONS)]
    assert (root / "policy" / "manifest.json").exists(), output(root)
    assert not list(Path("/tmp").glob(f"teams-hpc-{before['JobId']}"))


def test_generation_over_two_nodes_is_one_step_of_mpi_with_the_rows_of_one_process(
    cluster: SlurmCluster, apptainer: Apptainer, sandbox: Path, tmp_path: Path
) -> None:
    config, root = write_config(tmp_path), tmp_path / "run"
    words = ("generate.policy=uniform", "site.num_workers=1", "site.ranks_per_worker=2",
             "site.slurm.stages.generate.nodes=2", "site.slurm.mpi=pmix")  # fmt: skip
    submit(cluster, config, *words, *site(sandbox, apptainer, **ONE_HOST))
    finish(cluster, root, timeout_s=400)
    assert "MPI joined 2 processes" in (root / "logs" / "generate-000.log").read_text()
    assert rows(root) == quiet_rows(config, tmp_path / "quiet", "generate.policy=uniform")


def test_a_submitted_step_whose_variables_would_be_dropped_fails(
    cluster: SlurmCluster, apptainer: Apptainer, sandbox: Path, tmp_path: Path
) -> None:
    config, root = write_config(tmp_path), tmp_path / "run"
    words = site(sandbox, apptainer, APPTAINER_CLEANENV="1")
    submit(cluster, config, "generate.policy=uniform", *words)
    wait_for_end(cluster, root, 90)
    assert "error: unset APPTAINER_CLEANENV" in output(root)
    assert not (root / "generate" / "manifest.json").exists()


def test_scripts_that_are_submitted_by_hand_enter_it_too(
    cluster: SlurmCluster,
    apptainer: Apptainer,
    sandbox: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls, wrapper = tmp_path / "calls", tmp_path / "apptainer"
    wrapper.write_text(f'#!/bin/sh\necho "$*" >> {calls}\nexec {apptainer.program} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    config = write_config(tmp_path)
    done = subprocess.run(
        ("bash", str(PROJECT / "slurm" / "submit.sh"), "generate", str(config),
         "generate.policy=uniform", *site(sandbox, apptainer)),
        env={**os.environ, "TEAMS_HPC": str(Path(sys.executable).with_name("teams-hpc"))},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"as job (\d+)", done.stdout)
    assert found is not None, done.stdout
    cluster.wait_for(found[1], "COMPLETED", timeout=120)
    assert f"exec {sandbox} python3 -m teams_hpc stage generate" in calls.read_text()
    assert (tmp_path / "run" / "generate" / "manifest.json").exists(), output(tmp_path / "run")
