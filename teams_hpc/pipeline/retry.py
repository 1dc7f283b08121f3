"""Beginning a retry of generation's failed rows."""

import logging

from teams_hpc.config import Config
from teams_hpc.pipeline.graph import find_stage, stage_graph
from teams_hpc.pipeline.inputs import is_done, set_aside_outdated
from teams_hpc.storage.journal import journal_paths
from teams_hpc.storage.retry_folder import had_retry, open_retry_folder
from teams_hpc.storage.run_dir import RunDir, read_manifest

_log = logging.getLogger(__name__)


def wants_retry(run_dir: RunDir, config: Config) -> bool:
    """Whether chains with failed rows are to be made again now.

    Once there was a retry, the next begins only after a whole run: what was stopped goes on first.
    """
    manifest = read_manifest(run_dir, "generate")
    if not config.generate.retry_failed or manifest is None or not manifest["counts"]["failed"]:
        return False
    is_whole = all(is_done(run_dir, config, stage) for stage in stage_graph(config))
    return is_whole or not had_retry(run_dir)


def begin_retry(run_dir: RunDir, config: Config) -> bool:
    """Make generation unfinished again, if that is wanted; a kill in between does no harm.

    Returns:
        Whether a retry has begun.
    """
    if not wants_retry(run_dir, config):
        return False
    for path in journal_paths(run_dir.journal):  # counted by the manifest, left by a kill
        path.unlink(missing_ok=True)
    set_aside_outdated(run_dir, config, find_stage(config, "generate"))
    open_retry_folder(run_dir)
    _log.info("generate: chains with failed rows are made again")
    return True
