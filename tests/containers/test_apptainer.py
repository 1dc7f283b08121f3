"""apptainer.def, from the Docker image and from a base: what is inside, and how tasks enter it."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from containers.apptainer import Apptainer, said
from containers.conftest import CPU

pytestmark = [pytest.mark.containers_long, pytest.mark.timeout(2400)]
HELLO = (
    "from mpi4py import MPI; world = MPI.COMM_WORLD; "
    "print(f'[{world.rank} of {world.size}, {world.allreduce(1)}]', flush=True)"
)


def worlds(text: str) -> list[str]:
    """What `HELLO` said in each process; launchers may put a line between another and its end."""
    return sorted(re.findall(r"\[(.*?)\]", text))


@pytest.mark.parametrize("kind", ["converted", "sandbox"])
def test_it_says_what_it_is_and_passes_its_own_checks(
    apptainer: Apptainer, kind: str, request: pytest.FixtureRequest
) -> None:
    """The same software by both ways. (The builds left %test out, so that it runs once.)"""
    folder = request.getfixturevalue(kind)
    labels = json.loads(apptainer.run("inspect", "--json", "--labels", str(folder)))
    found = labels["data"]["attributes"]["labels"]
    assert found["org.opencontainers.image.revision"] == CPU["REVISION"]
    assert found["org.opencontainers.image.version"] == CPU["VERSION"]
    done = apptainer.run("test", str(folder), timeout=180)
    assert "mpi: 2 ranks in one world, Open MPI" in done
    assert "selftest: passed" in done
    assert not (folder / "opt/teams-hpc/source").exists()


def test_both_ways_give_the_same_packages(
    apptainer: Apptainer, converted: Path, sandbox: Path
) -> None:
    frozen = [
        apptainer.run("exec", str(folder), "python3", "-m", "pip", "freeze", "--all")
        for folder in (converted, sandbox)
    ]
    names = [[line for line in text.splitlines() if "teams-hpc" not in line] for text in frozen]
    assert names[0] == names[1]
    assert any(line.startswith("torch==") for line in names[0])


def test_a_checkout_in_the_current_folder_is_not_what_runs(
    apptainer: Apptainer, sandbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current folder is seen inside; only the image decides what is imported."""
    monkeypatch.chdir(Path(__file__).parents[2])
    words = ("python3", "-c", "import teams_hpc; print(teams_hpc.__file__)")
    found = apptainer.run("exec", str(sandbox), *words)
    assert found.startswith("/opt/teams-hpc/venv/")


def test_running_it_is_running_the_program(apptainer: Apptainer, sandbox: Path) -> None:
    assert apptainer.run("run", str(sandbox), "--version").startswith("teams-hpc ")
    told = apptainer.run("exec", str(sandbox), "printenv", "TEAMS_HPC_REVISION")
    assert told.strip() == CPU["REVISION"]


def test_what_is_bound_to_read_cannot_be_written(
    apptainer: Apptainer, sandbox: Path, tmp_path: Path
) -> None:
    source = tmp_path / "data"
    source.mkdir()
    (source / "there").touch()
    words = ("exec", "--bind", f"{source}:/mnt:ro", str(sandbox), "sh", "-c")
    assert apptainer.run(*words, "ls /mnt").strip() == "there"
    assert "Read-only" in apptainer.run(*words, "touch /mnt/new", code=1)


def test_the_drivers_flag_does_no_harm_without_a_gpu(apptainer: Apptainer, sandbox: Path) -> None:
    said = apptainer.run("exec", "--nv", str(sandbox), "teams-hpc", "--version")
    assert said.splitlines()[-1].startswith("teams-hpc ")


def test_two_ranks_under_mpirun_are_one_world(apptainer: Apptainer, sandbox: Path) -> None:
    """mpirun inside the container starts both. It puts its own folder first in PATH."""
    python = "/opt/teams-hpc/venv/bin/python3"
    words = ("mpirun", "--oversubscribe", "--host", "localhost:2", "-n", "2", python, "-c")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    found = apptainer.run("exec", str(sandbox), *words, HELLO, environment=root)
    assert worlds(found) == ["0 of 2, 2", "1 of 2, 2"]


def hybrid(apptainer: Apptainer, sandbox: Path, *words: str, code: int | None = 0) -> str:
    """Two tasks of this machine's mpirun, each entering the container by itself."""
    # Not one in the tests' environment: it has to be of the release that the image is.
    mpirun = shutil.which("mpirun", path="/usr/bin")
    assert mpirun is not None
    task = str(Path(__file__).parents[2] / "slurm" / "task.sh")
    told = {
        **apptainer.environment,
        "TEAMS_HPC_IMAGE": str(sandbox),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    command = (mpirun, "--oversubscribe", "--host", "localhost:2", "-n", "2", task, *words)
    return said(command, timeout=120, environment=told, code=code)


def test_two_tasks_of_the_hosts_mpirun_are_one_world(apptainer: Apptainer, sandbox: Path) -> None:
    found = hybrid(apptainer, sandbox, "python3", "-c", HELLO)
    assert worlds(found) == ["0 of 2, 2", "1 of 2, 2"]


def test_a_container_that_drops_the_launchers_variables_is_caught(
    apptainer: Apptainer, sandbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check both would be rank 0 of 1, do the work of all, and end well."""
    wrapper = tmp_path / "apptainer"
    wrapper.write_text(f'#!/bin/sh\nshift\nexec {apptainer.program} exec --cleanenv "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apptainer.program.parent}{os.pathsep}{os.environ['PATH']}")
    dropping = Apptainer(wrapper, tmp_path)
    alone = hybrid(dropping, sandbox, "python3", "-c", HELLO)
    assert worlds(alone) == ["0 of 1, 1", "0 of 1, 1"]
    stage = ("python3", "-m", "teams_hpc", "stage", "generate", str(tmp_path / "run"))
    caught = hybrid(dropping, sandbox, *stage, code=None)
    assert "this process is one of 2 of its step, but finds no variables of a launcher" in caught
    assert "--cleanenv" in caught
    assert sys.executable not in caught
