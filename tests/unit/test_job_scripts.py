"""What sbatch is handed: readable anywhere, the same epilogue everywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from teams_hpc.cluster.jobs import job_spec
from teams_hpc.cluster.slurm import clean_environment
from teams_hpc.cluster.submit import SHELL, job_environment, sbatch_options
from teams_hpc.config import load_config
from teams_hpc.errors import ConfigError
from teams_hpc.pipeline.local import _visible_devices
from teams_hpc.storage.run_dir import RunDir

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.s*"))
STAGES = ("policy", "select", "generate", "dataset", "sft", "evaluate", "report")


def write_config(folder: Path, *lines: str) -> Path:
    path = folder / "run.yaml"
    site = ROOT / "configs" / "sites" / "slurm-test.yaml"
    path.write_text("\n".join((f"name: scripts\nextends: {site}", *lines)), encoding="utf-8")
    return path


def dry_run(config: Path, folder: Path, *words: str) -> str:
    """Scripts as `submit --dry-run` prints them, with nothing of Slurm on PATH."""
    done = subprocess.run(
        (sys.executable, "-m", "teams_hpc", "submit", str(config), "--dry-run", *words),
        env={**os.environ, "PATH": "/nowhere"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_dry_run_shows_every_script_and_submits_nothing(tmp_path: Path) -> None:
    text = dry_run(write_config(tmp_path), tmp_path)
    assert not (tmp_path / "runs").exists()
    parts = text.split("##### ")[1:]
    assert [part.split(":")[0].split(",")[0] for part in parts] == [*STAGES, "DeepSpeed"]
    epilogue = (SHELL / "requeue.sh").read_text(encoding="utf-8")
    for part in parts[:-1]:
        assert epilogue in part
        assert "#SBATCH --kill-on-invalid-dep=yes" in part
    config = json.loads(parts[-1].partition("\n")[2])
    assert config["zero_optimization"]["stage"] == 3


def test_a_path_in_a_script_is_quoted(tmp_path: Path) -> None:
    hostile = tmp_path / "it's; touch x"
    text = dry_run(write_config(tmp_path), tmp_path, f"run_dir={hostile}")
    script = text.split("##### ")[1].partition("\n")[2]
    line = next(line for line in script.splitlines() if line.startswith("export TEAMS_HPC_RUN_DIR"))
    shown = subprocess.run(
        ("bash", "-c", f'{line}; printf %s "$TEAMS_HPC_RUN_DIR"'),
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    assert shown.stdout == str(hostile)


def test_scripts_in_slurm_share_the_epilogue_and_say_how_to_start_them() -> None:
    for name in ("requeue.sh", "prologue.sh", "task.sh"):
        assert (ROOT / "slurm" / name).read_bytes() == (SHELL / name).read_bytes()
    for stage in STAGES:
        text = (ROOT / "slurm" / f"{stage}.sbatch").read_text(encoding="utf-8")
        assert f"slurm/submit.sh {stage} CONFIG" in text
        assert text.rstrip().endswith('. "$TEAMS_HPC_SHELL/requeue.sh"')


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ("shellcheck", str(path)), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout


def test_processes_are_spread_over_nodes(tmp_path: Path) -> None:
    config = load_config(
        write_config(tmp_path), ["site.num_sft_ranks=8", "site.gpus_per_node=4",
                                 "site.slurm.stages.sft.nodes=null"]
    )  # fmt: skip
    spec = job_spec(config, "sft", (0,))
    assert (spec.nodes, spec.tasks_per_node, spec.gpus_per_node) == (2, 4, 4)
    assert spec.ranks_hang_together
    assert sbatch_options(config, spec)["gpus-per-node"] == 4
    config = load_config(write_config(tmp_path), ["site.num_sft_ranks=3"])
    with pytest.raises(ConfigError, match=r"site.num_sft_ranks: 3 .* over 2 nodes"):
        job_spec(config, "sft", (0,))


def test_one_end_ends_all_where_processes_wait_for_each_other(tmp_path: Path) -> None:
    def kills(stage: str, *words: str) -> str:
        config = load_config(write_config(tmp_path), words)
        spec = job_spec(config, stage, (0,))
        return job_environment(config, RunDir(tmp_path / "r"), spec)["SLURM_KILL_BAD_EXIT"]

    assert kills("sft") == "1"
    assert kills("generate", "site.slurm.mpi=pmix") == "1"
    assert kills("generate") == kills("policy") == "0"


def test_a_container_is_told_what_to_bind(tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    config = load_config(
        write_config(tmp_path), [f"site.container.image={image}", "site.container.binds=[/data:/d]"]
    )
    environment = job_environment(config, RunDir(tmp_path / "r"), job_spec(config, "select", (0,)))
    assert environment["TEAMS_HPC_IMAGE"] == str(image)
    assert environment["APPTAINER_BIND"] == f"{tmp_path / 'r'},/data:/d"
    assert environment["TEAMS_HPC_TASK_PYTHON"] == "python3"


def test_the_task_script_keeps_warnings_waiting(tmp_path: Path) -> None:
    """A signal that comes before Python listens is there when it does."""
    script = (
        "import os, signal, sys; os.kill(os.getpid(), signal.SIGUSR2);"
        "from teams_hpc.runtime.preemption import StopFlag;"
        "stop = StopFlag(); stop.install(); print(stop.reason)"
    )
    done = subprocess.run(
        ("sh", str(SHELL / "task.sh"), sys.executable, "-c", script),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "SIGUSR2"), done.stderr


def test_a_fake_container_gets_the_command(tmp_path: Path) -> None:
    apptainer = tmp_path / "apptainer"
    apptainer.write_text('#!/bin/sh\nprintf "%s|" "$@"\n', encoding="utf-8")
    apptainer.chmod(0o755)
    done = subprocess.run(
        ("sh", str(SHELL / "task.sh"), "python3", "-c", "a b"),
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "TEAMS_HPC_IMAGE": "/i m.sif"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "exec|/i m.sif|python3|-c|a b|"


@pytest.mark.parametrize(
    ("answer", "deadline"),
    [
        ("echo 2026-11-23T23:30:18", "1795476618"),
        ("echo N/A", ""),
        ("echo Unknown", ""),
        ("exit 1", ""),  # of nothing `date` would make midnight, long over
    ],
)
def test_a_job_whose_end_is_not_known_has_no_deadline(
    tmp_path: Path, answer: str, deadline: str
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\n[ "$SLURM_TIME_FORMAT" = standard ] || exit 1\n{answer}\n')
    squeue.chmod(0o755)
    shown = '. "$1"; printf "%s|%s|%s" "$TEAMS_HPC_JOB" "$TEAMS_HPC_DEADLINE" "$MASTER_ADDR"'
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "TZ": "UTC",
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURMD_NODENAME": "node1",
        "SLURM_TIME_FORMAT": "relative",
    }
    done = subprocess.run(
        ("bash", "-c", shown, "sh", str(SHELL / "prologue.sh")),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"7_2|{deadline}|node1"


def test_a_job_inherits_nothing_of_where_it_was_submitted() -> None:
    inside = {
        "SLURM_JOB_ID": "7",
        "SQUEUE_STATES": "PENDING",
        "RANK": "3",
        "CUDA_VISIBLE_DEVICES": "1",
        "TEAMS_HPC_FIRST_JOB": "7",
    }
    kept = {"SLURM_CONF": "/etc/s.conf", "PATH": "/bin", "OPENAI_KEY": "k"}
    assert clean_environment({**inside, **kept}) == kept


def test_a_model_that_vllm_splits_gets_its_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["expert.kind=vllm", "expert.model=/m", "expert.tensor_parallel_size=2",
             "site.gpus_per_node=4", "site.ranks_per_worker=4"]  # fmt: skip
    config = load_config(write_config(tmp_path), words)
    spec = job_spec(config, "generate", (0, 1))
    assert (spec.nodes, spec.tasks_per_node, spec.gpus_per_node) == (2, 2, 4)
    assert job_spec(config, "policy", (0,)).gpus_per_node == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [_visible_devices(index, 4, 2) for index in range(3)] == ["0,1", "2,3", "0,1"]
    assert [_visible_devices(index, 2, 1) for index in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,8")
    assert [_visible_devices(index, 2, 1) for index in range(3)] == ["5", "7", "5"]
    assert _visible_devices(0, 4, 2) == "5,7"
