"""What the tests of the two recipes share: one base, an image of each recipe, a small Slurm.

They take minutes, so `make test-containers` asks for them. With TEAMS_HPC_CONTAINERS_DIR=FOLDER
what was built stays there, for the next run of whoever works on the tests.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from chat_server import ChatServer
from slurm.cluster import SlurmCluster, missing_programs, temporary_cluster
from slurm.disturbances import slow_expert

from containers.apptainer import Apptainer, UnavailableError, find_apptainer
from containers.machine import BASE, Buildah, Machine, make_base, missing_tools, pip_settings

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
IMAGE = "localhost/teams-hpc:test"
LONG = pytest.mark.skip(reason="long: make test-containers runs it")
# The recipes' arguments on a machine without GPUs, nvcc and patience.
CPU = {
    "PIP_INDEX_ARGS": "",
    "WITH_FLASH_ATTN": "0",
    "WITH_DEEPSPEED_OPS": "",
    "EXTRAS": "compute mpi",
    "MPI4PY_ARGS": "",
    "VERSION": "0.0-test",
    "REVISION": "feedc0de",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark this folder's tests; leave those that build out unless they are asked for."""
    is_asked_for = os.environ.get("TEAMS_HPC_CONTAINERS") == "1"
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        item.add_marker("containers")
        if item.get_closest_marker("containers_long") and not is_asked_for:
            item.add_marker(LONG)


def not_tested(reason: str) -> NoReturn:
    """Skip with the reason; fail instead where TEAMS_HPC_REQUIRE_CONTAINERS=1."""
    if os.environ.get("TEAMS_HPC_REQUIRE_CONTAINERS") == "1":
        pytest.fail(f"CONTAINERS NOT TESTED: {reason}", pytrace=False)
    pytest.skip(f"CONTAINERS NOT TESTED: {reason}")


@pytest.fixture(scope="session")
def workshop() -> Iterator[Path]:
    """A folder for what is built; gigabytes, so it goes at the end."""
    kept = os.environ.get("TEAMS_HPC_CONTAINERS_DIR")
    if kept:
        yield Path(kept).resolve()
        return
    # Short, and not in pytest's own folder, which is kept.
    folder = Path(tempfile.mkdtemp(prefix="containers-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def machine() -> Machine:
    if reason := missing_tools():
        not_tested(reason)
    return Machine(pip_settings())


@pytest.fixture(scope="session")
def buildah(workshop: Path, machine: Machine) -> Iterator[Buildah]:
    built = Buildah(workshop)
    yield built
    built("rm", "--all")


@pytest.fixture(scope="session")
def base(buildah: Buildah, machine: Machine) -> Path:
    """The archive of a small Debian; the same is in Buildah's store as `BASE`."""
    return make_base(buildah, machine)


@pytest.fixture(scope="session")
def image(buildah: Buildah, machine: Machine, base: Path) -> str:
    """The Dockerfile, built with the arguments for CPUs; one operator of DeepSpeed is compiled."""
    if not buildah.has(IMAGE):
        arguments = {**CPU, "BASE": BASE, "RUNTIME_BASE": BASE, "WITH_DEEPSPEED_OPS": "pin_memory"}
        words = [word for pair in arguments.items() for word in ("--build-arg", "=".join(pair))]
        for folder in machine.folders:
            words += ["--volume", f"{folder}:{folder}:ro"]
        how = ("--format", "docker", "--isolation", "chroot", "--layers=false", "--pull-never")
        buildah("bud", *how, *words, "--tag", IMAGE, ".", folder=PROJECT, timeout=1500)
    return IMAGE


@pytest.fixture(scope="session")
def apptainer(workshop: Path, machine: Machine) -> Apptainer:
    try:
        return find_apptainer(workshop / "apptainer")
    except UnavailableError as error:
        # A moving target (Debian's newest), so not required by REQUIRE_CONTAINERS.
        pytest.skip(f"APPTAINER NOT TESTED: {error}")


@pytest.fixture(scope="session")
def converted(workshop: Path, buildah: Buildah, image: str, apptainer: Apptainer) -> Path:
    """The Docker image as Apptainer's folder, through apptainer.def."""
    folder, pushed = workshop / "converted", workshop / "image"
    if not folder.exists():
        # As docker-archive, which `base` is, but without packing and unpacking gigabytes.
        shutil.rmtree(pushed, ignore_errors=True)
        words = ("push", "--quiet", "--disable-compression", "--format", "oci")
        buildah(*words, image, f"oci:{pushed}", timeout=600)
        _build(apptainer, folder, {"BOOTSTRAP": "oci", "BASE": str(pushed)})
        shutil.rmtree(pushed)
    return folder


@pytest.fixture(scope="session")
def sandbox(workshop: Path, machine: Machine, base: Path, apptainer: Apptainer) -> Path:
    """apptainer.def, built from the base, as a folder."""
    folder = workshop / "sandbox"
    if not folder.exists():
        arguments = {**CPU, "BOOTSTRAP": "docker-archive", "BASE": str(base)}
        binds = [word for path in machine.folders for word in ("--bind", f"{path}:{path}:ro")]
        _build(apptainer, folder, arguments, *binds)
    return folder


def _build(apptainer: Apptainer, folder: Path, arguments: dict[str, str], *words: str) -> None:
    partial = folder.with_suffix(".partial")
    options = [word for pair in arguments.items() for word in ("--build-arg", "=".join(pair))]
    target = (str(partial), "apptainer.def")
    how = ("--sandbox", "--notest")  # a test runs %test
    apptainer.build(*how, *words, *options, *target, folder=PROJECT, timeout=1200)
    partial.rename(folder)


@pytest.fixture(scope="session")
def _running_cluster() -> Iterator[SlurmCluster]:
    if missing := missing_programs(with_accounting=False):
        not_tested(f"no Slurm: {', '.join(missing)}")
    with temporary_cluster(num_nodes=2, with_accounting=False) as running:
        yield running


@pytest.fixture
def cluster(
    _running_cluster: SlurmCluster, apptainer: Apptainer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SlurmCluster]:
    """Two nodes with Apptainer on PATH; without jobs after each test."""
    for name, value in {**_running_cluster.environment, **apptainer.environment}.items():
        monkeypatch.setenv(name, value)
    yield _running_cluster
    _running_cluster.quiet()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    """An expert slow enough that a test can choose its moment."""
    with slow_expert() as running:
        yield running
