"""Generation under MPI: the same rows for any number of ranks; a dying rank; a stop; a failure."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mpi.launch import (
    environment,
    expert_calls,
    make_run,
    manifest,
    mpiexec,
    run_ranks,
    usage_done,
)
from teams_hpc.generation.queue import block_size
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


# The same, but each rank says which units it publishes.
WATCHED = """
import sys
from teams_hpc.generation import worker
from teams_hpc.runtime.ranks import read_ranks
real = worker.publish_unit
def publish_unit(run_dir, log, *rest):
    sys.stdout.write(f"{read_ranks().rank} {log.unit}\\n")
    sys.stdout.flush()
    return real(run_dir, log, *rest)
worker.publish_unit = publish_unit
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
    assert joined(size) in done.stderr
    assert manifest(run_dir)["units"] == manifest(quiet)["units"]
    assert manifest(run_dir)["usage"] == manifest(quiet)["usage"]
    assert list(run_dir.leases.glob("block-*")) == []


def test_ranks_that_share_a_block_make_the_same_rows(tmp_path: Path) -> None:
    """With so many units a block has several, and the ranks of a step work in it together."""
    changes = {
        "seeds": {"limit": 128},
        "generate": {"num_trajectories": 1, "num_steps": 1, "unit_size": 1},
    }
    alone, together = (make_run(tmp_path / name, **changes) for name in ("alone", "together"))
    assert subprocess.run(
        (sys.executable, "-m", "teams_hpc", "stage", "generate", str(alone.root)),
        env=environment(),
        timeout=120,
        check=True,
    )
    done = run_ranks(4, "-c", WATCHED, str(together.root))
    assert done.returncode == 0, done.stderr
    assert joined(4) in done.stderr
    assert block_size(len(manifest(together)["units"])) == 2
    assert manifest(together)["units"] == manifest(alone)["units"]
    assert manifest(together)["usage"] == manifest(alone)["usage"]
    ranks_of_block: dict[int, set[str]] = defaultdict(set)
    units = Counter[int]()
    for line in done.stdout.splitlines():
        rank, unit = line.split()
        ranks_of_block[int(unit) // 2].add(rank)
        units[int(unit)] += 1
    assert set(units.values()) == {1}
    assert len(units) == 128
    assert set.union(*ranks_of_block.values()) == {"0", "1", "2", "3"}
    assert max(map(len, ranks_of_block.values())) == 2


def start(size: int, root: Path, *words: str) -> subprocess.Popen[bytes]:
    """One process, or several that MPI joins, whose log is then `log_of` this run."""
    argv = (*(mpiexec(size) if size > 1 else ()), sys.executable, "-c", SLOW, str(root), *words)
    with (log_of(root) if size > 1 else Path(os.devnull)).open("wb") as log:
        return subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL, stderr=log)


def log_of(root: Path) -> Path:
    """What the last ranks that MPI joined have said."""
    return root.with_name(f"{root.name}.log")


def joined(size: int) -> str:
    """What a rank says where MPI didn't leave every process in a world of its own."""
    return f"MPI joined {size} processes"


def wait_until_joined(size: int, root: Path) -> None:
    deadline = time.monotonic() + 60
    while joined(size) not in log_of(root).read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, log_of(root).read_text(encoding="utf-8")
        time.sleep(0.01)


@dataclass(frozen=True)
class World:
    """Processes of one start: joined by MPI, or bare ones, which share the work by claims alone."""

    name: str
    size: int

    def start(self, root: Path) -> list[subprocess.Popen[bytes]]:
        if self.name == "mpiexec":
            processes = [start(self.size, root)]
            wait_until_joined(self.size, root)
            return processes
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
        run_to_the_end(2, run_dir.root)
    return found


def run_to_the_end(size: int, root: Path) -> None:
    process = start(size, root)
    wait_until_joined(size, root)
    assert process.wait(timeout=200) == 0


def assert_nothing_lost_or_repeated(run_dir: RunDir, quiet: RunDir) -> None:
    assert manifest(run_dir)["units"] == manifest(quiet)["units"]
    assert manifest(run_dir)["sha256"] == manifest(quiet)["sha256"]
    assert usage_done(run_dir) == usage_done(quiet)


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


def test_bare_processes_finish_what_a_killed_one_has_begun(quiet: RunDir, tmp_path: Path) -> None:
    """As without MPI on a cluster: one dies alone, and its peers need no restart."""
    run_dir = make_run(tmp_path / "run")
    victim, *others = World("bare", 3).start(run_dir.root)
    deadline = time.monotonic() + 60
    while not (cut := [name for name in begun(run_dir) if f"-{victim.pid}-" in name]):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    victim.kill()
    victim.wait(timeout=60)
    assert begun(run_dir).intersection(cut), "it was killed between two units"
    assert [one.poll() for one in others] == [None, None]
    assert [one.wait(timeout=120) for one in others] == [0, 0]
    assert_nothing_lost_or_repeated(run_dir, quiet)
    assert expert_calls(run_dir)[1] <= UNIT_SIZE


@pytest.mark.chaos
def test_many_kills(tmp_path: Path) -> None:
    changes = {"seeds": {"limit": 150}, "generate": {"num_trajectories": 6}}
    calm = make_run(tmp_path / "calm", **changes)
    done = run_ranks(2, "-m", "teams_hpc", "stage", "generate", str(calm.root))
    assert done.returncode == 0, done.stderr
    assert joined(2) in done.stderr
    run_dir = make_run(tmp_path / "run", **changes)
    found = chaos(run_dir, kills=25, seed=2)
    assert found.num_cut >= 20
    assert found.worlds == set(WORLDS)
    assert_nothing_lost_or_repeated(run_dir, calm)
    assert_few_in_doubt(run_dir, found)


def test_a_stop_of_one_rank_stops_all_at_a_safe_point(quiet: RunDir, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    process = start(4, run_dir.root)
    wait_until_joined(4, run_dir.root)
    deadline = time.monotonic() + 60
    while not has_begun(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ranks_of(run_dir.root)[-1], signal.SIGUSR2)
    assert process.wait(timeout=60) == 144
    assert not run_dir.manifest("generate").exists()
    run_to_the_end(3, run_dir.root)
    assert_nothing_lost_or_repeated(run_dir, quiet)
    assert expert_calls(run_dir)[1] == 0  # nothing in doubt: it was safe


def test_one_failing_rank_ends_the_step_and_says_why(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", budget={"max_expert_calls": 40})
    done = run_ranks(2, "-m", "teams_hpc", "stage", "generate", str(run_dir.root))
    assert done.returncode == 1
    assert joined(2) in done.stderr
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
        assert (joined(size) in done.stderr) == (size > 1)
        assert manifest(run_dir)["exactness"] == "exact"
        found.append(manifest(run_dir)["units"])
    assert found[0] == found[1]


def test_ranks_that_another_step_was_faster_than_end_together(tmp_path: Path) -> None:
    """One finds the manifest there, the other looked a moment earlier: neither waits for ever."""
    run_dir = make_run(tmp_path / "run")
    code = (
        """
from teams_hpc.generation import worker
from teams_hpc.runtime.ranks import read_ranks
look, looks = worker.read_manifest, []
def read(run_dir, stage):
    looks.append(stage)
    return {} if read_ranks().rank == 1 and len(looks) == 1 else look(run_dir, stage)
worker.read_manifest = read
"""
        + SLOW
    )
    done = run_ranks(2, "-c", code, str(run_dir.root), timeout=60)
    assert done.returncode == 0, done.stderr
    assert "MPI joined 2 processes" in done.stderr
    assert run_dir.manifest("generate").exists()
