"""Running the stages on this machine, each in processes of its own."""

import logging
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from teams_hpc.config import Config, dump_yaml, load_resolved
from teams_hpc.config.check import check_inputs
from teams_hpc.errors import RunInUseError, StopRequested, TeamsError, UsageError, WorkError
from teams_hpc.pipeline.graph import Stage, find_stage, stage_graph, task_name
from teams_hpc.pipeline.inputs import check_unchanged, is_done, prepare_stage, set_aside
from teams_hpc.pipeline.provenance import record_provenance
from teams_hpc.rewriting.seeds import read_seeds
from teams_hpc.runtime.metrics import append_metrics
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.runtime.processes import Task, TaskGroup
from teams_hpc.storage.atomic import naming_disk_faults, read_json, write_text
from teams_hpc.storage.lease import Lease, read_holder
from teams_hpc.storage.run_dir import RunDir, read_manifest

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Who is told how a run goes: a terminal, or nobody."""

    def stage_skipped(self, stage: Stage) -> None: ...

    def stage_started(self, stage: Stage) -> None: ...

    def tick(self) -> None: ...

    def stage_finished(self, stage: Stage, seconds: float, num_restarts: int) -> None: ...


def open_run(root: Path) -> tuple[RunDir, Config]:
    """A run directory that exists, with the configuration it keeps.

    Raises:
        UsageError: There is no run.
    """
    run_dir = RunDir(root.absolute())
    if not run_dir.config.is_file():
        raise UsageError(f"{root} is not a run directory (it has no config.yaml)")
    return run_dir, load_resolved(run_dir.config)


def run_pipeline(
    config: Config, *, observer: Observer, stop: StopFlag, rerun_from: str | None = None
) -> RunDir:
    """Run every stage that is not done, here and now; calling it again resumes.

    Raises:
        UsageError: Refused before anything was written.
        WorkError: A stage failed.
        StopRequested: Asked to stop; every process has reached a safe point.
    """
    check_inputs(config)
    read_seeds(config.seeds.path, config.seeds.limit)
    run_dir = RunDir(config.resolved_run_dir)
    if rerun_from is not None:
        find_stage(config, rerun_from)
    try:
        run_dir.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise UsageError(
            f"run_dir: can't make {run_dir.root} ({error.strerror}); set run_dir=PATH to a folder "
            "of yours"
        ) from None
    lease = Lease(run_dir.leases / "run", config.site.lease_s)
    with lease:
        if not (lease.acquire() or _outlast_holder(lease, stop)):
            found = read_holder(lease.path)
            who = f"process {found[0].pid} on {found[0].host}" if found else "another process"
            raise RunInUseError(
                f"{run_dir.root} is in use by {who}; wait for it, stop it, or choose another name"
            )
        check_unchanged(run_dir, config, before=rerun_from)
        if rerun_from is not None:
            set_aside(run_dir, config, rerun_from)
        write_text(run_dir.config, dump_yaml(config))
        record_provenance(run_dir)
        for stage in stage_graph(config):
            _run_stage(run_dir, config, stage, observer, stop)
    return run_dir


def _outlast_holder(lease: Lease, stop: StopFlag) -> bool:
    """Take the claim of a holder on another machine, or on this one before it was started anew.

    Whether that process lives shows only in its heartbeat, so this waits up to `lease_s` for one.
    """
    found = read_holder(lease.path)
    if found is not None and not found[0].is_on_this_host():
        _log.warning(
            "the run was last held on %s; waiting up to %g s for a sign of life from there",
            found[0].host,
            lease.lease_s,
        )
        while not lease.acquire():
            stop.raise_if_set("nothing")
            if read_holder(lease.path) not in (found, None):
                return False
            time.sleep(0.1)
        return True
    return False


def _run_stage(
    run_dir: RunDir, config: Config, stage: Stage, observer: Observer, stop: StopFlag
) -> None:
    prepare_stage(run_dir, config, stage)
    if is_done(run_dir, config, stage):
        observer.stage_skipped(stage)
        return
    if read_manifest(run_dir, stage.name) is not None:  # done before, and now to go further
        later = stage_graph(config)
        set_aside(run_dir, config, later[later.index(stage) + 1].name)
    observer.stage_started(stage)
    start = time.monotonic()
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


def error_path(run_dir: RunDir, task: str) -> Path:
    """Where a task's process leaves its error for the process that started it."""
    return run_dir.metrics / f"{task}.error.txt"


def _last_words(run_dir: RunDir, task: str) -> str:
    path = error_path(run_dir, task)
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def _done(run_dir: RunDir, task: str) -> object:
    path = run_dir.progress(task)
    return read_json(path)["done"] if path.exists() else None


def stage_tasks(run_dir: RunDir, config: Config, stage: Stage) -> list[Task]:
    """The processes of one stage on this machine."""
    counts = {
        "members": config.policy.num_members,
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
        elif config.site.gpus_per_node:
            environment["CUDA_VISIBLE_DEVICES"] = _visible_device(index, config.site.gpus_per_node)
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


def _visible_device(index: int, num_gpus: int) -> str:
    """The GPU of worker `index`, out of those this process may see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(num_gpus)]
    return devices[index % min(num_gpus, len(devices))]


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


def run_stage_here(run_dir: RunDir, config: Config, name: str, index: int, stop: StopFlag) -> None:
    """Run one task of one stage in this process; what `teams-hpc stage` does.

    Raises:
        TeamsError: As the stage raised it; the text of a failure is also left at `error_path`.
    """
    stage = find_stage(config, name)
    prepare_stage(run_dir, config, stage)
    try:
        with naming_disk_faults(run_dir.root):
            stage.load()(run_dir, config, index, stop)
    except StopRequested:
        raise
    except (TeamsError, OSError) as error:
        with suppress(OSError):  # a full disk takes no last words
            path = error_path(run_dir, task_name(stage, index))
            path.write_text(f"{error}\n", encoding="utf-8")
        raise
