"""What a check found; and the check of a bundle, which needs none of the heavy packages."""

from dataclasses import dataclass, field
from pathlib import Path

from teams_hpc.pipeline.bundle import verify_bundle


@dataclass(slots=True)
class Verification:
    """What was checked and found well, and what was not."""

    checked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, what: str, faults: list[str]) -> None:
        if faults:
            self.faults.extend(faults)
        else:
            self.checked.append(what)


def verify_carried(folder: Path) -> Verification:
    """Whether each file of an unpacked bundle is as it was made."""
    verification = Verification()
    faults, num_files = verify_bundle(folder)
    verification.add(f"bundle: {num_files} files are as they were made", faults)
    return verification
