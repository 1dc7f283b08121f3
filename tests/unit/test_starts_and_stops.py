"""Deadlines, restarts in vain, the marker, and claims of an earlier start of a job."""

import json
import time
from pathlib import Path

import pytest

from teams_hpc.config import Config
from teams_hpc.errors import RunInUseError, StopRequested, WorkError
from teams_hpc.pipeline.graph import find_stage
from teams_hpc.pipeline.starts import mark_stopped, record_start
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.runtime.ranks import read_ranks
from teams_hpc.storage.lease import Lease
from teams_hpc.storage.run_dir import RunDir

CONFIG = Config(name="a")


def test_a_time_limit_stops_like_a_signal() -> None:
    now = time.time()
    soon = {"TEAMS_HPC_DEADLINE": str(now + 50), "TEAMS_HPC_WARNING_S": "60"}
    stop = StopFlag.before_limit(soon)
    with pytest.raises(StopRequested, match="the time limit after 3 steps"):
        stop.raise_if_set("3 steps")
    later = {**soon, "TEAMS_HPC_DEADLINE": str(now + 90)}
    stop = StopFlag.before_limit(later)
    assert not stop.is_set
    stop.need_before_limit(70)
    stop.need_before_limit(5)
    assert not stop.is_set
    stop.need_before_limit(100)
    assert stop.is_set
    assert not StopFlag.before_limit({"TEAMS_HPC_DEADLINE": "", "TEAMS_HPC_WARNING_S": "9"}).is_set


def test_starts_in_vain_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run_dir, stage = RunDir(tmp_path), find_stage(CONFIG, "policy")
    for _ in range(3):  # the first start and two restarts
        record_start(run_dir, CONFIG, stage, 0)
    with pytest.raises(WorkError, match="job 7 was restarted 3 times without progress"):
        record_start(run_dir, CONFIG, stage, 0)
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # submitted anew by a person
    record_start(run_dir, CONFIG, stage, 0)


def test_progress_resets_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run_dir, stage = RunDir(tmp_path), find_stage(CONFIG, "policy")
    metrics = run_dir.member(0) / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    for number in range(8):
        metrics.write_text("x" * (number // 2), encoding="utf-8")
        record_start(run_dir, CONFIG, stage, 0)
    record_start(run_dir, CONFIG, stage, 0)  # the third with what is there now
    with pytest.raises(WorkError, match="restarted 3 times without progress"):
        record_start(run_dir, CONFIG, stage, 0)


def test_the_marker_names_job_and_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    mark_stopped(RunDir(tmp_path), "sft", "stopped on SIGUSR2")
    marker = tmp_path / "slurm" / "stopped" / "7-2"
    assert json.loads(marker.read_text(encoding="utf-8"))["task"] == "sft"


def test_a_later_start_of_a_job_takes_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    earlier = Lease(tmp_path / "claim")
    assert earlier.acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with Lease(tmp_path / "claim") as later:
        assert later.acquire()
        with pytest.raises(RunInUseError, match="the work was taken over"):
            earlier.refuse_if_lost("the work")
        monkeypatch.delenv("SLURM_RESTART_COUNT")
        assert not Lease(tmp_path / "claim").acquire()  # the earlier start doesn't take it back
    earlier.release()


def test_ranks_of_a_slurm_step() -> None:
    environment = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_NODES": "2",
    }
    ranks = read_ranks(environment)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (5, 8, 1, 4)


def test_successors_of_a_job_count_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, stage = RunDir(tmp_path), find_stage(CONFIG, "policy")
    monkeypatch.setenv("SLURM_JOB_ID", "9")  # the last task of an array
    monkeypatch.setenv("TEAMS_HPC_JOB", "7_2")
    record_start(run_dir, CONFIG, stage, 0)
    monkeypatch.setenv("TEAMS_HPC_FIRST_JOB", "7_2")
    for job in ("10", "11"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("TEAMS_HPC_JOB", job)
        record_start(run_dir, CONFIG, stage, 0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(WorkError, match="restarted 3 times without progress"):
        record_start(run_dir, CONFIG, stage, 0)


def test_all_processes_of_a_step_end_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, stage = RunDir(tmp_path), find_stage(CONFIG, "generate")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for restart in range(3):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        for is_first in (False, True, False):  # in whatever order they come
            record_start(run_dir, CONFIG, stage, 4, is_first=is_first)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    for is_first in (False, True, False):
        with pytest.raises(WorkError, match="restarted 3 times"):
            record_start(run_dir, CONFIG, stage, 4, is_first=is_first)
