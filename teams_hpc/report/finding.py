"""One line of a diagnosis."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "fault"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was looked at, what was found there, and what to do about it."""

    level: Level
    what: str
    found: str
    expected: str = ""
    remedy: str = ""

    @property
    def is_fault(self) -> bool:
        return self.level == "fault"


def fault_of_line(line: str) -> Finding:
    """The finding for a line `key: what is wrong; what to do`."""
    key, _, text = line.partition(": ")
    found, _, remedy = text.rpartition("; ") if "; " in text else (text, "", "")
    return Finding(level="fault", what=key, found=found, remedy=remedy)
