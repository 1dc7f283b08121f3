"""Which unit comes next: steps claim blocks of units, processes of a step share a block.

Processes draw numbers, and number n is the n-th place of the blocks that their step has claimed so
far, one after another. Who draws the first place of a block claims it, by a lease, and notes which
it is; the others read the note. The lease bears the step's name and the turn, so they know it from
one that somebody has taken since. A block is let go when nobody of the step works in it any more.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from teams_hpc.runtime.step import Step
from teams_hpc.storage.lease import Holder, Lease, read_holder

_POLL_S = 0.05
_SHOWN_BITS = 32
_CHOOSING = (1 << _SHOWN_BITS) - 1
_TURN_SHIFT = 32
_BLOCKS_OF_A_RUN = 64
_LARGEST_BLOCK = 16


class Outlook(IntEnum):
    """Why there is no unit now."""

    DONE = 1
    BUSY = 2
    TOO_DEAR = 3


_FIRST_BLOCK = len(Outlook) + 1


def block_size(num_units: int) -> int:
    """Units of a block: the same for everybody, small enough for many steps to share a run."""
    return max(1, min(_LARGEST_BLOCK, num_units // _BLOCKS_OF_A_RUN))


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The right to work on a unit, as long as its block's lease has not changed hands."""

    unit: int
    path: Path
    holder: Holder

    def is_held(self) -> bool:
        found = read_holder(self.path)
        return found is not None and found[0] == self.holder


@dataclass(slots=True, kw_only=True)
class UnitQueue:
    """Hands out units that are not published yet.

    Args:
        step: The processes that share blocks.
        num_units: Units of the plan.
        first: Unit to start looking at: steps that start apart meet late.
        leases: Folder of the leases.
        lease_s: See `Lease`.
        published: Units that have their file.
        is_published: Whether one has.
        fits: Whether a unit may fit into the budget, as far as is known.

    Attributes:
        publishing: A unit that this process has run and that is being published while it takes the
            next one; its block isn't let go.
    """

    step: Step
    num_units: int
    first: int
    leases: Path
    lease_s: float
    published: Callable[[], set[int]]
    is_published: Callable[[int], bool]
    fits: Callable[[int], bool]
    publishing: int | None = None
    _free: dict[int, Lease] = field(default_factory=dict)
    _held: dict[int, Lease] = field(default_factory=dict)

    @property
    def _size(self) -> int:
        return block_size(self.num_units)

    def take(self, check_stop: Callable[[], None], *, looks_anew: bool = False) -> Claim | Outlook:
        """The next unit of this step, or why there is none at the moment.

        Args:
            check_stop: Called while waiting for another process of this step.
            looks_anew: Something has changed since others were found busy: don't take a note's word
                for it.
        """
        while True:
            self._show(_CHOOSING)
            turn, place = divmod(self.step.take_number(), self._size)
            if place == 0:
                self._note(turn, self._claim_block(turn))
            found = self._read_note(turn, check_stop)
            if found is Outlook.BUSY and looks_anew and place:
                continue
            if isinstance(found, Outlook):
                self._show(0)
                return found
            self._show(found + 1)
            claim = self._claim_of(found, place, turn)
            if claim is not None:
                return claim

    def _show(self, at: int) -> None:
        """Let the others see where this process is: choosing, nowhere (0), or in a block (+ 1)."""
        self.step.show(self._publishing_in << _SHOWN_BITS | at)

    @property
    def _publishing_in(self) -> int:
        return 0 if self.publishing is None else self.publishing // self._size + 1

    def _note(self, turn: int, found: int | Outlook) -> None:
        """Say which block the turn is about, or why none; an old note is told by its turn."""
        code = int(found) if isinstance(found, Outlook) else found + _FIRST_BLOCK
        self.step.write_note(turn, (turn + 1) << _TURN_SHIFT | code)

    def _read_note(self, turn: int, check_stop: Callable[[], None]) -> int | Outlook:
        while (note := self.step.read_note(turn)) >> _TURN_SHIFT < turn + 1:
            check_stop()
            time.sleep(_POLL_S)
        code = note & ((1 << _TURN_SHIFT) - 1)
        if note >> _TURN_SHIFT > turn + 1:  # slept so long that others have come round
            return Outlook.BUSY
        return Outlook(code) if code < _FIRST_BLOCK else code - _FIRST_BLOCK

    def _token(self, turn: int) -> str:
        """What the whole step knows the lease by that was taken in this turn."""
        return f"{self.step.name}-{turn}"

    def _claim_of(self, block: int, place: int, turn: int) -> Claim | None:
        unit = block * self._size + place
        path = self._path(block)
        found = read_holder(path)
        if found is None or found[0].token != self._token(turn):  # lost while this process slept
            return None
        if unit >= self.num_units or self.is_published(unit):
            return None
        return Claim(unit=unit, path=path, holder=found[0])

    def _path(self, block: int) -> Path:
        return self.leases / f"block-{block:05d}"

    def _units_of(self, block: int) -> range:
        first = block * self._size
        return range(first, min(first + self._size, self.num_units))

    def _blocks(self) -> Iterator[int]:
        count = -(-self.num_units // self._size)
        start = self.first // self._size
        return ((start + offset) % count for offset in range(count))

    def _claim_block(self, turn: int) -> int | Outlook:
        """Claim a block that has work left, if there is one."""
        self._let_go()
        published = self.published()
        outlook = Outlook.DONE
        for block in self._blocks():
            left = [unit for unit in self._units_of(block) if unit not in published]
            if not left:
                continue
            if block in self._held:
                outlook = Outlook.BUSY  # others of this step are still at it
            elif not any(self.fits(unit) for unit in left):
                outlook = Outlook.BUSY if outlook is Outlook.BUSY else Outlook.TOO_DEAR
            elif self._lease_of(block).acquire(self._token(turn)):
                self._held[block] = self._free.pop(block)
                return block
            else:
                outlook = Outlook.BUSY
        return outlook

    def _lease_of(self, block: int) -> Lease:
        """Kept between tries: a lease remembers since when a foreign holder is silent."""
        return self._free.setdefault(block, Lease(self._path(block), self.lease_s))

    def _let_go(self) -> None:
        """Give back the blocks in which nobody of this step works any more.

        Their places have all been drawn, since this process has just drawn a later one.
        """
        words = self.step.shown()
        del words[self.step.rank]
        at = {word & _CHOOSING for word in words}
        if _CHOOSING in at:  # may be about to begin in any of them
            return
        busy = {self._publishing_in, *at, *(word >> _SHOWN_BITS for word in words)}
        for block in list(self._held):
            if block + 1 not in busy:
                self._held.pop(block).release()

    def close(self) -> None:
        """Give all claims back; nobody of this step works on them any more."""
        for lease in self._held.values():
            lease.release()
        self._held.clear()
