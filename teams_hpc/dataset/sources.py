"""Reading what generation made, in plan order: shards by unit, rows as they stand in them.

Plan order is the data set's order, so nothing here depends on how many workers made the shards.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teams_hpc.errors import CorruptFileError, WorkError
from teams_hpc.storage.run_dir import RunDir, read_manifest
from teams_hpc.storage.shards import Rows, Table

REMEDY = "make the rows again with --rerun-from generate"
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True, slots=True)
class Shards:
    """The finished shards of a run.

    Attributes:
        digests: SHA-256 over its columns by shard, in plan order, as generation's manifest says.
        counts: Rows attempted, kept, eliminated and failed, as generation's manifest says.
        exactness: Whether the same run would give the same rows: `exact` or `statistical`.
    """

    digests: Mapping[Path, str]
    counts: Mapping[str, Any]
    exactness: str

    @property
    def num_rows(self) -> int:
        """Rows in all of them, as generation's manifest says."""
        return int(self.counts["attempted"])

    @classmethod
    def of(cls, run_dir: RunDir) -> "Shards":
        """Find the shards of a run whose generation is done.

        Raises:
            WorkError: Generation isn't done.
        """
        manifest = read_manifest(run_dir, "generate")
        if manifest is None:
            raise WorkError("dataset needs generate, which is not done; run generate first")
        return cls(
            {run_dir.shards / name: str(digest) for name, digest in manifest["units"].items()},
            manifest["counts"],
            str(manifest["exactness"]),
        )

    def verified(self) -> Iterator[Rows]:
        """Like `blocks` of the columns that decide a row's fate, each shard's checksums first.

        Raises:
            CorruptFileError: A shard is missing, damaged or another than generation made.
        """
        for path, digest in self.digests.items():
            with _open(path) as table:
                faults = table.verify()
                if not faults and table.attrs["sha256"] != digest:
                    faults = [f"{path} is not the shard that generation's manifest names"]
                if faults:
                    raise CorruptFileError(f"{faults[0]}; {REMEDY}")
                yield from _blocks(table, FATE_COLUMNS)

    def blocks(self, columns: Sequence[str]) -> Iterator[Rows]:
        """Pieces of at most 1,024 rows, in plan order."""
        for path in self.digests:
            with _open(path) as table:
                yield from _blocks(table, columns)


FATE_COLUMNS = (
    "record_id",
    "split",
    "instruction",
    "input",
    "response",
    "status",
    "answer_finish",
)


def _open(path: Path) -> Table:
    if not path.is_file():
        raise CorruptFileError(f"the shard {path} is missing; {REMEDY}")
    try:
        return Table.open(path)
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}; {REMEDY}") from None


def _blocks(table: Table, columns: Sequence[str]) -> Iterator[Rows]:
    for start in range(0, table.num_rows, _ROWS_AT_A_TIME):
        rows = table.read(start, start + _ROWS_AT_A_TIME, columns)
        yield {name: [_valid(value) for value in values] for name, values in rows.items()}


def _valid(value: Any) -> Any:
    """Text that UTF-8 can hold: an engine may return half a surrogate pair."""
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
