"""Rank and world size of this process, from whichever launcher started it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from teams_hpc.errors import UsageError

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
    """
    for names in _LAUNCHERS:
        if all(name in environment for name in names):
            rank, world_size, local_rank = (int(environment[name]) for name in names)
            num_nodes = int(environment.get("SLURM_STEP_NUM_NODES", 1))
            known = (int(environment[name]) for name in _LOCAL_SIZES if name in environment)
            return Ranks(
                rank=rank,
                world_size=world_size,
                local_rank=local_rank,
                local_world_size=next(known, max(1, world_size // num_nodes)),
            )
    return Ranks()
