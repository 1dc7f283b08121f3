"""Running the stages on this machine, each in processes of its own."""

import socket
import sys
import time
from typing import Protocol

from teams_hpc.cluster.records import active_jobs, read_records
from teams_hpc.config import Config
from teams_hpc.config.check import input_faults, refuse_faults
from teams_hpc.errors import ClusterError, RunInUseError, WorkError
from teams_hpc.pipeline.graph import Stage, stage_graph, task_name
from teams_hpc.pipeline.inputs import is_done, prepare_stage, set_aside_outdated
from teams_hpc.pipeline.reshape import needs_reshaping
from teams_hpc.pipeline.retry import begin_retry
from teams_hpc.pipeline.room import room_faults
from teams_hpc.pipeline.start import prepared_run
from teams_hpc.pipeline.task import error_path
from teams_hpc.runtime.gpus import GPUS_VARIABLE, own_gpus
from teams_hpc.runtime.metrics import append_metrics
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.runtime.processes import Task, TaskGroup
from teams_hpc.storage.atomic import read_json
from teams_hpc.storage.run_dir import RunDir


class Observer(Protocol):
    """Who is told how a run goes: a terminal, or nobody."""

    def stage_skipped(self, stage: Stage) -> None: ...

    def stage_started(self, stage: Stage) -> None: ...

    def tick(self) -> None: ...

    def stage_finished(self, stage: Stage, seconds: float, num_restarts: int) -> None: ...


def run_pipeline(
    config: Config, *, observer: Observer, stop: StopFlag, rerun_from: str | None = None
) -> RunDir:
    """Run every stage that is not done, here and now; calling it again resumes.

    Raises:
        UsageError: Refused before anything was written.
        WorkError: A stage failed.
        StopRequested: Asked to stop; every process has reached a safe point.
    """
    refuse_faults([*input_faults(config), *room_faults(config)])
    _refuse_beside_jobs(RunDir(config.resolved_run_dir))
    with prepared_run(config, stop=stop, rerun_from=rerun_from) as run_dir:
        begin_retry(run_dir, config)
        for stage in stage_graph(config):
            run_stage(run_dir, config, stage, observer, stop)
    return run_dir


def _refuse_beside_jobs(run_dir: RunDir) -> None:
    """Jobs of `submit` hold no claim on the whole run, and would be in each other's way with us."""
    try:
        active = active_jobs(read_records(run_dir))
    except ClusterError:  # the run was brought to where there is no Slurm
        return
    if active:
        raise RunInUseError(
            f"{run_dir.root} is in use by Slurm jobs ({', '.join(active[:5])}); wait for them, or "
            f"first: teams-hpc cancel {run_dir.root}"
        )


def run_stage(
    run_dir: RunDir, config: Config, stage: Stage, observer: Observer, stop: StopFlag
) -> None:
    """One stage of a run that is ready for it, unless it is done.

    Raises:
        WorkError: It failed.
        StopRequested: Asked to stop; every process has reached a safe point.
    """
    prepare_stage(run_dir, config, stage)
    if is_done(run_dir, config, stage):
        observer.stage_skipped(stage)
        return
    set_aside_outdated(run_dir, config, stage)
    observer.stage_started(stage)
    start = time.monotonic()
    if stage.form == "ranks" and needs_reshaping(run_dir, config.site.num_sft_ranks):
        _reshape(run_dir, observer, stop)
    tasks = stage_tasks(run_dir, config, stage)
    for task in tasks:
        error_path(run_dir, task.name).unlink(missing_ok=True)
    group = TaskGroup(
        tasks=tasks,
        num_parallel=len(tasks) if stage.form == "ranks" else config.site.num_workers,
        together=stage.form == "ranks",
        max_restarts=config.site.max_restarts_without_progress,
        # The workers of a stage may share one progress file, which has the stage's name.
        progress=lambda: [_done(run_dir, name) for name in (stage.name, *(t.name for t in tasks))],
        explain=lambda task: _last_words(run_dir, task.name),
        on_tick=observer.tick,
    )
    group.run(stop)
    if group.num_restarts:
        append_metrics(
            run_dir.metrics / "restarts.jsonl",
            {"stage": stage.name, "restarts": group.num_restarts},
        )
    if not is_done(run_dir, config, stage):
        raise WorkError(f"{stage.name} ended without its manifest; see {run_dir.logs}")
    observer.stage_finished(stage, time.monotonic() - start, group.num_restarts)


def _reshape(run_dir: RunDir, observer: Observer, stop: StopFlag) -> None:
    log = run_dir.log("sft-reshape")
    argv = (sys.executable, "-m", "teams_hpc", "reshape", str(run_dir.root))
    TaskGroup(
        tasks=[Task(name="sft-reshape", argv=argv, log=log, environment={})],
        num_parallel=1,
        together=False,
        max_restarts=0,
        progress=lambda: [],
        explain=lambda _: log.read_text(encoding="utf-8", errors="replace").strip()[-2000:],
        on_tick=observer.tick,
    ).run(stop)


def _last_words(run_dir: RunDir, task: str) -> str:
    path = error_path(run_dir, task)
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _done(run_dir: RunDir, task: str) -> object:
    path = run_dir.progress(task)
    return read_json(path)["done"] if path.exists() else None


def stage_tasks(run_dir: RunDir, config: Config, stage: Stage) -> list[Task]:
    """The processes of one stage on this machine."""
    counts = {
        "members": config.policy.num_tasks,
        "workers": config.site.num_workers,
        "ranks": config.site.num_sft_ranks,
        "one": 1,
    }
    world_size = counts[stage.form]
    rendezvous = _rendezvous(world_size) if stage.form == "ranks" else {}
    tasks = []
    for index in range(world_size):
        environment = dict(rendezvous)
        name = task_name(stage, index)
        if stage.form == "ranks":
            environment |= {"RANK": str(index), "LOCAL_RANK": str(index)}
        else:
            count, num_gpus = config.gpus_of_process(stage.name), config.site.gpus_per_node
            gpus = own_gpus(index, count, num_gpus)
            environment |= {} if gpus is None else {GPUS_VARIABLE: gpus}
        argv = (sys.executable, "-m", "teams_hpc", "stage", stage.name, str(run_dir.root))
        tasks.append(
            Task(
                name=name,
                argv=(*argv, "--index", str(index)),
                log=run_dir.log(name),
                environment=environment,
            )
        )
    return tasks


def _rendezvous(world_size: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
