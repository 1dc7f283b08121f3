"""What a task says of its own progress: a rate that leaves out what was done before."""

import json
from pathlib import Path

import pytest

from teams_hpc.runtime import metrics
from teams_hpc.runtime.metrics import Progress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def rate(path: Path) -> float:
    return float(json.loads(path.read_text())["rate_per_s"])


def test_the_first_piece_of_work_has_a_rate(tmp_path: Path, clock: Clock) -> None:
    progress = Progress(tmp_path / "a", unit="rows")
    clock.now += 50  # loading a model
    progress.begin(10)
    clock.now += 4
    progress.update(30, 70)
    assert rate(progress.path) == 20 / 4
    clock.now += 4
    progress.update(70, 70)
    assert rate(progress.path) == 60 / 8


def test_who_has_measured_nothing_leaves_the_rate_of_others(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "a"
    new = Progress(path, unit="rows")
    new.update(30, 70)
    assert rate(path) == 0
    clock.now += 2
    new.update(40, 70)
    assert rate(path) == 5
    late = Progress(path, unit="rows")
    for _ in range(2):
        late.update(50, 70)
        assert rate(path) == 5
        clock.now += 5
    late.update(70, 70)
    assert rate(path) == 2
