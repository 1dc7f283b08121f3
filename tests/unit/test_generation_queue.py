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
        self.publishing: dict[int, Claim] = {}

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

    def take(self, number: int, *, looks_anew: bool = False) -> Claim | Outlook:
        found = self.queues[number].take(lambda: None, looks_anew=looks_anew)
        if isinstance(found, Claim):
            assert found.unit not in self.published
            assert found.is_held()
            claims = (*self.working.values(), *self.publishing.values())
            assert found.unit not in {claim.unit for claim in claims if claim.is_held()}
            self.working[number] = found
        return found

    def publish(self, number: int) -> None:
        """Begin to publish what was run; what was begun before is published by then."""
        self.await_publishing(number)
        self.publishing[number] = self.working.pop(number)
        self.queues[number].publishing = self.publishing[number].unit

    def await_publishing(self, number: int) -> bool:
        self.queues[number].publishing = None
        if (claim := self.publishing.pop(number, None)) is None:
            return False
        if claim.is_held():
            self.published.add(claim.unit)
        return True

    def stop(self, number: int) -> None:
        """Give all claims back once all is published, and start anew."""
        self.working.pop(number, None)
        self.await_publishing(number)
        self.queues[number].close()
        self.queues[number] = self._queue(number)

    def die(self, number: int) -> None:
        """Leave all claims behind, as of a process that is gone, and start anew."""
        self.working.pop(number, None)
        self.publishing.pop(number, None)
        self.seem_dead(number)
        self.queues[number] = self._queue(number)

    def seem_dead(self, number: int) -> None:
        """Leave the claims to whoever wants them, and know nothing of it."""
        for lease in self.queues[number]._held.values():
            if lease.is_held():
                content = json.loads(lease.path.read_text())
                content["holder"]["process_start"] = "long ago"
                lease._stop.set()
                lease.path.write_text(json.dumps(content))


moves = st.lists(
    st.tuples(
        st.integers(0, NUM_STEPS - 1),
        st.sampled_from(["work", "work", "work", "stop", "die", "seem dead"]),
    ),
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
        elif move == "seem dead":
            run.seem_dead(number)
        elif number in run.working:
            run.publish(number)
        else:
            run.take(number)
    for number in range(NUM_STEPS):
        run.die(number)
    was_published = False
    while (found := run.take(0, looks_anew=was_published)) is not Outlook.DONE:
        was_published = not isinstance(found, Claim)
        if isinstance(found, Claim):
            run.publish(0)
        else:  # nobody else is left: there is nothing else to wait for
            assert run.await_publishing(0)
    assert run.published == set(range(num_units))


def test_a_sleeper_takes_no_more_of_a_block_that_another_step_has_taken_over(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, 200)
    first = run.take(0)
    assert isinstance(first, Claim)
    run.seem_dead(0)
    run.queues[1].first = 0
    other = run.take(1)
    assert isinstance(other, Claim)
    assert other.path == first.path
    assert not first.is_held()
    found = run.take(0)
    assert isinstance(found, Claim)
    assert found.path != first.path
    assert other.is_held()


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
    assert run.take(2) is Outlook.BUSY
    run.await_publishing(2)
    assert run.take(1) is Outlook.DONE


class ThreeSteps(SoloStep):
    """One process of a step of three: what the other two show is given."""

    def __init__(self, others: list[int]) -> None:
        super().__init__()
        self.others = others

    def shown(self) -> list[int]:
        return [*super().shown(), *self.others]


def test_a_block_is_kept_while_any_process_of_the_step_publishes_a_unit_of_it(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, 3)
    run.published = {0}
    queue, other = run.queues[0], run.queues[1]
    other.publishing = 1
    other._show(0)  # it looks for its next unit by now
    queue.step = ThreeSteps([other.step.shown()[0], 0])
    assert isinstance(claim := queue.take(lambda: None), Claim)
    assert claim.unit == 1
    run.published = {0, 2}
    assert queue.take(lambda: None) is Outlook.BUSY
    assert claim.is_held()
    queue.step.others = [0, 0]
    queue.take(lambda: None)
    run.published = {0, 1, 2}
    assert queue.take(lambda: None) is Outlook.DONE
    assert not claim.is_held()
