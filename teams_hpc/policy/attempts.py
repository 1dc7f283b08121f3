"""Notes of work begun, so that calls whose results a kill took away are counted as in doubt."""

from pathlib import Path

from teams_hpc.llm.ledger import Ledger
from teams_hpc.storage.atomic import read_json, write_json


def begin_attempt(path: Path, what: str, most_calls: Ledger) -> Ledger:
    """Note durably that `what` begins and may send `most_calls` before its result is durable.

    A note of the same `what` that is there already means that an attempt died: whether its calls
    were made is not known, so the bound counts. A note of anything else is of work that was done.

    Args:
        path: The note; one piece of work at a time has it.
        what: Names the work.
        most_calls: Calls as `in_doubt`.

    Returns:
        The calls in doubt of attempts that died.
    """
    lost = Ledger()
    if path.exists():
        note = read_json(path)
        if note["what"] == what:
            lost = Ledger.from_json(note["in_doubt"])
    noted = Ledger()
    noted.merge(lost)
    noted.merge(most_calls)
    write_json(path, {"what": what, "in_doubt": noted.to_json()})
    return lost
