"""The brake on expert calls: a unit is begun only if its worst case still fits."""

from dataclasses import dataclass, field
from pathlib import Path

from teams_hpc.errors import WorkError
from teams_hpc.generation.published import is_published, unit_number
from teams_hpc.generation.usage import UnitUsage
from teams_hpc.llm.ledger import Ledger
from teams_hpc.storage.atomic import read_json, remove_leftovers, write_json
from teams_hpc.storage.lease import Lease
from teams_hpc.storage.run_dir import RunDir

_MUTEX_WAIT_S = 60.0


@dataclass(slots=True)
class Budget:
    """Reservations of expert calls, shared by all workers of a run.

    Spent is what is durable or in doubt; reserved is what units being worked on may still ask for.
    Their sum never exceeds the limit, because every reservation is made under one mutex, by who
    holds the unit's claim.

    Args:
        run_dir: The run.
        limit: `budget.max_expert_calls`; None for no limit.
        lease_s: For the mutex.

    Attributes:
        room: What was left for others at the last refusal; None if there was none yet.
        has_released: A refusal ended the reservation of a worker that is gone: others may fit now.
    """

    run_dir: RunDir
    limit: int | None
    lease_s: float
    room: int | None = None
    has_released: bool = False
    _usage: UnitUsage = field(init=False)

    def __post_init__(self) -> None:
        self._usage = UnitUsage(self.run_dir)

    @property
    def _folder(self) -> Path:
        return self.run_dir.generate / "reservations"

    def _path(self, unit: int) -> Path:
        return self._folder / f"unit-{unit:05d}.json"

    def reserve(self, unit: int, num_calls: int) -> bool:
        """Reserve what a unit may still ask for; False if it doesn't fit now.

        The caller holds the unit's claim, so a reservation that is there is of a dead worker.

        Raises:
            WorkError: The mutex could not be had.
        """
        if self.limit is None:
            return True
        wait_s = _MUTEX_WAIT_S + 2 * self.lease_s
        with Lease(self.run_dir.leases / "budget", self.lease_s) as mutex:
            if not mutex.acquire_within(wait_s):
                raise WorkError(f"{mutex.path} has been held for {wait_s:.0f} s; try again")
            # Reservations first: what is used of one in between counts twice, never not at all.
            until = self._reservations(unit)
            usage = self._usage.read()
            unused = (end - _calls(usage.get(other)) for other, end in until.items())
            committed = _total(usage) + sum(max(0, calls) for calls in unused)
            if committed + num_calls > self.limit:
                self.room = self.limit - committed
                self.has_released |= self.has_trace(unit)
                self.give_back(unit)
                return False
            if not mutex.is_held():  # stood still for so long that others have counted meanwhile
                return self.reserve(unit, num_calls)
            write_json(self._path(unit), {"until": _calls(usage.get(unit)) + num_calls})
        return True

    def has_trace(self, unit: int) -> bool:
        """Whether there is a reservation for the unit."""
        return self._path(unit).exists()

    def give_back(self, unit: int) -> None:
        """End a unit's reservation: it is published, or its worker stops."""
        self._path(unit).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what killed workers left behind; all units are published."""
        for path in self._folder.glob("unit-*.json"):
            path.unlink(missing_ok=True)
        remove_leftovers(self._folder)

    def spent(self) -> int:
        """Expert calls that were or may have been made."""
        return _total(self._usage.read())

    def _reservations(self, unit: int) -> dict[int, int]:
        """Up to how many calls each unit but this one may spend."""
        until = {}
        for path in self._folder.glob("unit-*.json"):
            other = unit_number(path)
            if other == unit or is_published(self.run_dir, other):
                continue
            try:
                until[other] = int(read_json(path)["until"])
            except FileNotFoundError:  # given back just now
                continue
        return until


def _total(usage: dict[int, Ledger]) -> int:
    return sum(_calls(ledger) for ledger in usage.values())


def _calls(ledger: Ledger | None) -> int:
    if ledger is None:
        return 0
    total = ledger.total("expert")
    return total.calls + total.in_doubt
