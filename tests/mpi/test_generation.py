"""Generation under MPI: the same rows for any number of ranks; a dying rank; a stop; a failure."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mpi.launch import environment, expert_calls, make_run, manifest, mpiexec, run_ranks
from teams_hpc.generation.usage import generation_usage
from teams_hpc.storage.run_dir import RunDir

UNIT_SIZE = 4
# `teams-hpc stage generate`, with an expert that takes its time.
SLOW = """
import sys, time
from teams_hpc.llm.template_engine import TemplateEngine
real = TemplateEngine.step
def step(self):
    time.sleep(0.02)
    return real(self)
TemplateEngine.step = step
from teams_hpc.cli import main
main(["stage", "generate", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """What a single process makes of it."""
    run_dir = make_run(tmp_path_factory.mktemp("quiet") / "run")
    done = subprocess.run(
        (sys.executable, "-m", "teams_hpc", "stage", "generate", str(run_dir.root)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.parametrize("size", [2, 4, 7])
def test_any_number_of_ranks_makes_the_same_rows(size: int, quiet: RunDir, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    done = run_ranks(size, "-m", "teams_hpc", "stage", "generate", str(run_dir.root))
    assert done.returncode == 0, done.stderr
    assert f"MPI joined {size} processes" in done.stderr
    assert manifest(run_dir)["units"] == manifest(quiet)["units"]
    assert expert_calls(run_dir) == expert_calls(quiet)
    assert list(run_dir.leases.glob("block-*")) == []


def start(size: int, root: Path, *words: str) -> subprocess.Popen[bytes]:
    argv = (*(mpiexec(size) if size > 1 else ()), sys.executable, "-c", SLOW, str(root), *words)
    return subprocess.Popen(
        argv, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@dataclass(frozen=True)
class World:
    """Processes of one start: joined by MPI, or bare ones, which share the work by claims alone."""

    name: str
    size: int

    def start(self, root: Path) -> list[subprocess.Popen[bytes]]:
        if self.name == "mpiexec":
            return [start(self.size, root)]
        return [start(1, root, "--index", str(index)) for index in range(self.size)]


WORLDS = (World("mpiexec", 2), World("bare", 1), World("mpiexec", 4), World("bare", 3))


def ranks_of(root: Path) -> list[int]:
    """Processes that work on this run, launchers left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        is_python = b"python" in words[0] and b"mpiexec" not in words[0]
        if is_python and str(root).encode() in words and state not in "ZX":
            found.append(int(entry.name))
    return found


def begun(run_dir: RunDir) -> set[str]:
    """Journals with more than a header: each start, and each unit, has others."""
    return {path.name for path in run_dir.journal.glob("*.wal") if is_begun(path)}


def is_begun(path: Path) -> bool:
    with suppress(FileNotFoundError):  # published just now
        return path.stat().st_size > 300
    return False


def has_begun(run_dir: RunDir) -> bool:
    return bool(begun(run_dir))


def kill_once(world: World, run_dir: RunDir, after_s: float) -> bool:
    """Kill one process or all -9 a while after this start's first call; did it cut a unit off?

    It did if a journal is left that this start began: its unit has calls and is not published.
    """
    before = begun(run_dir)
    processes = world.start(run_dir.root)
    deadline = time.monotonic() + 60
    while not begun(run_dir) - before and any(one.poll() is None for one in processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(after_s)
    victims = ranks_of(run_dir.root)
    if random.random() < 0.5 and victims:
        kill([random.choice(victims)])
        time.sleep(0.1)  # the others of a step end with it; bare ones work on until they are hit
    kill([*(one.pid for one in processes if one.poll() is None), *ranks_of(run_dir.root)])
    for one in processes:
        one.wait(timeout=60)
    while ranks_of(run_dir.root):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return bool(begun(run_dir) - before)


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclass
class Chaos:
    """What was done to a run: how many kills cut a unit off, and in which worlds."""

    num_cut: int = 0
    num_processes: int = 0
    worlds: set[World] = field(default_factory=set)


def chaos(run_dir: RunDir, kills: int, seed: int) -> Chaos:
    """Kill again and again, with another world each time, until so many cut a unit off."""
    random.seed(seed)
    found = Chaos()
    worlds = list(WORLDS)
    for number in range(2 * kills):
        if number % len(worlds) == 0:
            last = worlds[-1]
            while worlds[0] == last:
                random.shuffle(worlds)
        world = worlds[number % len(worlds)]
        if kill_once(world, run_dir, random.uniform(0, 0.3)):
            found.num_cut += 1
            found.num_processes += world.size
            found.worlds.add(world)
        if found.num_cut == kills or run_dir.manifest("generate").exists():
            break
    if not run_dir.manifest("generate").exists():
        assert start(2, run_dir.root).wait(timeout=200) == 0
    return found


def assert_nothing_lost_or_repeated(run_dir: RunDir, quiet: RunDir) -> None:
    assert manifest(run_dir)["units"] == manifest(quiet)["units"]
    assert manifest(run_dir)["sha256"] == manifest(quiet)["sha256"]
    assert expert_calls(run_dir)[0] == expert_calls(quiet)[0]


def assert_few_in_doubt(run_dir: RunDir, found: Chaos) -> None:
    """At most one group commit of each process that was killed: a unit's chains."""
    assert expert_calls(run_dir)[1] <= UNIT_SIZE * found.num_processes


def test_killed_ranks_cost_nothing_durable(quiet: RunDir, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    found = chaos(run_dir, kills=4, seed=1)
    assert found.num_cut == 4
    assert len(found.worlds) >= 3
    assert_nothing_lost_or_repeated(run_dir, quiet)
    assert_few_in_doubt(run_dir, found)


@pytest.mark.chaos
def test_many_kills(tmp_path: Path) -> None:
    changes = {"seeds": {"limit": 150}, "generate": {"num_trajectories": 6}}
    calm = make_run(tmp_path / "calm", **changes)
    assert run_ranks(2, "-m", "teams_hpc", "stage", "generate", str(calm.root)).returncode == 0
    run_dir = make_run(tmp_path / "run", **changes)
    found = chaos(run_dir, kills=25, seed=2)
    assert found.num_cut >= 20
    assert found.worlds == set(WORLDS)
    assert_nothing_lost_or_repeated(run_dir, calm)
    assert_few_in_doubt(run_dir, found)


def test_a_stop_of_one_rank_stops_all_at_a_safe_point(quiet: RunDir, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    process = start(4, run_dir.root)
    deadline = time.monotonic() + 60
    while not has_begun(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ranks_of(run_dir.root)[-1], signal.SIGUSR2)
    assert process.wait(timeout=60) == 144
    assert not run_dir.manifest("generate").exists()
    assert start(3, run_dir.root).wait(timeout=120) == 0
    assert_nothing_lost_or_repeated(run_dir, quiet)
    assert expert_calls(run_dir)[1] == 0  # nothing in doubt: it was safe


def test_one_failing_rank_ends_the_step_and_says_why(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", budget={"max_expert_calls": 40})
    done = run_ranks(2, "-m", "teams_hpc", "stage", "generate", str(run_dir.root))
    assert done.returncode == 1
    texts = [path.read_text() for path in run_dir.metrics.glob("*.error.txt")]
    assert texts
    assert all("stopped at the budget" in text for text in texts)
    spent = generation_usage(run_dir).total("expert")
    assert 0 < spent.calls + spent.in_doubt <= 40


def test_a_real_model_in_fixed_batches_gives_the_same_rows(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = {"kind": "transformers", "model": str(tiny_llama), "dtype": "float32", "threads": 1}
    engine = {**model, "batching": "fixed", "batch_size": 4, "max_tokens": 150, "temperature": 1.0}
    changes = {
        "seeds": {"limit": 6},
        "generate": {"unit_size": 3, "num_steps": 2, "equal_threshold": 0.0},
        "expert": engine,
        "reviewer": {**engine, "batch_size": 3},
    }
    found = []
    for size in (1, 2):
        run_dir = make_run(tmp_path / f"ranks{size}", **changes)
        words = ("-m", "teams_hpc", "stage", "generate", str(run_dir.root))
        done = run_ranks(size, *words, timeout=250)
        assert done.returncode == 0, done.stderr
        assert manifest(run_dir)["exactness"] == "exact"
        found.append(manifest(run_dir)["units"])
    assert found[0] == found[1]


def test_ranks_that_another_step_was_faster_than_end_together(tmp_path: Path) -> None:
    """One finds the manifest there, the other looked a moment earlier: neither waits for ever."""
    run_dir = make_run(tmp_path / "run")
    code = (
        """
import os
from teams_hpc.generation import worker
look, looks = worker.read_manifest, []
def read(run_dir, stage):
    looks.append(stage)
    is_second = os.environ["OMPI_COMM_WORLD_RANK"] == "1"
    return {} if is_second and len(looks) == 1 else look(run_dir, stage)
worker.read_manifest = read
"""
        + SLOW
    )
    done = run_ranks(2, "-c", code, str(run_dir.root), timeout=60)
    assert done.returncode == 0, done.stderr
    assert "MPI joined 2 processes" in done.stderr
    assert run_dir.manifest("generate").exists()
