"""What finished units say of themselves, readable without opening ten thousand files.

A worker that publishes a unit adds one line to a file of its own: the unit's file with size and
time of change, and of its attributes what scans need. A line is a copy and never more: it counts
only while its checksum holds and the unit's file is the very one it was written for. Any other
unit is opened, so nothing depends on these lines being there, and they needn't be durable. They go
once the stage has its manifest.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from teams_hpc.errors import CorruptFileError
from teams_hpc.storage.journal import new_writer_name
from teams_hpc.storage.retry_folder import newest_shard, retried_units
from teams_hpc.storage.run_dir import RunDir
from teams_hpc.storage.shards import Table

_COPIED = (
    "unit",
    "num_rows",
    "digest",
    "sha256",
    "counts",
    "length_rule",
    "engines",
    "usage",
    "journals",
)
_CHECKSUM_BYTES = 16
_FEW_UNITS = 32
"""So few are opened sooner than all lines are read."""

Attrs = dict[str, Any]
_Stamp = tuple[int, int]


def unit_number(path: Path) -> int:
    """The unit a shard is of, from its name."""
    return int(path.stem.removeprefix("unit-"))


@dataclass(slots=True)
class PublishedUnits:
    """Attributes of published units, remembered: a published file never changes.

    Of a unit that a retry has made again, the newer file counts.
    """

    run_dir: RunDir
    _known: dict[Path, Attrs] = field(default_factory=dict)

    def units(self) -> list[int]:
        """The units that have a file, ascending."""
        return sorted(_units_in(self.run_dir.shards))

    def attrs(self, units: Iterable[int]) -> dict[int, Attrs]:
        """What each of these units says of itself, of the attributes that are copied.

        Raises:
            CorruptFileError: A unit's file is missing or damaged.
        """
        wanted = list(units)
        paths = {unit: newest_shard(self.run_dir, unit) for unit in wanted}
        missing = [unit for unit in wanted if paths[unit] not in self._known]
        lines = _read_lines(self.run_dir) if len(missing) > _FEW_UNITS else {}
        for unit in missing:
            line = lines.get(unit)
            is_current = line is not None and line[0] == _stamp(paths[unit])
            self._known[paths[unit]] = line[1] if line and is_current else self._read(unit)
        return {unit: self._known[paths[unit]] for unit in wanted}

    def _read(self, unit: int) -> Attrs:
        path = newest_shard(self.run_dir, unit)
        try:
            return _attrs_of(path)
        except CorruptFileError:
            if path.exists():
                raise
        return _attrs_of(self.run_dir.shard(unit))  # the retry was finished just now


def published_units(run_dir: RunDir) -> set[int]:
    """The units that are done, from the names of files alone; in a retry, those done anew."""
    units = _units_in(run_dir.shards)
    again = retried_units(run_dir)
    return (units - again) | (again & _units_in(run_dir.retry)) if again else units


def is_published(run_dir: RunDir, unit: int) -> bool:
    """Whether one unit is done."""
    again = unit in retried_units(run_dir)
    return (run_dir.retried_shard(unit) if again else run_dir.shard(unit)).exists()


def _units_in(folder: Path) -> set[int]:
    try:
        names = os.listdir(folder)  # noqa: PTH208 (ten thousand paths take their time)
    except FileNotFoundError:
        return set()
    is_unit = (name.startswith("unit-") and name.endswith(".h5") for name in names)
    return {int(name[5:-3]) for name, wanted in zip(names, is_unit, strict=True) if wanted}


@dataclass(slots=True)
class PublishedLines:
    """One worker's file of lines."""

    run_dir: RunDir
    _name: str = field(default_factory=new_writer_name)

    def add(self, unit: int, attrs: Attrs) -> None:
        """Note a published unit; a disk that takes no more is not an error here."""
        stamp = _stamp(newest_shard(self.run_dir, unit))
        if stamp is None:
            return
        copied = {key: attrs[key] for key in _COPIED if key in attrs}
        text = json.dumps([unit, *stamp, copied], separators=(",", ":"))
        folder = _folder(self.run_dir)
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            with (folder / f"{self._name}.lines").open("ab") as stream:
                stream.write(f"{_checksum(text)} {text}\n".encode())


def clear_lines(run_dir: RunDir) -> None:
    """Remove all lines: the manifest says it all."""
    folder = _folder(run_dir)
    for path in folder.glob("*.lines"):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # it isn't there, or a late worker writes on
        folder.rmdir()


def _folder(run_dir: RunDir) -> Path:
    return run_dir.generate / "published"


def _checksum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=_CHECKSUM_BYTES).hexdigest()


def _stamp(path: Path) -> _Stamp | None:
    """Size and time of change of a file; None if there is none."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_size, state.st_mtime_ns


def _read_lines(run_dir: RunDir) -> dict[int, tuple[_Stamp, Attrs]]:
    """All whole lines by unit; what a kill or a full disk left torn is passed over."""
    found: dict[int, tuple[_Stamp, Attrs]] = {}
    for path in sorted(_folder(run_dir).glob("*.lines")):
        try:
            content = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # the stage was finished just now
            continue
        for line in content.split("\n"):
            checksum, _, text = line.partition(" ")
            if text and checksum == _checksum(text):
                unit, size, modified_ns, attrs = json.loads(text)
                found[unit] = (size, modified_ns), attrs
    return found


def _attrs_of(path: Path) -> Attrs:
    with Table.open(path) as table:
        return {key: table.attrs[key] for key in _COPIED if key in table.attrs}
