"""What generation has asked for so far: units that are done, and journals of those in progress."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from teams_hpc.generation.unit_log import journal_usage
from teams_hpc.llm.ledger import Ledger
from teams_hpc.storage.journal import Journal, journal_paths, read_journal, unit_of
from teams_hpc.storage.run_dir import RunDir
from teams_hpc.storage.shards import Table


def unit_number(path: Path) -> int:
    """The unit a shard is of, from its name."""
    return int(path.stem.removeprefix("unit-"))


@dataclass(slots=True)
class UnitUsage:
    """Usage of every unit, remembering finished ones, which never change.

    A finished unit carries the usage of the journals it names. A journal it does not name was
    written by a process that had lost its claim and did not know it yet: paid for all the same.
    """

    run_dir: RunDir
    _finished: dict[int, tuple[Ledger, frozenset[str]]] = field(default_factory=dict)

    def read(self) -> dict[int, Ledger]:
        """Ledger of every unit that was begun."""
        # Journals first: one that vanishes meanwhile belongs to a unit that is finished by then.
        journals: dict[int, list[Journal]] = defaultdict(list)
        for path in journal_paths(self.run_dir.journal):
            journals[unit_of(path)].append(read_journal(path))
        found: dict[int, Ledger] = {}
        for path in sorted(self.run_dir.shards.glob("unit-*.h5")):
            unit = unit_number(path)
            ledger, counted = self._finished_unit(unit, path)
            found[unit] = Ledger()
            found[unit].merge(ledger)
            late = [one for one in journals.pop(unit, []) if one.path.name not in counted]
            found[unit].merge(journal_usage(late))
        found.update((unit, journal_usage(group)) for unit, group in journals.items())
        return found

    def _finished_unit(self, unit: int, path: Path) -> tuple[Ledger, frozenset[str]]:
        if unit not in self._finished:
            with Table.open(path) as table:
                ledger = Ledger.from_json(table.attrs["usage"])
                self._finished[unit] = ledger, frozenset(table.attrs["journals"])
        return self._finished[unit]


def generation_usage(run_dir: RunDir) -> Ledger:
    """All calls of the stage so far, done and in doubt."""
    total = Ledger()
    for ledger in UnitUsage(run_dir).read().values():
        total.merge(ledger)
    return total
