"""Before a fine-tuning starts: does its checkpoint fit the processes that go on from it?"""

import logging
import signal
from pathlib import Path

from teams_hpc.pipeline.start import open_run
from teams_hpc.runtime.preemption import die_with_launcher
from teams_hpc.storage.atomic import read_json
from teams_hpc.storage.run_dir import RunDir


def needs_reshaping(run_dir: RunDir, num_ranks: int) -> bool:
    """Whether the newest checkpoint was written by another number of processes."""
    manifests = sorted(run_dir.checkpoints.glob("step-*/manifest.json"))
    return bool(manifests) and read_json(manifests[-1]).get("world_size") != num_ranks


def reshape_if_needed(root: Path, num_ranks: int | None) -> Path | None:
    """Reshape the newest checkpoint in this process, if that is needed.

    Returns:
        The folder that was made, if one was.

    Raises:
        TeamsError: See `sft.reshaping.reshape_checkpoint`.
    """
    run_dir, config = open_run(root)
    wanted = num_ranks or config.site.num_sft_ranks
    if not needs_reshaping(run_dir, wanted):
        return None
    die_with_launcher()
    # task.sh blocks them for stages, which stop at a safe point; this may be cut off at any.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    from teams_hpc.sft.reshaping import reshape_checkpoint

    return reshape_checkpoint(run_dir, config, wanted)
