"""Successors of jobs that may not be requeued, and submitting again; Slurm is a double."""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from teams_hpc.cli import run_stage_job
from teams_hpc.cluster.records import (
    JobRecord,
    active_jobs,
    first_of_chain,
    read_records,
    write_record,
)
from teams_hpc.cluster.slurm import scheduler_settings
from teams_hpc.config import Config, dump_yaml
from teams_hpc.errors import RunInUseError, UsageError
from teams_hpc.pipeline.graph import Stage
from teams_hpc.pipeline.local import run_pipeline
from teams_hpc.pipeline.submit import prepare_job, resubmit_job, submit_pipeline
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.run_dir import RunDir

FAKES = {
    # a job is a file with its state; sbatch takes its time, as on a busy cluster
    "sbatch": (
        'case "$1" in --test-only) exit 0;; esac; sleep 0.2\n'
        'while ! mkdir "$here/lock" 2>/dev/null; do sleep 0.01; done\n'
        'job=$(cat "$here/next"); echo $((job + 1)) > "$here/next"; rmdir "$here/lock"\n'
        'echo PENDING > "$here/jobs/$job"; cp "$1" "$here/script-$job"\n'
        '[ ! -e "$here/cancel" ] || touch "$(dirname "$1")/cancelled"\n'
        'echo "Submitted batch job $job"'
    ),
    "squeue": 'cd "$here/jobs"; for job in *; do echo "$job|$(cat "$job")|None"; done',
    "scontrol": 'echo "$@" >> "$here/scontrol.calls"; echo "MaxArraySize = $(cat "$here/most")"',
    "scancel": 'echo "$@" >> "$here/scancel.calls"',
}


class FakeSlurm:
    """Commands on PATH, and the jobs they know."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "jobs").mkdir(parents=True)
        (folder / "next").write_text("100")
        (folder / "most").write_text("1001")
        for name, body in FAKES.items():
            path = folder / name
            path.write_text(f'#!/bin/sh\nhere="{folder}"\n{body}\n')
            path.chmod(0o700)

    def has(self, **states: str) -> None:
        """States of jobs, by `j<id>`."""
        for name, state in states.items():
            (self.folder / "jobs" / name[1:]).write_text(state)

    def calls(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def waits_for(self, job: str) -> set[str]:
        """What a job was last told to wait for."""
        start = f"update JobId={job} Dependency=afterok:"
        said = [line for line in self.calls("scontrol") if line.startswith(start)]
        return set(said[-1].removeprefix(start).split(":"))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    scheduler_settings.cache_clear()
    yield FakeSlurm(tmp_path / "bin")
    scheduler_settings.cache_clear()


@pytest.fixture
def run_dir(tmp_path: Path, slurm: FakeSlurm) -> RunDir:
    """A run whose array 7 trains three members, with the selection waiting for it."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.slurm.mkdir(parents=True)
    values = {"name": "r", "run_dir": run_dir.root, "policy": {"num_members": 3}}
    run_dir.config.write_text(dump_yaml(Config.model_validate(values)))
    record(run_dir, "7", "policy", 3)
    record(run_dir, "8", "select", 1)
    slurm.has(j7_0="RUNNING", j7_1="RUNNING", j7_2="RUNNING", j8="PENDING")
    return run_dir


class Nobody:
    """Who is told how a run goes, and doesn't care."""

    def stage_skipped(self, stage: Stage) -> None: ...

    def stage_started(self, stage: Stage) -> None: ...

    def tick(self) -> None: ...

    def stage_finished(self, stage: Stage, seconds: float, num_restarts: int) -> None: ...


def record(run_dir: RunDir, job_id: str, stage: str, count: int) -> None:
    write_record(
        run_dir,
        JobRecord(
            job_id=job_id,
            stage=stage,
            indices=tuple(range(count)),
            is_array=count > 1,
            submitted=time.time(),
        ),
    )


def replace(root: Path, job: str) -> str:
    return resubmit_job(root, job, run_stage_job)


def test_dependents_wait_for_the_successor_and_the_rest(slurm: FakeSlurm, run_dir: RunDir) -> None:
    said = replace(run_dir.root, "7_1")
    assert said == "job 100 goes on with the work of 7_1 (policy); waiting for it now: 8"
    assert slurm.waits_for("8") == {"7_0", "7_2", "100"}
    slurm.has(j100="RUNNING")  # and 7_1 hasn't quite ended
    replace(run_dir.root, "100")
    assert slurm.waits_for("8") == {"7_0", "7_2", "101"}
    assert first_of_chain(read_records(run_dir), "101") == "7_1"
    assert "export TEAMS_HPC_FIRST_JOB=7_1\n" in (slurm.folder / "script-101").read_text()


def test_a_whole_array_is_replaced_at_once(slurm: FakeSlurm, run_dir: RunDir) -> None:
    """As at a time limit: dependents must wait for all successors, and for no one who ends."""
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        list(pool.map(replace, [run_dir.root] * 3, ("7_0", "7_1", "7_2")))
    assert slurm.waits_for("8") == {"100", "101", "102"}


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", None])
def test_only_a_running_job_has_a_successor(
    slurm: FakeSlurm, run_dir: RunDir, state: str | None
) -> None:
    """Requeueing fails also because a job was cancelled a moment ago, or is back in the queue."""
    (slurm.folder / "jobs" / "7_1").unlink()
    if state:
        slurm.has(j7_1=state)
    with pytest.raises(UsageError, match="no successor"):
        replace(run_dir.root, "7_1")
    assert len(read_records(run_dir)) == 2


def test_a_cancelled_run_gets_no_successors(slurm: FakeSlurm, run_dir: RunDir) -> None:
    (slurm.folder / "cancel").touch()  # somebody types `cancel` while sbatch is at work
    with pytest.raises(UsageError, match="was cancelled"):
        replace(run_dir.root, "7_1")
    assert slurm.calls("scancel") == ["100"]
    with pytest.raises(UsageError, match="no successor"):
        replace(run_dir.root, "7_2")
    assert len(read_records(run_dir)) == 3


def config_of(run_dir: RunDir, num_members: int) -> Config:
    values = {
        "name": "r",
        "run_dir": run_dir.root,
        "policy": {"num_members": num_members},
        "site": {"executor": "slurm", "slurm": {"max_parallel_tasks": 7}},
    }
    return Config.model_validate(values)


def submitted(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, num_members: int = 3, **words: str
) -> list[str]:
    monkeypatch.setattr("teams_hpc.pipeline.submit.slurm_faults", lambda *_: [])
    run_dir.root.chmod(0o700)
    return submit_pipeline(config_of(run_dir, num_members), run_stage_job, **words)


def test_results_without_a_manifest_get_one(
    slurm: FakeSlurm, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last member was killed between its result and the stage's manifest."""
    for index in range(3):
        run_dir.member(index).mkdir(parents=True)
        (run_dir.member(index) / "result.json").write_text("{}")
    assert submitted(run_dir, monkeypatch)[0] == "policy    adopted 3 tasks"
    slurm.has(j7_0="COMPLETED", j7_1="COMPLETED", j7_2="FAILED")
    assert submitted(run_dir, monkeypatch)[0].startswith("policy    submitted 1 tasks as job")


def test_a_long_array_is_cut_to_what_the_cluster_takes(
    slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three arrays that go over all members, share the throttle, and are all waited for."""
    (slurm.folder / "most").write_text("3")
    fresh = RunDir(tmp_path / "fresh")
    fresh.root.mkdir()
    said = submitted(fresh, monkeypatch, num_members=8)
    assert said[0] == "policy    submitted 8 tasks as job 100, 101, 102"
    policy = [found for found in read_records(fresh) if found.stage == "policy"]
    assert [found.indices for found in policy] == [(0, 1, 2), (3, 4, 5), (6, 7)]
    scripts = [(slurm.folder / f"script-{job}").read_text() for job in range(100, 104)]
    arrays = [line for text in scripts for line in text.splitlines() if "--array" in line]
    assert arrays == [f"#SBATCH --array=0-{last}%2" for last in (2, 2, 1)]
    assert "#SBATCH --dependency=afterok:100:101:102\n" in scripts[3]
    by_hand = config_of(RunDir(tmp_path / "by-hand"), num_members=4)
    with pytest.raises(UsageError, match=r"4 tasks are more .* one array .MaxArraySize 3"):
        list(prepare_job(by_hand, "policy"))
    assert not (tmp_path / "by-hand").exists()


def test_run_leaves_a_run_to_its_jobs(slurm: FakeSlurm, run_dir: RunDir) -> None:
    before = run_dir.config.read_text()
    config = Config.model_validate({"name": "other", "run_dir": run_dir.root})
    with pytest.raises(RunInUseError, match=r"by Slurm jobs \(7_0, 7_1, 7_2, 8\)"):
        run_pipeline(config, observer=Nobody(), stop=StopFlag())
    assert run_dir.config.read_text() == before
    slurm.has(j7_0="FAILED", j7_1="COMPLETED", j7_2="CANCELLED", j8="CANCELLED")
    assert active_jobs(read_records(run_dir)) == []


def test_what_jobs_work_on_is_not_set_aside(
    slurm: FakeSlurm, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir.policy.mkdir()
    with pytest.raises(UsageError, match=r"set aside, but jobs .* \(7_0, 7_1, 7_2, 8\)"):
        submitted(run_dir, monkeypatch, rerun_from="policy")
    assert run_dir.policy.exists()
    slurm.has(j7_0="FAILED", j7_1="FAILED", j7_2="FAILED", j8="CANCELLED")
    submitted(run_dir, monkeypatch, rerun_from="policy")
    assert not run_dir.policy.exists()
    assert len(json.loads((run_dir.job_records / "100.json").read_text())["indices"]) == 3
