"""Who may work on the fine-tuning of a run: one world of processes, or one that reshapes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from teams_hpc.config import Config
from teams_hpc.errors import RunInUseError
from teams_hpc.runtime.ranks import Ranks
from teams_hpc.storage.lease import Lease
from teams_hpc.storage.run_dir import RunDir


@contextmanager
def claimed(run_dir: RunDir, config: Config, ranks: Ranks) -> Iterator[Lease]:
    """Keep a second world out: without a launcher's variables each process is a first one.

    Raises:
        RunInUseError: There is another.
    """
    lease = Lease(run_dir.leases / "sft", config.site.lease_s)
    with lease if ranks.is_first else nullcontext():
        if ranks.is_first and not lease.outlast():
            raise RunInUseError(
                f"{run_dir.sft} is being trained by another process; if that is one of this job, "
                "start them so that RANK and WORLD_SIZE are set"
            )
        yield lease
