"""Where a process stands among its equals, and that it notices when it isn't told."""

import pytest

from teams_hpc.errors import UsageError
from teams_hpc.runtime.ranks import STEP_SIZE_VARIABLE, Ranks, read_ranks

SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, Ranks()),
        (
            {**SLURM, "SLURM_STEP_NUM_NODES": "2"},
            Ranks(rank=3, world_size=4, local_rank=1, local_world_size=2),
        ),
        ({**SLURM, **MPIRUN}, Ranks(rank=1, world_size=2, local_rank=1, local_world_size=2)),
        (
            {**SLURM, **MPIRUN, **TORCHRUN},
            Ranks(rank=1, world_size=8, local_rank=1, local_world_size=4),
        ),
    ],
)
def test_the_innermost_launcher_counts(environment: dict[str, str], ranks: Ranks) -> None:
    assert read_ranks(environment) == ranks


@pytest.mark.parametrize(
    ("environment", "size"), [(SLURM, "4"), (MPIRUN, "2"), ({**SLURM, **TORCHRUN}, "1")]
)
def test_a_container_that_lets_everything_in_is_fine(
    environment: dict[str, str], size: str
) -> None:
    """torchrun starts a world of its own inside, of which the step's launcher knows nothing."""
    assert read_ranks({**environment, STEP_SIZE_VARIABLE: size}).world_size > 1


@pytest.mark.parametrize("size", ["1", "2"])
def test_a_container_that_drops_the_launchers_variables_is_noticed(size: str) -> None:
    """Of a step of one too: without its job's number it can't be stopped and requeued."""
    with pytest.raises(UsageError, match=rf"one of {size} .* no variables .* --cleanenv"):
        read_ranks({STEP_SIZE_VARIABLE: size})


def test_another_size_than_was_counted_outside_is_noticed() -> None:
    with pytest.raises(UsageError, match="one of 2 of its step, but finds itself one of 4"):
        read_ranks({**SLURM, STEP_SIZE_VARIABLE: "2"})
