"""Starts and stops of a task inside Slurm: how often in vain, and the epilogue's marker."""

import json
import os
import time

from teams_hpc.config import Config
from teams_hpc.errors import WorkError
from teams_hpc.pipeline.graph import Stage, task_name
from teams_hpc.runtime.metrics import append_metrics, read_metrics
from teams_hpc.storage.atomic import write_text
from teams_hpc.storage.run_dir import RunDir


def durable_progress(run_dir: RunDir, stage: Stage, index: int) -> object:
    """Something that changes whenever the task's work has lastingly advanced, and only then."""
    if stage.name == "policy":
        path = run_dir.member(index) / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0
    if stage.name == "generate":
        folders = (run_dir.shards, run_dir.retry, run_dir.journal)
        return sum(path.stat().st_size for folder in folders for path in folder.glob("*"))
    if stage.name == "sft":
        return max((path.name for path in run_dir.checkpoints.glob("step-*")), default="")
    return None


def record_start(
    run_dir: RunDir, config: Config, stage: Stage, index: int, *, is_first: bool = True
) -> None:
    """Note that the task was started by this job; refuse when that has led nowhere too often.

    Args:
        index: The task of the step's first process.
        is_first: This is that process; the others only count, so that none works on without it.

    Raises:
        WorkError: This job, or those that took over its work one after the other, were started
            again more than `site.max_restarts_without_progress` times without progress, whatever
            ended it.
    """
    run_dir.metrics.mkdir(parents=True, exist_ok=True)
    path = run_dir.metrics / f"{task_name(stage, index)}.starts.jsonl"
    job = os.environ["SLURM_JOB_ID"]
    own_name = os.environ.get("TEAMS_HPC_JOB", job)
    start = {
        "job": job,
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        "first_job": os.environ.get("TEAMS_HPC_FIRST_JOB", own_name),
        "progress": durable_progress(run_dir, stage, index),
        "time": time.time(),
    }
    earlier = [line for line in read_metrics(path) if line["first_job"] == start["first_job"]]
    if is_first:
        append_metrics(path, start)
    else:
        own = (start["job"], start["restart"])
        earlier = [line for line in earlier if (line["job"], line["restart"]) != own]
    in_vain = 0
    for line in reversed(earlier):
        if line["progress"] != start["progress"]:
            break
        in_vain += 1
    if in_vain > config.site.max_restarts_without_progress:
        raise WorkError(
            f"job {start['job']} was restarted {in_vain} times without progress; see what its log "
            "says, give it more time (site.slurm.time_min, site.slurm.warning_s) or allow more "
            "(site.max_restarts_without_progress), and submit again"
        )


def mark_stopped(run_dir: RunDir, task: str, words: str) -> None:
    """Tell the epilogue that this start of this job stopped on request, at a safe point."""
    run_dir.stop_markers.mkdir(parents=True, exist_ok=True, mode=0o700)
    job, restart = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
    value = {"task": task, "words": words, "time": time.time()}
    write_text(run_dir.stop_markers / f"{job}-{restart}", json.dumps(value) + "\n")
