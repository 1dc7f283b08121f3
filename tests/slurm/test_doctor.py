"""`doctor` and `submit`'s checks against a real Slurm."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.cluster import ACCOUNT, QOS, SlurmCluster
from teams_hpc.cluster.preflight import slurm_faults
from teams_hpc.cluster.slurm import scheduler_settings
from teams_hpc.config import Config, load_config
from teams_hpc.pipeline.submit import job_specs
from teams_hpc.report.doctor_slurm import slurm_findings
from teams_hpc.report.finding import Finding

Make = Callable[..., Config]


@pytest.fixture
def make(cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    scheduler_settings.cache_clear()
    path = tmp_path / "config.yaml"
    slurm = f"{{account: {ACCOUNT}, qos: {QOS}, time_min: 30}}"
    path.write_text(
        f"name: t\nrun_dir: {tmp_path / 'run'}\ngenerate: {{policy: uniform}}\n"
        f"site:\n  executor: slurm\n  num_workers: 3\n  slurm: {slurm}\n"
    )
    return lambda *overrides: load_config(path, overrides)


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def faults_of(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.is_fault]


def test_a_sound_configuration_has_no_fault(make: Make, tmp_path: Path) -> None:
    findings = slurm_findings(make())
    found = by_name(findings)
    assert faults_of(findings) == []
    assert [line.what for line in findings if not (line.found and line.expected)] == []
    assert ACCOUNT in found["account and qos"].found
    assert found["partition low: preemption"].found.startswith("REQUEUE, 15 s")
    assert "MaxArraySize 1001" in found["array limit"].found
    assert len(found["nodes"].found.split(", ")) == 2
    assert found["exclusive link, rename over"].found.startswith("1 of 2")
    assert found["heartbeat between nodes"].level == "ok"
    assert found["torch on the nodes"].level == "ok"
    assert list(tmp_path.glob(".teams-hpc-doctor-*")) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("site.slurm.partition=nope", "site.slurm.partition: there is no partition nope"),
        ("site.slurm.account=nope", "site.slurm.account: you may not use account nope"),
        ("site.slurm.qos=nope", "site.slurm.qos: you may not use qos nope"),
        ("site.slurm.cpus_per_task=9", "site.slurm.cpus_per_task: 9 CPUs of each node"),
        ("site.slurm.mem_gb=100", "site.slurm.mem_gb: 102400 MB of memory"),
        ("site.slurm.stages.sft.gpus_per_node=5", "site.slurm.stages.sft.gpus_per_node: 5 GPUs"),
        ("site.slurm.options={constraint: nope}", "site.slurm: sbatch refuses: "),
        ("site.slurm.options={reservation: nope}", "site.slurm: sbatch refuses: "),
    ],
)
def test_each_cause_is_named_once(make: Make, override: str, words: str) -> None:
    config = make(override)
    [fault] = slurm_faults(config, job_specs(config))
    assert fault.startswith(words)
    assert [finding.what for finding in faults_of(slurm_findings(config))] == [words.split(": ")[0]]


def test_a_time_limit_that_sbatch_itself_lets_pass(cluster: SlurmCluster, make: Make) -> None:
    cluster.run("scontrol", "update", "partitionname=low", "maxtime=10")
    try:
        config = make()
        [fault] = slurm_faults(config, job_specs(config))
    finally:
        cluster.run("scontrol", "update", "partitionname=low", "maxtime=infinite")
    assert fault.startswith("site.slurm.time_min: 30 minutes asked, partition low allows 10")


def test_nodes_that_are_drained_are_no_fault(cluster: SlurmCluster, make: Make) -> None:
    names = ",".join(cluster.nodes)
    cluster.run("scontrol", "update", f"nodename={names}", "state=drain", "reason=test")
    config = make()
    assert slurm_faults(config, job_specs(config)) == []


def test_a_busy_queue_is_a_note(
    cluster: SlurmCluster, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teams_hpc.report.doctor_probe._WAIT_S", 2)
    job = cluster.submit("sleep 60", "--nodes=4", "--exclusive", folder=tmp_path)
    cluster.wait_for(job, "RUNNING")
    findings = slurm_findings(make())
    assert by_name(findings)["nodes"].level == "note"
    assert faults_of(findings) == []


def test_a_run_directory_hidden_from_the_nodes_is_a_fault(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "teams_hpc.report.doctor_probe._probe_words",
        lambda *_: [sys.executable, "-m", "teams_hpc.cluster.probe", "/nowhere/else"],
    )
    [fault] = faults_of(slurm_findings(make()))
    assert fault.what == "run directory on the nodes"
    assert "not seen by 127.0.0.11, 127.0.0.12" in fault.found


def fake_mpi(folder: Path, size: str) -> None:
    """A stand-in for mpi4py; which world it reports is up to the test."""
    (folder / "mpi4py").mkdir()
    (folder / "mpi4py" / "__init__.py").touch()
    code = f"import os\nclass COMM_WORLD:\n    size = {size}\n"
    (folder / "mpi4py" / "MPI.py").write_text(code)
    (folder / "mpi4py-4.0.0.dist-info").mkdir()
    meta = "Metadata-Version: 2.1\nName: mpi4py\nVersion: 4.0.0\n"
    (folder / "mpi4py-4.0.0.dist-info" / "METADATA").write_text(meta)


@pytest.mark.parametrize(
    ("size", "level"), [("int(os.environ['SLURM_NTASKS'])", "ok"), ("1", "fault")]
)
def test_single_processes_instead_of_one_mpi_world(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, level: str
) -> None:
    fake_mpi(tmp_path, size)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = by_name(slurm_findings(make("site.slurm.mpi=pmi2")))
    assert found["MPI with --mpi=pmi2"].level == level


def test_flash_attention_that_nodes_lack(make: Make) -> None:
    [fault] = faults_of(slurm_findings(make("sft.attention=flash_attention_2")))
    assert fault.what == "flash-attn on the nodes"


def test_the_command_exits_1_on_a_fault(cluster: SlurmCluster, make: Make, tmp_path: Path) -> None:
    make()
    done = subprocess.run(
        [sys.executable, "-m", "teams_hpc", "doctor", str(tmp_path / "config.yaml"),
         "site.slurm.partition=nope"],
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "there is no partition nope" in done.stdout
    assert "Traceback" not in done.stderr


def test_packages_are_looked_for_inside_the_container(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    runtime = tmp_path / "bin" / "apptainer"
    runtime.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} "$@"\n')  # exec IMAGE python3
    runtime.chmod(0o755)
    (tmp_path / "x.sif").touch()
    override = f"site.container={{image: {tmp_path / 'x.sif'}}}"
    without = by_name(slurm_findings(make(override)))
    assert without["container runtime"].level == "note"
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    found = by_name(slurm_findings(make(override)))
    assert found["container"].found == "apptainer starts x.sif"
    assert found["torch on the nodes"].level == "ok"
    runtime.write_text("#!/bin/sh\necho no such image >&2\nexit 255\n")
    broken = by_name(slurm_findings(make(override)))
    assert broken["container"].is_fault
    assert "no such image" in broken["container"].found
