"""Runs that tests disturb: an expert that takes its time, a job that takes a node, what was left.

With a slow expert a test chooses the moment: generation is in its midst for as long as needed.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from chat_server import ChatServer, chat_server

from slurm.cluster import FINISHED, ClusterError, SlurmCluster
from slurm.runs import TINY, command, output, records, submit, write_config

ALONE = "site.slurm.stages.generate.cpus_per_task=8"  # one array task a node
CALLS_TO_THE_MIDST = 10
_SLOW_S = 0.3
_WORDS = "list name explain river violin glacier bee three ways because of with and the for".split()
T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = 60) -> T:
    """The condition's first true value; fails when the time is over."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain for {what}"
        time.sleep(0.2)
    return value


@contextmanager
def slow_expert() -> Iterator[ChatServer]:
    """An expert that takes its time; set `delay_s = 0` to let the rest go fast."""
    with chat_server(ChatServer(delay_s=_SLOW_S, say=_reply)) as server:
        yield server


def _reply(prompt: str) -> str:
    """A reply of 20 words that depends on every character of the prompt, and on nothing else."""
    draws = random.Random(prompt)
    return " ".join(draws.choice(_WORDS) for _ in range(20))


def expert_words(server: ChatServer) -> tuple[str, ...]:
    """Settings with which generation asks the slow expert, one array task a node."""
    expert = f"{{kind: http, base_url: '{server.url}', model: m, max_concurrency: 2}}"
    return ("generate.policy=uniform", f"expert={expert}")


def submit_until_midst(
    cluster: SlurmCluster, server: ChatServer, folder: Path, *words: str
) -> Path:
    """Submit a run and wait until its generation is in its midst; its folder."""
    root = folder / "run"
    submit(cluster, write_config(folder, TINY), *expert_words(server), *words)
    seen = len(server.answered)
    enough = seen + CALLS_TO_THE_MIDST
    wait_until(lambda: len(server.answered) >= enough, "calls of the expert")
    assert not (root / "generate" / "manifest.json").exists()
    return root


def take_node(cluster: SlurmCluster, node: str, folder: Path) -> None:
    """Let a more important job have a whole node for a moment."""
    options = ("--partition=high", "--exclusive", f"--nodelist={node}")
    urgent = cluster.submit("sleep 1", *options, folder=folder)
    cluster.wait_for(urgent, "COMPLETED", timeout=60)


def finish_stage(cluster: SlurmCluster, root: Path, stage: str, timeout_s: float = 150) -> None:
    """Wait for a stage's last job; everything that was said is shown unless it completes."""
    job = records(root, stage)[-1].job_id
    try:
        found = cluster.wait_for(job, FINISHED, timeout_s)
    except ClusterError as error:
        raise AssertionError(f"{error}\n{output(root)}") from error
    states = {record["JobState"] for record in found}
    assert states == {"COMPLETED"}, f"{stage}: {states}\n{output(root)}"


def accounting(cluster: SlurmCluster, job: str, end: str = "COMPLETED") -> list[str]:
    """States of every start of a job in accounting, once the last has that end."""

    def found() -> list[str]:
        words = ("-X", "-n", "-P", "--duplicates", "--format=JobID,State", f"--jobs={job}")
        lines = [line.split("|") for line in cluster.run("sacct", *words).splitlines()]
        states = [state.split()[0] for name, state in lines if name == job]
        return states if states and states[-1] == end else []

    return wait_until(found, f"accounting to say {end} of job {job}", 40)


def stops(root: Path) -> list[str]:
    """`<job id>-<restart count>` of each start that stopped at a safe point."""
    return sorted(path.name for path in (root / "slurm" / "stopped").glob("*"))


def verify_rows(cluster: SlurmCluster, root: Path) -> None:
    """`verify` has no complaint about the generated rows and the data set."""
    said = command(cluster, "verify", str(root), folder=root.parent).text
    for stage in ("generate", "dataset"):
        lines = [line for line in said.splitlines() if f" {stage}: " in line]
        assert lines, said
        assert all(line.startswith("ok ") for line in lines), said


def ranks(root: Path, *, job: str, rank: int) -> list[int]:
    """Processes of this rank in this job's first step that work on the run."""
    wanted = {f"TEAMS_HPC_RUN_DIR={root}", f"SLURM_JOB_ID={job}", f"SLURM_PROCID={rank}"}
    wanted.add("SLURM_STEP_ID=0")
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = set(path.read_text(errors="replace").split("\0"))
        except OSError:
            continue
        if wanted <= words:
            found.append(int(path.parent.name))
    return found
