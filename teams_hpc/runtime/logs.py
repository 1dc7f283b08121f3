"""Logging: readable lines on stderr, with the rank; INFO from rank 0, WARNING from every rank."""

import logging
import socket

from teams_hpc.runtime.ranks import Ranks


def setup_logging(ranks: Ranks, task: str) -> None:
    """Configure the root logger of a stage process; its stderr goes to `logs/<task>.log`."""
    where = f"{socket.gethostname()} {task}" + (
        f" rank {ranks.rank}/{ranks.world_size}" if ranks.world_size > 1 else ""
    )
    logging.basicConfig(
        level=logging.INFO if ranks.is_first else logging.WARNING,
        format=f"%(asctime)s %(levelname)s {where} %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # of the hub: a line a request
    logging.captureWarnings(True)
