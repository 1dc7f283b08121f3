"""Child processes: restarts, failures, stopping, and no orphans."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from teams_hpc.errors import StopRequested, WorkError
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.runtime.processes import Task, TaskGroup


def python_task(tmp_path: Path, name: str, code: str, *words: str) -> Task:
    return Task(name=name, argv=(sys.executable, "-c", code, *words), log=tmp_path / f"{name}.log")


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def wait_until(condition: object, timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.05)
    return False


def test_all_tasks_run_and_no_more_than_allowed_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; here = pathlib.Path(sys.argv[1]); "
        "(here / f'{sys.argv[2]}.on').touch(); n = len(list(here.glob('*.on'))); "
        "(here / f'{sys.argv[2]}.saw').write_text(str(n)); time.sleep(0.3); "
        "(here / f'{sys.argv[2]}.on').unlink()"
    )
    tasks = [python_task(tmp_path, f"t{i}", code, str(tmp_path), str(i)) for i in range(5)]
    TaskGroup(tasks=tasks, num_parallel=2).run(StopFlag())
    saw = [int(path.read_text()) for path in tmp_path.glob("*.saw")]
    assert len(saw) == 5
    assert max(saw) <= 2


def test_a_killed_task_is_started_again(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal, pathlib; first = pathlib.Path(sys.argv[1]); "
        "first.exists() or (first.touch(), os.kill(os.getpid(), signal.SIGKILL))"
    )
    group = TaskGroup(
        tasks=[python_task(tmp_path, "t", code, str(tmp_path / "first"))], num_parallel=1
    )
    group.run(StopFlag())
    assert group.num_restarts == 1


def test_restarts_without_progress_end(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    group = TaskGroup(tasks=[python_task(tmp_path, "t", code)], num_parallel=1, max_restarts=2)
    with pytest.raises(WorkError, match=r"SIGKILL and restarted 2 times without progress"):
        group.run(StopFlag())


def test_one_failure_ends_the_others_and_is_explained(tmp_path: Path) -> None:
    sleeper = python_task(
        tmp_path, "sleeper", "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
    )
    failing = python_task(tmp_path, "failing", "import time, sys; time.sleep(0.5); sys.exit(1)")
    group = TaskGroup(
        tasks=[sleeper, failing], num_parallel=2, explain=lambda task: f"why {task.name}"
    )
    with pytest.raises(WorkError, match="failing failed with exit code 1: why failing"):
        group.run(StopFlag())
    assert not is_alive(int(sleeper.log.read_text()))


def test_stopping_lets_children_reach_a_safe_point(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time, pathlib\n"
        "def stop(*_):\n    time.sleep(0.3); pathlib.Path(sys.argv[1]).touch(); sys.exit(144)\n"
        "signal.signal(signal.SIGTERM, stop); print('up', flush=True); time.sleep(60)"
    )
    task = python_task(tmp_path, "t", code, str(tmp_path / "saved"))
    stop = StopFlag()
    log = task.log

    def stop_once_up() -> None:
        if log.exists() and "up" in log.read_text():
            stop.reason = "SIGTERM"

    with pytest.raises(StopRequested, match="SIGTERM"):
        TaskGroup(tasks=[task], num_parallel=1, on_tick=stop_once_up).run(stop)
    assert (tmp_path / "saved").exists()


def test_killing_the_parent_leaves_no_child(tmp_path: Path) -> None:
    child = (
        "import os, time; from teams_hpc.runtime.preemption import die_with_parent; "
        "die_with_parent(); print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = (
        "import sys; from pathlib import Path\n"
        "from teams_hpc.runtime.preemption import StopFlag\n"
        "from teams_hpc.runtime.processes import Task, TaskGroup\n"
        "task = Task(name='t', argv=(sys.executable, '-c', sys.argv[1]), log=Path(sys.argv[2]))\n"
        "TaskGroup(tasks=[task], num_parallel=1).run(StopFlag())"
    )
    log = tmp_path / "t.log"
    with subprocess.Popen((sys.executable, "-c", parent, child, str(log))) as process:
        assert wait_until(lambda: log.exists() and log.read_text().strip())
        pid = int(log.read_text())
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
        assert wait_until(lambda: not is_alive(pid), 2.0)
