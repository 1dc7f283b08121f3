"""What the processes of a step share: each number once, notes, a wish to stop; and how they end."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpi.launch import environment, mpiexec, run_ranks
from teams_hpc.errors import UsageError
from teams_hpc.runtime.ranks import Ranks
from teams_hpc.runtime.step import SoloStep, joined_step

SHARE = """
import sys, time
from pathlib import Path
from teams_hpc.runtime.ranks import read_ranks
from teams_hpc.runtime.step import joined_step
folder = Path(sys.argv[1])
with joined_step(read_ranks(), needs_mpi=True) as step:
    step.show(100 + step.rank)
    deadline = time.monotonic() + 30
    while step.rank == 0 and len(list(folder.iterdir())) < step.size - 1:
        assert time.monotonic() < deadline, "nobody draws while rank 0 is asleep"
        time.sleep(0.1)  # it calls nothing of MPI: rank 0 is no dispatcher
    drawn = [step.take_number() for _ in range(50)]
    (folder / str(step.rank)).touch()
    if step.rank == 1:
        step.write_note(3, 77)
        step.ask_to_stop()
    while not (step.is_asked_to_stop() and step.read_note(3) == 77 and 0 not in step.shown()):
        time.sleep(0.01)
    line = f"{step.rank}/{step.size} {sorted(step.shown())} {drawn}".replace(", ", ",")
sys.stdout.write(line + "\\n")
"""


@pytest.mark.parametrize("size", [2, 4])
def test_numbers_are_drawn_once_and_notes_are_seen(size: int, tmp_path: Path) -> None:
    done = run_ranks(size, "-c", SHARE, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ") for line in done.stdout.splitlines()]
    assert sorted(line[0] for line in lines) == [f"{rank}/{size}" for rank in range(size)]
    assert {line[1] for line in lines} == {str([*range(100, 100 + size)]).replace(", ", ",")}
    drawn = {line[0]: [int(n) for n in line[2].strip("[]").split(",")] for line in lines}
    assert sorted(n for own in drawn.values() for n in own) == [*range(50 * size)]
    # Rank 0 slept until the others had drawn all of theirs.
    assert drawn[f"0/{size}"] == [*range(50 * (size - 1), 50 * size)]


def test_processes_that_were_not_joined_are_refused() -> None:
    """Each alone in a world of its own, as after a wrong --mpi: said, not worked through twice."""
    lonely = (
        "from teams_hpc.runtime.ranks import Ranks\n"
        "from teams_hpc.runtime.step import joined_step\n"
        "with joined_step(Ranks(rank=0, world_size=2), needs_mpi=True): pass\n"
    )
    done = subprocess.run(
        (sys.executable, "-c", lonely),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "MPI joined 1 of the 2 processes" in done.stderr


def test_without_a_launcher_a_process_is_a_step_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined_step(Ranks(), needs_mpi=True) as step:
        assert isinstance(step, SoloStep)
        assert [step.take_number() for _ in range(3)] == [0, 1, 2]
    with joined_step(Ranks(rank=1, world_size=3), needs_mpi=False) as step:
        assert step.size == 1  # srun --mpi=none: claims alone divide the work


def test_mpi4py_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with (
        pytest.raises(UsageError, match="extra 'mpi'"),
        joined_step(Ranks(world_size=2), needs_mpi=True),
    ):
        pass


def test_an_mpi_without_shared_memory_between_nodes_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Open MPI 4 over plain Ethernet."""

    class Refused(Exception):
        pass

    class World:
        size, rank = 2, 0

        def Dup(self) -> "World":
            return self

    class Window:
        @staticmethod
        def Allocate(*_: object, **__: object) -> None:
            raise Refused("MPI_ERR_WIN: invalid window")

    double = SimpleNamespace(COMM_WORLD=World(), Win=Window, Exception=Refused)
    monkeypatch.setattr("teams_hpc.runtime.step._initialised_mpi", lambda: double)
    with (
        pytest.raises(UsageError, match=r"MPI_ERR_WIN.*OMPI_MCA_osc=ucx"),
        joined_step(Ranks(world_size=2), needs_mpi=True),
    ):
        pass


def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from teams_hpc.runtime.preemption import die_with_launcher\n"
        "die_with_launcher()\n"
        "Path(sys.argv[1], str(os.getpid())).touch()\n"
        "time.sleep(120)\n"
    )
    launcher = subprocess.Popen(
        (*mpiexec(2), sys.executable, "-c", script, str(tmp_path)), env=environment()
    )
    deadline = time.monotonic() + 60
    while len(pids := [int(path.name) for path in tmp_path.iterdir()]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 2
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "ranks outlived mpiexec"
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
