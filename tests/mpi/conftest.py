"""MPI tests need mpi4py and a launcher, both of which pip can install."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpi.launch import missing_mpi

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = missing_mpi()
    reason = f"NOT TESTED UNDER MPI: this machine lacks {missing}"
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker("mpi")
        if missing and os.environ.get("TEAMS_HPC_REQUIRE_MPI") == "1":
            pytest.fail(reason, pytrace=False)
        if missing:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def own_session_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder for the launchers of one test: Open MPI's `ompi.<process id>` go there.

    A launcher that is killed leaves its own behind, and a later one that happens to get the same
    number refuses to start ("The PMIx server's listener thread failed to start").
    """
    with tempfile.TemporaryDirectory(prefix="mpi-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield
