"""The folder `generate/retry/`: of a finished generation, only chains with failed rows once more.

What was made before stays in its place until everything in here is made:

    previous.json      the manifest from before, moved here: the stage is not done any more
    plan.json          which units have failed rows, written by the first worker that comes
    unit-00003.h5      a whole unit once more, rows of its other chains as they were

Then each new unit takes the place of the old one by rename, the new manifest is written and the
folder goes. A kill in between leaves the folder, and with it the same work to do.
"""

import shutil
from pathlib import Path
from typing import Any

from teams_hpc.storage.atomic import fsync_folder, read_json
from teams_hpc.storage.run_dir import RunDir


def _kept(run_dir: RunDir) -> Path:
    """The manifest from before the last retry that was finished."""
    return run_dir.generate / "before_retry.json"


def had_retry(run_dir: RunDir) -> bool:
    """Whether failed rows of this generation were made again before."""
    return _kept(run_dir).exists() or previous_path(run_dir).exists()


def previous_path(run_dir: RunDir) -> Path:
    return run_dir.retry / "previous.json"


def open_retry_folder(run_dir: RunDir) -> None:
    """Begin a retry: from here on the stage is not done. Its manifest must be there."""
    close_retry_folder(run_dir)  # one that was finished and killed before it was cleared away
    run_dir.retry.mkdir()
    run_dir.manifest("generate").rename(previous_path(run_dir))
    fsync_folder(run_dir.retry)
    fsync_folder(run_dir.generate)


def close_retry_folder(run_dir: RunDir) -> None:
    """Clear a finished retry away; of the manifest from before, the newest is kept."""
    run_dir.retry_plan.unlink(missing_ok=True)  # first: from now on the units are the old ones
    if previous_path(run_dir).exists():
        previous_path(run_dir).replace(_kept(run_dir))
    shutil.rmtree(run_dir.retry, ignore_errors=True)


def read_retry_plan(run_dir: RunDir) -> dict[str, Any] | None:
    """What is to be made again, or None if there is no retry, or none has planned it yet."""
    try:
        plan: dict[str, Any] = read_json(run_dir.retry_plan)
    except FileNotFoundError:
        return None
    return plan


def retried_units(run_dir: RunDir) -> set[int]:
    """The units with failed rows that a retry makes again; empty if there is none."""
    plan = read_retry_plan(run_dir)
    return set() if plan is None else {int(unit) for unit in plan["failed_chains"]}


def newest_shard(run_dir: RunDir, unit: int) -> Path:
    """The file of a unit: the one that a retry has made, if it has, else the one from before."""
    retried = run_dir.retried_shard(unit)
    is_newer = retried.exists() and run_dir.retry_plan.exists()  # else a late one: it's all done
    return retried if is_newer else run_dir.shard(unit)
