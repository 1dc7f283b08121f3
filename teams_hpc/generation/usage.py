"""What generation has asked for so far: units that are done, and journals of those in progress."""

from collections import defaultdict
from dataclasses import dataclass, field

from teams_hpc.generation.published import PublishedUnits
from teams_hpc.generation.unit_log import journal_usage
from teams_hpc.llm.ledger import Ledger
from teams_hpc.storage.journal import Journal, journal_paths, read_journal, unit_of
from teams_hpc.storage.retry_folder import read_retry_plan
from teams_hpc.storage.run_dir import RunDir

_NO_UNIT = -1


@dataclass(slots=True)
class UnitUsage:
    """Usage of every unit.

    A finished unit carries the usage of the journals it names. A journal it does not name was
    written by a process that had lost its claim and did not know it yet: paid for all the same.
    In a retry these are of the first attempt, remembered by its plan, and of units in progress.
    """

    run_dir: RunDir
    published: PublishedUnits = field(init=False)

    def __post_init__(self) -> None:
        self.published = PublishedUnits(self.run_dir)

    def read(self) -> dict[int, Ledger]:
        """Ledger of every unit that was begun."""
        # Journals first: one that vanishes meanwhile belongs to a unit that is finished by then.
        journals: dict[int, list[Journal]] = defaultdict(list)
        for path in journal_paths(self.run_dir.journal):
            journals[unit_of(path)].append(read_journal(path))
        found: dict[int, Ledger] = {}
        published = self.published.attrs(self.published.units())
        for unit, attrs in published.items():
            found[unit] = Ledger.from_json(attrs["usage"])
            late = [one for one in journals.pop(unit, []) if one.path.name not in attrs["journals"]]
            found[unit].merge(journal_usage(late))
        found.update((unit, journal_usage(group)) for unit, group in journals.items())
        retry = read_retry_plan(self.run_dir)
        if retry is not None:
            found[_NO_UNIT] = Ledger.from_json(retry["usage_of_no_unit"])
        return found


def generation_usage(run_dir: RunDir, published: PublishedUnits | None = None) -> Ledger:
    """All calls of the stage so far, done and in doubt.

    Args:
        run_dir: The run.
        published: What was read of its units before, if anything.
    """
    usage = UnitUsage(run_dir)
    if published is not None:
        usage.published = published
    total = Ledger()
    for ledger in usage.read().values():
        total.merge(ledger)
    return total
