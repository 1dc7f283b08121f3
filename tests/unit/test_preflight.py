"""What `submit` refuses, with stand-ins for Slurm's commands on PATH."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from teams_hpc.cluster.inventory import (
    mount_of,
    parse_gpus,
    parse_minutes,
    read_partitions,
)
from teams_hpc.cluster.jobs import JobSpec, job_spec
from teams_hpc.cluster.preflight import slurm_faults
from teams_hpc.cluster.slurm import scheduler_settings
from teams_hpc.config import Config, load_config
from teams_hpc.pipeline.submit import submission_faults
from teams_hpc.storage.run_dir import RunDir

PARTITIONS = """\
PartitionName=short Default=YES GraceTime=0 MaxNodes=UNLIMITED MaxTime=01:00:00 State=UP \
PreemptMode=OFF
PartitionName=gpu Default=NO GraceTime=60 MaxNodes=2 MaxTime=2-00:00:00 State=UP \
PreemptMode=REQUEUE
"""
NODES = "short|4|16|64000|idle|(null)\ngpu|3|32|128000|mixed|gpu:a100:4(S:0-1)\n"
SETTINGS = """\
Configuration data as of 2026-11-23T20:00:00
ClusterName             = lab
MaxArraySize            = 1001
MaxJobCount             = 10000
AccountingStorageEnforce = associations,limits,qos
"""


class FakeSlurm:
    """Commands in a folder that print files, and keep how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.says("scontrol-config", SETTINGS)
        self.says("scontrol-partition", PARTITIONS)
        self.says("sinfo", NODES)
        self.says("hosts", "localhost\n")
        self.says("sacctmgr", "physics||normal,long|50\n")
        self.says("squeue", "")
        self.command("scontrol", 'for last; do :; done; cat "$here/scontrol-$last.txt"')
        self.command(
            "sinfo", 'case "$*" in *%n*) cat "$here/hosts.txt";; *) cat "$here/sinfo.txt";; esac'
        )
        self.command("sacctmgr", 'cat "$here/sacctmgr.txt"')
        self.command("squeue", 'cat "$here/squeue.txt"')
        self.command("sbatch", 'echo "$*" >> "$here/calls"')

    def says(self, name: str, text: str) -> None:
        (self.folder / f"{name}.txt").write_text(text)

    def command(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\nhere=$(dirname "$0")\n{body}\n')
        path.chmod(0o755)

    def refuses(self, words: str) -> None:
        self.command("sbatch", f'echo "$*" >> "$here/calls"; echo "{words}" >&2; exit 1')

    @property
    def dry_runs(self) -> list[str]:
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    scheduler_settings.cache_clear()
    yield fake
    scheduler_settings.cache_clear()


Make = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def config(*overrides: str, run_dir: str = "run") -> Config:
        path = tmp_path / "config.yaml"
        text = f"name: t\nrun_dir: {tmp_path / run_dir}\nsite:\n  executor: slurm\n"
        path.write_text(f"{text}  slurm: {{time_min: 60}}\n")
        return load_config(path, overrides)

    return config


def specs_of(config: Config, *stages: str) -> list[JobSpec]:
    return [job_spec(config, stage, (0,)) for stage in stages or ("dataset", "report")]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("UNLIMITED", None),
        ("infinite", None),
        ("90", 90),
        ("2:30", 2.5),
        ("01:00:00", 60),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("7-00:00:00", 10080),
    ],
)
def test_times_of_slurm(text: str, minutes: float | None) -> None:
    assert parse_minutes(text) == minutes


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", 0),
        ("gpu:4", 4),
        ("gpu:a100:4(S:0-1),nvme:1", 4),
        ("gpu:a100:2,gpu:v100:2", 4),
        ("gpu:tesla:no_consume:3", 3),
        ("shard:8,gpu:2(IDX:0-1)", 2),
    ],
)
def test_gpus_of_a_node(gres: str, gpus: int) -> None:
    assert parse_gpus(gres) == gpus


def test_the_deepest_and_latest_mount_holds_a_path(tmp_path: Path) -> None:
    table = tmp_path / "mounts"
    table.write_text(
        "/dev/a / ext4 rw 0 0\nserver:/x /big\\040data nfs4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n"
        "/dev/b /tmp xfs rw 0 0\n"
    )
    kinds = [getattr(mount_of(Path(path), table), "kind", "") for path in
             ("/home/x", "/big data/run", "/tmp/y")]  # fmt: skip
    assert kinds == ["ext4", "nfs4", "xfs"]


def test_partitions_are_read(slurm: FakeSlurm) -> None:
    gpu = read_partitions()["gpu"]
    assert (gpu.time_limit_min, gpu.node_limit, gpu.grace_s) == (2880, 2, 60)
    assert (gpu.count(gpus=4, cpus=32), gpu.count(gpus=5)) == (3, 0)


def test_nothing_is_wrong_and_equal_jobs_are_tested_once(slurm: FakeSlurm, make: Make) -> None:
    config = make("site.slurm.account=physics", "site.slurm.qos=long")
    assert slurm_faults(config, specs_of(config)) == []
    [call] = slurm.dry_runs
    assert "--test-only" in call
    assert "--account=physics" in call


@pytest.mark.parametrize(
    ("overrides", "stage", "key", "words"),
    [
        (["site.slurm.partition=nope"], "dataset", "site.slurm.partition", "gpu, short"),
        (["site.slurm.account=art"], "dataset", "site.slurm.account", "yours: physics"),
        (["site.slurm.qos=vip"], "dataset", "site.slurm.qos", "yours: long, normal"),
        (["site.slurm.time_min=61"], "dataset", "site.slurm.time_min", "allows 60"),
        (
            ["site.slurm.stages.dataset.time_min=99"],
            "dataset",
            "site.slurm.stages.dataset.time_min",
            "99 minutes",
        ),
        (["site.slurm.cpus_per_task=17"], "dataset", "site.slurm.cpus_per_task", "17 CPUs"),
        (["site.slurm.mem_gb=63"], "dataset", "site.slurm.mem_gb", "64512 MB"),
        (["site.gpus_per_node=1"], "evaluate", "site.gpus_per_node", "1 GPUs"),
        (
            ["site.slurm.partition=gpu", "site.gpus_per_node=4", "site.num_sft_ranks=12"],
            "sft",
            "site.num_sft_ranks",
            "3 nodes asked",
        ),
    ],
)
def test_what_is_beyond_the_cluster_is_refused_once(
    slurm: FakeSlurm, make: Make, overrides: list[str], stage: str, key: str, words: str
) -> None:
    slurm.refuses("allocation failure: no")
    config = make(*overrides)
    [fault] = slurm_faults(config, specs_of(config, stage))
    assert fault.startswith(f"{key}: ")
    assert words in fault
    assert slurm.dry_runs == []


def test_one_of_several_partitions_is_enough(slurm: FakeSlurm, make: Make) -> None:
    config = make("site.slurm.partition='short,gpu'", "site.slurm.time_min=600")
    assert slurm_faults(config, specs_of(config)) == []


def test_the_refusal_of_sbatch_has_its_words(slurm: FakeSlurm, make: Make) -> None:
    slurm.refuses("allocation failure: Invalid feature specification")
    config = make("site.slurm.options={constraint: x}")
    [fault] = slurm_faults(config, specs_of(config))
    assert "refuses: Invalid feature specification (jobs of dataset, report)" in fault
    assert "--constraint=x" in slurm.dry_runs[0]


def test_nodes_that_are_down_are_waited_for(slurm: FakeSlurm, make: Make) -> None:
    slurm.says("sinfo", "short|4|16|64000|drained*|(null)\n")
    slurm.refuses("allocation failure: Requested node configuration is not available")
    config = make()
    assert slurm_faults(config, specs_of(config)) == []


def test_more_jobs_than_the_association_may_have(slurm: FakeSlurm, make: Make) -> None:
    slurm.says("squeue", "7|RUNNING|None\n6|COMPLETED|None\n")
    config = make()
    spec = job_spec(config, "generate", tuple(range(50)))
    [fault] = slurm_faults(config, [spec])
    assert "50 jobs to submit, 1 in the queue, yours may be 50" in fault


def test_more_jobs_than_the_cluster_takes(slurm: FakeSlurm, make: Make) -> None:
    config = make()
    spec = job_spec(config, "generate", tuple(range(10_000)))
    [fault] = slurm_faults(config, [spec])
    assert "MaxJobCount" in fault


def test_without_accounting_names_are_left_to_slurm(slurm: FakeSlurm, make: Make) -> None:
    slurm.says("scontrol-config", "ClusterName = lab\nAccountingStorageEnforce = none\n")
    config = make("site.slurm.account=any", "site.slurm.qos=any")
    assert slurm_faults(config, specs_of(config)) == []


def test_without_slurm_there_is_one_fault(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    scheduler_settings.cache_clear()
    config = make()
    [fault] = slurm_faults(config, specs_of(config))
    assert fault.startswith("site.executor: is slurm, but no command scontrol")


def test_a_run_directory_that_nodes_cannot_see(
    slurm: FakeSlurm, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slurm.says("hosts", "node1\nnode2\n")
    config = make().model_copy(update={"run_dir": Path("/dev/shm/run")})
    [fault] = slurm_faults(config, specs_of(config))
    assert fault.startswith("run_dir: /dev/shm/run is on a file system of this machine alone")


def test_run_directories_slurm_or_pickle_cannot_have(slurm: FakeSlurm, make: Make) -> None:
    config = make(run_dir="100%done")
    config.resolved_run_dir.mkdir(mode=0o700)
    config.resolved_run_dir.chmod(0o770)
    percent, writable = slurm_faults(config, specs_of(config))
    assert "has a % in its path" in percent
    assert "others may write" in writable
    [backslash] = slurm_faults(make(run_dir="a\\b"), specs_of(config))
    assert "has a \\ in its path" in backslash


def test_a_container_that_is_not_there(slurm: FakeSlurm, make: Make) -> None:
    config = make("site.container={image: /nowhere/x.sif}")
    [fault] = slurm_faults(config, specs_of(config))
    assert fault.startswith("site.container.image: no file or folder /nowhere/x.sif")
    _, comma = slurm_faults(
        make("site.container={image: /nowhere/x.sif}", run_dir="a,b"), specs_of(config)
    )
    assert "a,b can't be bound" in comma


def test_a_model_that_is_not_there_is_refused_before_anything_is_submitted(make: Make) -> None:
    """Compute nodes have no way to the hub; in a container neither."""
    image = "site.container={image: /i.sif}"
    config = make(
        "expert.kind=transformers", "expert.model=/no/llama", "sft.model=meta/llama", image
    )
    faults = submission_faults(config, RunDir(config.resolved_run_dir))
    assert [fault.split(": ")[0] for fault in faults][:2] == ["expert.model", "sft.model"]
    assert faults[0].startswith("expert.model: no model folder /no/llama; download it there")
