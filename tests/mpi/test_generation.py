"""Generation under MPI: the same rows for any number of ranks; a dying rank; a stop; a failure."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mpi.launch import environment, expert_calls, make_run, manifest, mpiexec, run_ranks
from teams_hpc.storage.run_dir import RunDir

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


def has_begun(run_dir: RunDir) -> bool:
    return any(path.stat().st_size > 300 for path in run_dir.journal.glob("*.wal"))


def kill_once(process: subprocess.Popen[bytes], run_dir: RunDir, after_s: float) -> bool:
    """Kill one rank or the whole job -9 a while after work has begun; did it land inside?"""
    deadline = time.monotonic() + 60
    while process.poll() is None and not has_begun(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(after_s)
    victims = ranks_of(run_dir.root)
    if process.poll() is not None or not victims or run_dir.manifest("generate").exists():
        process.wait(timeout=60)
        return False
    whole_job = [process.pid, *victims]
    for pid in random.choice((whole_job, [random.choice(victims)])):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=60)
    while ranks_of(run_dir.root):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return True


def chaos(run_dir: RunDir, kills: int, seed: int) -> int:
    """Kill again and again, with another number of ranks each time; how many kills landed."""
    random.seed(seed)
    landed = 0
    for _ in range(3 * kills):
        process = start(random.choice((1, 2, 4)), run_dir.root)
        landed += kill_once(process, run_dir, random.uniform(0, 0.6))
        if landed == kills or run_dir.manifest("generate").exists():
            break
    if not run_dir.manifest("generate").exists():
        assert start(2, run_dir.root).wait(timeout=200) == 0
    return landed


def assert_nothing_lost_or_repeated(run_dir: RunDir, quiet: RunDir) -> None:
    assert manifest(run_dir)["units"] == manifest(quiet)["units"]
    assert expert_calls(run_dir)[0] == expert_calls(quiet)[0]


def test_killed_ranks_cost_nothing_durable(quiet: RunDir, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    assert chaos(run_dir, kills=4, seed=1) == 4
    assert_nothing_lost_or_repeated(run_dir, quiet)


@pytest.mark.chaos
def test_many_kills(tmp_path: Path) -> None:
    changes = {"seeds": {"limit": 150}, "generate": {"num_trajectories": 6}}
    calm = make_run(tmp_path / "calm", **changes)
    assert run_ranks(2, "-m", "teams_hpc", "stage", "generate", str(calm.root)).returncode == 0
    run_dir = make_run(tmp_path / "run", **changes)
    assert chaos(run_dir, kills=25, seed=2) >= 20
    assert_nothing_lost_or_repeated(run_dir, calm)


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
    calls = run_ranks(2, "-m", "teams_hpc", "status", str(run_dir.root), "--json")
    assert calls.returncode == 0


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
