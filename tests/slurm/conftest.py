"""The private Slurm cluster of the tests in this folder, and which of them run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_server import ChatServer

from slurm.cluster import PACKAGES, SlurmCluster, missing_programs, temporary_cluster
from slurm.disturbances import slow_expert

HERE = Path(__file__).parent
LONG = pytest.mark.skip(reason="long: make test-slurm runs it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark this folder's tests; leave out the long ones unless they are asked for."""
    chosen = "slurm_long" in config.option.markexpr
    run_long = chosen or os.environ.get("TEAMS_HPC_SLURM_ALL") == "1"
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker("slurm")
        if item.get_closest_marker("slurm_long") and not run_long:
            item.add_marker(LONG)


def require_slurm() -> None:
    """Skip where Slurm is not installed; fail instead where TEAMS_HPC_REQUIRE_SLURM=1."""
    if missing := missing_programs():
        reason = (
            f"NOT TESTED ON SLURM: this machine lacks {', '.join(missing)}. "
            f"On Debian: apt-get install --no-install-recommends {PACKAGES}"
        )
        if os.environ.get("TEAMS_HPC_REQUIRE_SLURM") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    """A cluster of four nodes with accounting, started when the first test asks for it."""
    require_slurm()
    with temporary_cluster() as running:
        yield running


@pytest.fixture(autouse=True)
def quiet_queue(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the shared cluster without jobs and with all nodes after each test that uses it."""
    uses_it = "cluster" in request.fixturenames
    running: SlurmCluster | None = request.getfixturevalue("cluster") if uses_it else None
    yield
    if running is not None:
        running.quiet()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """An expert slow enough that a test can choose its moment."""
    with slow_expert() as running:
        yield running
