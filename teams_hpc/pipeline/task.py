"""One task of one stage, in this process: what `run` starts, and every process of a Slurm job."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from teams_hpc.config import Config
from teams_hpc.errors import StopRequested, TeamsError
from teams_hpc.pipeline.graph import Stage, find_stage, task_name
from teams_hpc.pipeline.inputs import prepare_stage
from teams_hpc.pipeline.staging import staged
from teams_hpc.pipeline.start import open_run
from teams_hpc.pipeline.starts import mark_stopped, record_start
from teams_hpc.runtime.gpus import GPUS_VARIABLE, own_gpus
from teams_hpc.runtime.logs import setup_logging
from teams_hpc.runtime.preemption import (
    PARENT_VARIABLE,
    StopFlag,
    die_with_launcher,
    die_with_parent,
)
from teams_hpc.runtime.ranks import Ranks, read_ranks
from teams_hpc.runtime.step import abort_step, is_launched_by_mpi
from teams_hpc.storage.atomic import naming_disk_faults
from teams_hpc.storage.run_dir import RunDir

_log = logging.getLogger(__name__)


def error_path(run_dir: RunDir, task: str) -> Path:
    """Where a task's process leaves its error for `run` and `status`."""
    return run_dir.metrics / f"{task}.error.txt"


def run_task(name: str, root: Path, index: int) -> None:
    """Do one task of the stage `name`.

    Inside a Slurm step this is one of its processes: output goes to the task's log, a stop leaves
    a marker for the epilogue, and starts without progress are counted.

    Args:
        name: The stage.
        root: The run directory.
        index: Which policy member, or which worker; processes of one worker's step count on.

    Raises:
        TeamsError: As the stage raised it; the text of a failure is also left at `error_path`.
    """
    stop = StopFlag.before_limit()
    stop.install()
    die_with_parent()
    if is_launched_by_mpi() and "SLURM_STEP_ID" not in os.environ:
        die_with_launcher()
    ranks = read_ranks()  # before anything is touched: this process may be the wrong one
    run_dir, config = open_run(root)
    stage = find_stage(config, name)
    index = _own_index(stage, index, ranks)
    task = task_name(stage, index)
    if stage.form == "workers":
        _take_own_gpus(config, stage, ranks)
    in_slurm = "SLURM_STEP_ID" in os.environ and PARENT_VARIABLE not in os.environ
    if in_slurm:
        _write_to_log(run_dir, task)
    setup_logging(ranks, task)
    try:
        with naming_disk_faults(run_dir.root):
            if in_slurm:
                first = index - ranks.rank if stage.form in ("workers", "ranks") else index
                record_start(run_dir, config, stage, first, is_first=ranks.is_first)
            prepare_stage(run_dir, config, stage)
            error_path(run_dir, task).unlink(missing_ok=True)
            here = staged(config, stage.name) if in_slurm else config
            stage.load()(run_dir, here, index, stop)
    except StopRequested as request:
        if in_slurm:
            mark_stopped(run_dir, task, str(request))
        raise
    except (TeamsError, OSError) as error:
        with suppress(OSError):  # a full disk takes no last words
            error_path(run_dir, task).write_text(f"{error}\n", encoding="utf-8")
        _log.error("%s", error)
        abort_step(getattr(error, "exit_code", 1))
        raise
    except Exception:
        _log.exception("an unexpected error")
        abort_step(1)
        raise


def _own_index(stage: Stage, index: int, ranks: Ranks) -> int:
    if stage.form == "workers":
        return index * ranks.world_size + ranks.rank
    return ranks.rank if stage.form == "ranks" else index


def _take_own_gpus(config: Config, stage: Stage, ranks: Ranks) -> None:
    """Share a node's GPUs with those that a launcher started here too; `run` has done so itself."""
    if ranks.local_world_size == 1:
        return
    count = config.gpus_of_process(stage.name)
    gpus = own_gpus(ranks.local_rank, count, config.site.gpus_per_node)
    if gpus is not None:
        os.environ[GPUS_VARIABLE] = gpus


def _write_to_log(run_dir: RunDir, task: str) -> None:
    """Send what this process prints to its log, as `run` does with the processes it starts."""
    run_dir.logs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with run_dir.log(task).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
