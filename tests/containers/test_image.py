"""The Dockerfile, built and used: what it says of itself, its own checks, the quickstart."""

import json
from collections.abc import Iterator

import pytest

from containers.conftest import CPU
from containers.machine import Buildah

pytestmark = [pytest.mark.containers_long, pytest.mark.timeout(2400)]
# Every stage and the model that comes with the package, with as little of each as there can be.
QUICK = (
    "seeds.limit=60",
    "policy.num_members=1",
    "policy.iterations=1",
    "policy.num_envs=4",
    "policy.episode_length=2",
    "policy.num_eval_episodes=1",
    "generate.num_steps=2",
    "sft.schedule_steps=8",
    "sft.warmup_steps=1",
    "sft.checkpoint_interval_steps=8",
    "sft.eval_interval_steps=8",
    "evaluate.num_bootstrap=100",
    "evaluate.control_steps=8",
)
STAGES = ("policy", "select", "generate", "dataset", "sft", "evaluate", "report")


class Container:
    """A container of the image, as whoever the image says."""

    def __init__(self, buildah: Buildah, name: str) -> None:
        self._buildah, self.name = buildah, name

    def run(self, *words: str, timeout: float = 120) -> str:
        return self._buildah(
            "run", "--isolation", "chroot", self.name, "--", *words, timeout=timeout
        )


@pytest.fixture(scope="module")
def container(buildah: Buildah, image: str) -> Iterator[Container]:
    name = buildah.create(image)
    yield Container(buildah, name)
    buildah("rm", name)


def test_it_says_what_it_is_and_what_it_starts(buildah: Buildah, image: str) -> None:
    found = json.loads(buildah("inspect", "--type", "image", image))["Docker"]["config"]
    labels = {name.rpartition(".")[2]: value for name, value in found["Labels"].items()}
    assert labels["version"] == CPU["VERSION"]
    assert labels["revision"] == CPU["REVISION"]
    assert labels["licenses"] == "Apache-2.0"
    assert (found["Entrypoint"], found["Cmd"]) == (["teams-hpc"], ["--help"])
    assert (found["User"], found["WorkingDir"]) == ("10001:10001", "/work")


def test_its_user_is_nobody_special_and_may_change_nothing_of_it(container: Container) -> None:
    assert container.run("id", "-u").strip() == "10001"
    can_write = "find /opt /usr /etc /var/lib -writable ! -type l -print -quit 2>/dev/null; true"
    assert container.run("sh", "-c", can_write).strip() == ""


def test_what_only_the_first_stage_needs_is_not_in_it(container: Container) -> None:
    script = "command -v g++ make nvcc; ls /opt/teams-hpc /root/.cache 2>/dev/null; true"
    words = container.run("sh", "-c", script).split()
    assert sorted(words) == ["/opt/teams-hpc:", "configs", "selftest.py", "venv"]


def test_it_passes_its_own_checks(container: Container) -> None:
    said = container.run("python3", "/opt/teams-hpc/selftest.py")
    assert "mpi: 2 ranks in one world, Open MPI" in said
    assert "nothing compiled" in said
    assert said.rstrip().endswith("selftest: passed")


def test_an_operator_that_was_asked_for_is_compiled_already(container: Container) -> None:
    """Loading it takes no compiler: there is none for C++ here, and no folder to put it."""
    load = (
        "from deepspeed.ops.op_builder import PinMemoryBuilder; "
        "print(PinMemoryBuilder().load().__file__)"
    )
    said = container.run("env", "DS_ACCELERATOR=cpu", "python3", "-c", load)
    assert "/opt/teams-hpc/venv/" in said.splitlines()[-1]


def test_the_quickstart_runs_in_it(container: Container) -> None:
    config = "/opt/teams-hpc/configs/quickstart.yaml"
    said = container.run("teams-hpc", "run", config, *QUICK, timeout=600)
    assert f"quickstart: all {len(STAGES)} stages done" in said
    verified = container.run("teams-hpc", "verify", "runs/quickstart")
    assert "FAULT" not in verified
    made = container.run("sh", "-c", "ls -d runs/quickstart/*/manifest.json").split()
    assert sorted(path.split("/")[2] for path in made) == sorted(STAGES)
    provenance = json.loads(container.run("cat", "runs/quickstart/provenance.json"))
    assert provenance["sessions"][0]["git_commit"] == CPU["REVISION"]
