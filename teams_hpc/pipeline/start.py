"""Opening a run directory, and making one ready for stages to work in."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from teams_hpc.config import Config, dump_yaml, load_resolved
from teams_hpc.errors import RunInUseError, UsageError
from teams_hpc.pipeline.graph import find_stage
from teams_hpc.pipeline.inputs import check_unchanged, set_aside
from teams_hpc.pipeline.provenance import record_provenance
from teams_hpc.rewriting.seeds import read_seeds
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import write_text
from teams_hpc.storage.lease import Lease, read_holder
from teams_hpc.storage.run_dir import RunDir

_log = logging.getLogger(__name__)


def open_run(root: Path) -> tuple[RunDir, Config]:
    """A run directory that exists, with the configuration it keeps.

    Raises:
        UsageError: There is no run.
    """
    run_dir = RunDir(root.absolute())
    if not run_dir.config.is_file():
        raise UsageError(f"{root} is not a run directory (it has no config.yaml)")
    return run_dir, load_resolved(run_dir.config)


@contextmanager
def prepared_run(
    config: Config, *, stop: StopFlag, rerun_from: str | None = None
) -> Iterator[RunDir]:
    """The run directory of `config`, made or checked, and ours alone inside the `with`.

    Raises:
        UsageError: The seeds, the folder or the configuration can't be used; nothing was changed.
        RunInUseError: Another process works on it.
    """
    read_seeds(config.seeds.path, config.seeds.limit)
    run_dir = RunDir(config.resolved_run_dir)
    if rerun_from is not None:
        find_stage(config, rerun_from)
    lease = Lease(run_dir.leases / "run", config.site.lease_s)
    with lease:
        with _refusing_what_cannot_be_written(run_dir):
            run_dir.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            is_ours = lease.acquire() or _outlast_holder(lease, stop)
        if not is_ours:
            found = read_holder(lease.path)
            who = f"process {found[0].pid} on {found[0].host}" if found else "another process"
            raise RunInUseError(
                f"{run_dir.root} is in use by {who}; wait for it, stop it, or choose another name"
            )
        check_unchanged(run_dir, config, before=rerun_from)
        with _refusing_what_cannot_be_written(run_dir):
            if rerun_from is not None:
                set_aside(run_dir, config, rerun_from)
            write_text(run_dir.config, dump_yaml(config))
            record_provenance(run_dir)
        yield run_dir


@contextmanager
def _refusing_what_cannot_be_written(run_dir: RunDir) -> Iterator[None]:
    """No work has begun yet, so a full disk or a missing right is a reason not to begin."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"run_dir: can't write {error.filename or run_dir.root} ({error.strerror}); make room, "
            "or set run_dir=PATH to a folder of yours"
        ) from None


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
