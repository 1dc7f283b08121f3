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
    words = [f"site.container.image={image}", "site.container.binds=[/data:/d]",
             "site.container.environment={NCCL_DEBUG: INFO}"]  # fmt: skip
    environment = environment_of(write_config(tmp_path), tmp_path / "r", *words)
    assert environment["TEAMS_HPC_IMAGE"] == str(image)
    assert environment["APPTAINER_BIND"] == f"{tmp_path / 'r'},/tmp,/data:/d"
    assert environment["APPTAINERENV_NCCL_DEBUG"] == "INFO"
    assert environment["APPTAINER_NO_HOME"] == "1"
    assert environment["TEAMS_HPC_SCRATCH"] == "/tmp"
    assert environment["TEAMS_HPC_TASK_PYTHON"] == "python3"
    assert "APPTAINER_NV" not in environment  # no GPUs here
    more = ("site.container.kind=singularity", "site.gpus_per_node=2", "site.slurm.scratch=/local")
    environment = environment_of(write_config(tmp_path), tmp_path / "r", *words, *more)
    assert environment["SINGULARITY_NV"] == environment["SINGULARITY_NO_HOME"] == "1"
    assert environment["SINGULARITY_BIND"] == f"{tmp_path / 'r'},/local,/data:/d"
    assert environment["SINGULARITYENV_NCCL_DEBUG"] == "INFO"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not [name for name in environment if name.startswith("APPTAINER")]


def environment_of(config: Path, run_dir: Path, *words: str) -> dict[str, str]:
    """The environment of a job of `select`."""
    loaded = load_config(config, words)
    return job_environment(loaded, RunDir(run_dir), job_spec(loaded, "select", (0,)))


def test_a_model_folder_of_links_is_bound_with_what_they_lead_to(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub."""
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "1", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    words = ("site.container.image=/i.sif", "instructor.kind=transformers",
             f"instructor.model={snapshot}", f"seeds.path={tmp_path}/data/s.jsonl")  # fmt: skip
    environment = environment_of(write_config(tmp_path), tmp_path / "r", *words)
    expected = (tmp_path / "r", "/tmp", tmp_path / "data", snapshot, blobs)
    assert environment["APPTAINER_BIND"] == ",".join(map(str, expected))


def test_keys_of_a_container_are_checked(tmp_path: Path) -> None:
    for word, said in (
        ("runtime=apptainer", r"site.container.runtime: no such key; .* kind"),
        ("kind=docker", "site.container.kind"),
        ("binds=[data]", "site.container.binds"),
        ("environment={'A B': x}", "site.container.environment"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(
                write_config(tmp_path), ["site.container.image=/i.sif", f"site.container.{word}"]
            )


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
    done = task({"PATH": f"{tmp_path}:{os.environ['PATH']}", "TEAMS_HPC_IMAGE": "/i m.sif"})
    assert done.stdout == "exec|/i m.sif|python3|-c|a b|"


def task(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`task.sh python3 -c 'a b'` with this environment and no other."""
    return subprocess.run(
        ("sh", str(SHELL / "task.sh"), "python3", "-c", "a b"),
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("kind", ["apptainer", "singularity"])
def test_what_a_task_finds_in_its_container(tmp_path: Path, kind: str) -> None:
    upper, meeting = kind.upper(), tmp_path / "pmix.7.0"
    meeting.mkdir()
    (tmp_path / kind).write_text("#!/bin/sh\nenv\n", encoding="utf-8")
    (tmp_path / kind).chmod(0o755)
    done = task({
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "TEAMS_HPC_IMAGE": "/i.sif",
        "TEAMS_HPC_CONTAINER": kind, "TEAMS_HPC_SCRATCH": str(tmp_path), "SLURM_JOB_ID": "7",
        "SLURM_STEP_NUM_TASKS": "4", f"{upper}_BIND": "/run", "PMIX_SERVER_TMPDIR": str(meeting),
        "PYTHONPATH": "/host", "HF_HOME": "/home/me/.cache/huggingface",
    })  # fmt: skip
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    scratch = tmp_path / "teams-hpc-7"
    assert scratch.stat().st_mode & 0o777 == 0o700
    for name in ("TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR"):
        assert Path(found[name]).is_relative_to(scratch)
    assert found[f"{upper}ENV_TEAMS_HPC_STEP_SIZE"] == "4"
    assert found[f"{upper}_BIND"] == f"/run,{meeting}"
    assert "PYTHONPATH" not in found


def test_a_task_refuses_what_would_drop_the_launchers_variables(tmp_path: Path) -> None:
    for name in ("APPTAINER_CLEANENV", "APPTAINER_CONTAINALL", "SINGULARITY_CLEANENV"):
        done = task({"PATH": os.environ["PATH"], "TEAMS_HPC_IMAGE": "/i.sif", name: "1"})
        assert done.returncode == 2
        assert f"unset {name}" in done.stderr


def test_a_task_puts_no_caches_where_others_may_write(tmp_path: Path) -> None:
    """In /tmp somebody else may have made the folder, and programs are loaded from it."""
    scratch = {"PATH": os.environ["PATH"], "TEAMS_HPC_SCRATCH": str(tmp_path)}
    (tmp_path / "theirs").mkdir(mode=0o700)
    (tmp_path / "teams-hpc-8").symlink_to(tmp_path / "theirs")
    (tmp_path / "teams-hpc-9").mkdir()
    (tmp_path / "teams-hpc-9").chmod(0o770)
    for job in ("8", "9"):
        done = task({**scratch, "SLURM_JOB_ID": job})
        assert (done.returncode, "not a private folder" in done.stderr) == (1, True)


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


def test_a_model_that_vllm_splits_gets_its_gpus(tmp_path: Path) -> None:
    words = ["expert.kind=vllm", "expert.model=/m", "expert.tensor_parallel_size=2",
             "site.gpus_per_node=4", "site.ranks_per_worker=4"]  # fmt: skip
    config = load_config(write_config(tmp_path), words)
    spec = job_spec(config, "generate", (0, 1))
    assert (spec.nodes, spec.tasks_per_node, spec.gpus_per_node) == (2, 2, 4)
    assert job_spec(config, "policy", (0,)).gpus_per_node == 1
