"""What is in a file of ours: schema, counts and a few rows, for people."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from teams_hpc.errors import CorruptFileError, TeamsError, UsageError
from teams_hpc.rewriting.elimination import REASONS
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.seeds import read_seeds
from teams_hpc.rewriting.splits import SPLITS

_WIDTH = 100
_NAMES = {
    "split": SPLITS,
    "operation": [str(operation) for operation in OPERATIONS],
    "reason": [str(reason) for reason in REASONS],
}


def _shorten(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def _describe_table(path: Path, num_rows: int) -> list[str]:
    from teams_hpc.storage.shards import Table

    with Table.open(path) as table:
        lines = [f"{path}: {table.num_rows} rows"]
        lines += [f"  {key}: {_shorten(value)}" for key, value in sorted(table.attrs.items())]
        names = [column.name for column in table.columns]
        lines.append(f"  columns: {', '.join(names)}")
        rows = table.read(0, min(num_rows, table.num_rows), names)
        for row in range(min(num_rows, table.num_rows)):
            lines.append(f"row {row}")
            lines += [f"  {name}: {_shorten(_name(name, rows[name][row]))}" for name in names]
    return lines


def _name(column: str, value: Any) -> Any:
    """The name behind a code, such as `breadth` behind operation 5."""
    names = _NAMES.get(column)
    return f"{value} ({names[value]})" if names and value < len(names) else value


def _describe_packed(path: Path, num_rows: int) -> list[str]:
    import h5py

    lines = []
    with h5py.File(path, "r", locking=False) as file:
        lines.append(f"{path}: packed sequences")
        lines += [f"  {key}: {_shorten(value)}" for key, value in sorted(file.attrs.items())]
        for group in ("train", "held_out"):
            for name, column in file[group].items():
                lines.append(f"  {group}/{name}: {column.shape} {column.dtype}")
            for row in file[f"{group}/input_ids"][:num_rows]:
                lines.append(f"  {group} tokens: {_shorten(row.tolist())}")
    return lines


def _describe_hdf5(path: Path, num_rows: int) -> list[str]:
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            is_packed = "train" in file
    except OSError as error:
        raise CorruptFileError(f"{path} is not a readable HDF5 file: {error}") from None
    return (_describe_packed if is_packed else _describe_table)(path, num_rows)


def _describe_safetensors(path: Path, num_rows: int) -> list[str]:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > path.stat().st_size:
            raise CorruptFileError(f"{path} is not a safetensors file")
        header = json.loads(stream.read(length))
    metadata = header.pop("__metadata__", {})
    lines = [f"{path}: {len(header)} tensors"]
    lines += [f"  {key}: {_shorten(value)}" for key, value in sorted(metadata.items())]
    lines += [f"  {name}: {v['dtype']} {v['shape']}" for name, v in sorted(header.items())]
    return lines


def _describe_json(path: Path, num_rows: int) -> list[str]:
    value: Any = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(value, indent=1, ensure_ascii=False)
    return [f"{path}:", *text.splitlines()]


def _describe_seeds(path: Path, num_rows: int) -> list[str]:
    found = read_seeds(path, None)
    lines = [f"{path}: {len(found.seeds)} seeds ({found.num_duplicates} duplicates dropped)"]
    for seed in found.seeds[:num_rows]:
        lines.append(f"  {seed.id} {_shorten(seed.instruction)}")
        if seed.input:
            lines.append(f"    input: {_shorten(seed.input)}")
    return lines


def _describe_lines(path: Path, num_rows: int) -> list[str]:
    """JSON lines: seeds if they are, otherwise the last few lines as they stand."""
    try:
        return _describe_seeds(path, num_rows)
    except TeamsError:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [f"{path}: {len(lines)} lines", *(lines[-num_rows:] if num_rows else [])]


_BY_SUFFIX: dict[str, Callable[[Path, int], list[str]]] = {
    ".h5": _describe_hdf5,
    ".safetensors": _describe_safetensors,
    ".json": _describe_json,
    ".jsonl": _describe_lines,
    ".txt": _describe_lines,
    ".yaml": _describe_lines,
}


def describe_file(path: Path, num_rows: int) -> str:
    """Describe a file of a run directory, or a seed file.

    Raises:
        UsageError: There is no such file, or its kind is unknown.
        CorruptFileError: It is damaged.
    """
    if not path.is_file():
        raise UsageError(f"no file {path}")
    describe = _BY_SUFFIX.get(path.suffix)
    if describe is None:
        kinds = ", ".join(sorted(_BY_SUFFIX))
        raise UsageError(f"{path}: can't show {path.suffix or 'this kind'}; known are {kinds}")
    try:
        return "\n".join(describe(path, num_rows))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError) as error:
        raise CorruptFileError(f"{path} is damaged: {error}") from None
