"""Rank and world size of this process, from whichever launcher started it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from teams_hpc.errors import UsageError

STEP_SIZE_VARIABLE = "TEAMS_HPC_STEP_SIZE"
"""Set into a container by shell/task.sh: the processes that the launcher started."""
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Place of this process among those started together, and among those of them on its node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UsageError(f"rank {self.rank} is outside a world of {self.world_size}")

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Ranks as torchrun, mpirun or a Slurm step set them; a single process otherwise.

    Nodes of a Slurm step are taken to have equally many processes, as our jobs ask for.

    Raises:
        UsageError: The launcher's variables didn't reach the container that this process is in.
    """
    for names in _LAUNCHERS:
        if all(name in environment for name in names):
            rank, world_size, local_rank = (int(environment[name]) for name in names)
            num_nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
            known = (int(environment[name]) for name in _LOCAL_SIZES if name in environment)
            if names[0] != "RANK":  # torchrun's own world, started inside
                _check_step_size(environment, world_size)
            return Ranks(
                rank=rank,
                world_size=world_size,
                local_rank=local_rank,
                local_world_size=next(known, max(1, world_size // num_nodes)),
            )
    _check_step_size(environment, None)
    return Ranks()


def _check_step_size(environment: Mapping[str, str], found: int | None) -> None:
    """Compare the size of this process's step with what was counted outside the container."""
    counted = environment.get(STEP_SIZE_VARIABLE)
    if counted is None or found == int(counted):
        return
    raise UsageError(
        f"this process is one of {counted} of its step, but finds "
        f"{'no variables of a launcher' if found is None else f'itself one of {found}'} in its "
        "container: it would do the work of all. Start the container without --cleanenv and "
        "--containall (look for an alias, a wrapper, and the site's apptainer.conf)"
    )
