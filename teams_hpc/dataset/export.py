"""Writing the data set in formats that others read, in plan order."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

from teams_hpc.dataset.balance import GROUPS, Fate
from teams_hpc.dataset.templates import Row
from teams_hpc.errors import CorruptFileError, UsageError
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.splits import SPLITS
from teams_hpc.storage.atomic import replacing
from teams_hpc.storage.run_dir import RunDir, read_manifest
from teams_hpc.storage.shards import Finish, Rows, Table

Format = Literal["alpaca", "chat", "parquet"]
RowChoice = Literal["train", "held_out", "all"]

_FILE: Mapping[Format, str] = {
    "alpaca": "alpaca.json",
    "chat": "chat.jsonl",
    "parquet": "rows.parquet",
}
_USES: Mapping[RowChoice, frozenset[int]] = {
    "train": frozenset({GROUPS.index(Fate.TRAIN)}),
    "held_out": frozenset({GROUPS.index(Fate.HELD_OUT)}),
    "all": frozenset(range(len(GROUPS))),
}
_ROWS_AT_A_TIME = 1024
# Equal in every row of the data set, or of use only to resume.
_NOT_FOR_ANALYSIS = frozenset({"status", "reason", "detail", "sampler_seed"})
_NAMES: Mapping[str, tuple[str, ...]] = {
    "split": SPLITS,
    "operation": tuple(str(operation) for operation in OPERATIONS),
    "rewrite_finish": tuple(finish.name.lower() for finish in Finish),
    "answer_finish": tuple(finish.name.lower() for finish in Finish),
    "use": tuple(group.value for group in GROUPS),
}


def export_rows(
    run_dir: RunDir, format_name: str, output: Path | None, rows: str = "train"
) -> tuple[Path, int]:
    """Export with names as typed on the command line.

    Args:
        run_dir: A run whose data set is done.
        format_name: `alpaca`, `chat` or `parquet`.
        output: The file; None: for instance `dataset/train-alpaca.json`.
        rows: `train`, `held_out` or `all`.

    Returns:
        The file and the number of rows in it.

    Raises:
        UsageError: An unknown name, no data set yet, no such rows, or the file can't be written.
    """
    for value, known, option in (
        (format_name, get_args(Format), "--format"),
        (rows, get_args(RowChoice), "--rows"),
    ):
        if value not in known:
            raise UsageError(f"{option}: {value!r} is none of {', '.join(known)}")
    chosen_format, choice = cast(Format, format_name), cast(RowChoice, rows)
    path = output or run_dir.dataset / f"{choice}-{_FILE[chosen_format]}"
    return path, export_dataset(run_dir, chosen_format, path, choice)


def export_dataset(
    run_dir: RunDir, format_name: Format, output: Path, rows: RowChoice = "train"
) -> int:
    """Write the chosen rows to `output` in plan order; the file is there whole or not at all.

    `alpaca` is a JSON list of instruction, input and output; `chat` JSON lines of messages, the
    input following the instruction; `parquet` has the columns that analysis needs.

    Returns:
        Rows written, at least one.

    Raises:
        UsageError: No data set yet, no such rows, or the file can't be written.
        CorruptFileError: The data set doesn't match its checksums.
    """
    if read_manifest(run_dir, "dataset") is None:
        raise UsageError(f"{run_dir.root} has no finished data set; `teams-hpc run` makes it")
    if output.is_dir():
        raise UsageError(f"--output: {output} is a folder; name a file in it")
    with Table.open(run_dir.dataset_rows) as table:
        faults = table.verify()
        if faults:
            raise CorruptFileError(f"{faults[0]}; make it again with --rerun-from dataset")
        try:
            with replacing(output) as temporary:
                count = _WRITERS[format_name](table, _USES[rows], temporary)
                if not count:
                    raise UsageError(f"--rows: the data set has no {rows} rows")
        except OSError as error:
            fault = error.strerror or error  # pyarrow's have no strerror
            raise UsageError(f"--output: can't write {output}: {fault}") from None
    return count


def _pieces(table: Table, uses: frozenset[int], columns: Sequence[str]) -> Iterator[Rows]:
    """The rows of these uses, some at a time."""
    for start in range(0, table.num_rows, _ROWS_AT_A_TIME):
        rows = table.read(start, start + _ROWS_AT_A_TIME, [*columns, "use"])
        chosen = [position for position, use in enumerate(rows["use"]) if use in uses]
        yield {name: [rows[name][position] for position in chosen] for name in columns}


def _examples(table: Table, uses: frozenset[int]) -> Iterator[Row]:
    for rows in _pieces(table, uses, ["instruction", "input", "response"]):
        yield from map(Row, rows["instruction"], rows["input"], rows["response"])


def _write_alpaca(table: Table, uses: frozenset[int], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in _examples(table, uses):
            record = {"instruction": row.instruction, "input": row.input, "output": row.response}
            stream.write(",\n" if count else "[\n")
            stream.write(json.dumps(record, ensure_ascii=False))
            count += 1
        stream.write("\n]\n")
    return count


def _write_chat(table: Table, uses: frozenset[int], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in _examples(table, uses):
            messages = [
                {"role": "user", "content": row.user_message},
                {"role": "assistant", "content": row.response},
            ]
            stream.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            count += 1
    return count


def _write_parquet(table: Table, uses: frozenset[int], path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [column for column in table.columns if column.name not in _NOT_FOR_ANALYSIS]
    types = {
        column.name: pa.string()
        if column.is_text or column.name in _NAMES
        else pa.from_numpy_dtype(column.dtype)
        for column in columns
    }
    count = 0
    with pq.ParquetWriter(path, pa.schema(list(types.items()))) as writer:
        for rows in _pieces(table, uses, list(types)):
            for name, known in _NAMES.items():
                rows[name] = [known[code] for code in rows[name]]
            writer.write_table(pa.table(rows, schema=writer.schema))
            count += len(rows["use"])
    return count


_WRITERS: Mapping[Format, Callable[[Table, frozenset[int], Path], int]] = {
    "alpaca": _write_alpaca,
    "chat": _write_chat,
    "parquet": _write_parquet,
}
