"""Claims of blocks of units: whatever steps do, each unit is made, and by one of them at a time."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teams_hpc.generation.queue import Claim, Outlook, UnitQueue, block_size
from teams_hpc.runtime.step import SoloStep

NUM_STEPS = 3


class Run:
    """Steps of one process each that work on units of one folder."""

    def __init__(self, folder: Path, num_units: int) -> None:
        self.folder, self.num_units = folder, num_units
        self.published: set[int] = set()
        self.queues = [self._queue(number) for number in range(NUM_STEPS)]
        self.working: dict[int, Claim] = {}

    def _queue(self, number: int) -> UnitQueue:
        return UnitQueue(
            step=SoloStep(),
            num_units=self.num_units,
            first=number * self.num_units // NUM_STEPS,
            leases=self.folder,
            lease_s=3600.0,
            published=lambda: set(self.published),
            is_published=lambda unit: unit in self.published,
            fits=lambda unit: True,
        )

    def take(self, number: int) -> Claim | Outlook:
        found = self.queues[number].take(lambda: None)
        if isinstance(found, Claim):
            assert found.unit not in self.published
            assert found.unit not in {claim.unit for claim in self.working.values()}
            self.working[number] = found
        return found

    def publish(self, number: int) -> None:
        claim = self.working.pop(number)
        assert claim.is_held()
        self.published.add(claim.unit)

    def stop(self, number: int) -> None:
        """Give all claims back, and start anew."""
        self.working.pop(number, None)
        self.queues[number].close()
        self.queues[number] = self._queue(number)

    def die(self, number: int) -> None:
        """Leave all claims behind, as of a process that is gone, and start anew."""
        self.working.pop(number, None)
        for lease in self.queues[number]._held.values():
            content = json.loads(lease.path.read_text())
            content["holder"]["process_start"] = "long ago"
            lease._stop.set()
            lease.path.write_text(json.dumps(content))
        self.queues[number] = self._queue(number)


moves = st.lists(
    st.tuples(st.integers(0, NUM_STEPS - 1), st.sampled_from(["work", "work", "stop", "die"])),
    max_size=40,
)


@settings(max_examples=30, deadline=None)
@given(moves=moves, num_units=st.sampled_from([1, 5, 130, 200]))
def test_every_unit_is_made_by_one_step_at_a_time(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, str]], num_units: int
) -> None:
    run = Run(tmp_path_factory.mktemp("claims"), num_units)
    for number, move in moves:
        if move == "stop":
            run.stop(number)
        elif move == "die":
            run.die(number)
        elif number in run.working:
            run.publish(number)
        else:
            run.take(number)
    for number in range(NUM_STEPS):
        run.die(number)
    while (found := run.take(0)) is not Outlook.DONE:
        assert isinstance(found, Claim)  # nobody else is left: nothing to wait for
        run.publish(0)
    assert run.published == set(range(num_units))


@given(num_units=st.integers(1, 10**6))
def test_blocks_are_small_enough_to_share_and_large_enough_to_be_few(num_units: int) -> None:
    size = block_size(num_units)
    assert 1 <= size <= 16
    assert size == 1 or num_units // size >= 64


def test_a_step_waits_for_another_s_block_and_says_when_nothing_fits(tmp_path: Path) -> None:
    run = Run(tmp_path, 1)
    assert isinstance(run.take(0), Claim)
    assert run.take(1) is Outlook.BUSY
    run.stop(0)
    run.queues[1].fits = lambda unit: False
    assert run.take(1) is Outlook.TOO_DEAR
    assert isinstance(run.take(2), Claim)
    run.publish(2)
    assert run.take(1) is Outlook.DONE
