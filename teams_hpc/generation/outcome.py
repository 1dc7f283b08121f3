"""From rows to files: publishing a unit, and declaring the stage done."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from teams_hpc.config.digest import file_digest
from teams_hpc.errors import CorruptFileError, WorkError
from teams_hpc.generation.evolve import Row
from teams_hpc.generation.plan import Plan
from teams_hpc.generation.published import PublishedLines, PublishedUnits
from teams_hpc.generation.unit_log import UnitLog
from teams_hpc.generation.usage import generation_usage
from teams_hpc.llm.base import Engine
from teams_hpc.llm.ledger import Ledger
from teams_hpc.rewriting.elimination import REASONS, Reason
from teams_hpc.rewriting.operations import (
    FEWEST_ADDED_WORDS,
    MOST_ADDED_WORDS,
    OPERATIONS,
    has_length_rule,
)
from teams_hpc.storage.run_dir import RunDir, write_manifest
from teams_hpc.storage.shards import (
    ROW_COLUMNS,
    Finish,
    Status,
    Table,
    TableWriter,
    combined_sha256,
)

Counts = dict[str, Any]
Engines = dict[str, dict[str, Any]]
_NOT_ELIMINATED = {Reason.NONE, Reason.ENGINE_ERROR}


def count_rows(rows: Sequence[Row]) -> Counts:
    """Counts of a unit's rows.

    Raises:
        CorruptFileError: As `check_balance`.
    """
    counts = count_outcomes([row["status"] for row in rows], [row["reason"] for row in rows])
    check_balance(counts, "a unit")
    return counts


def count_outcomes(statuses: Sequence[int], reasons: Sequence[int]) -> Counts:
    """Rows attempted, kept, eliminated by reason, and failed, from two columns.

    A row of another status, or eliminated for no reason, is among those attempted alone.
    """
    by_status = Counter(statuses)
    pairs = zip(statuses, reasons, strict=True)
    by_reason = Counter(reason for status, reason in pairs if status == Status.ELIMINATED)
    return {
        "attempted": len(statuses),
        "kept": by_status[Status.KEPT],
        "eliminated": {
            str(reason): by_reason[code]
            for code, reason in enumerate(REASONS)
            if reason not in _NOT_ELIMINATED
        },
        "failed": by_status[Status.FAILED],
    }


def check_balance(counts: Counts, what: str) -> None:
    """Every attempted step was kept, eliminated or failed.

    Raises:
        CorruptFileError: It doesn't add up.
    """
    total = counts["kept"] + sum(counts["eliminated"].values()) + counts["failed"]
    if counts["attempted"] != total:
        raise CorruptFileError(f"rows of {what} do not balance: {counts}")


def count_length_rule(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """By operation: rewrites that came back whole, and how many added 10 to 20 words."""
    whole = [row for row in rows if row["rewrite_finish"] == Finish.STOP]
    judged = Counter(row["operation"] for row in whole)
    kept = Counter(
        row["operation"]
        for row in whole
        if FEWEST_ADDED_WORDS <= row["added_words"] <= MOST_ADDED_WORDS
    )
    return {
        str(name): {"judged": judged[code], "kept_rule": kept[code]}
        for code, name in enumerate(OPERATIONS)
        if has_length_rule(name)
    }


def describe_engine(engine: Engine) -> dict[str, Any]:
    """What reports say of an engine."""
    return {
        "content_id": engine.content_id,
        "is_model": engine.is_model,
        "exactness": engine.exactness,
    }


def weakest_engines(engines: Iterable[Mapping[str, dict[str, Any]]]) -> Engines:
    """By role, of what `describe_engine` said in several places, the first that isn't exact.

    One run's places may differ: which device a model is on is no part of the run's inputs.
    """
    weakest: Engines = {}
    for by_role in engines:
        for role, engine in by_role.items():
            if role not in weakest or weakest[role]["exactness"] == "exact":
                weakest[role] = engine
    return weakest


def publish_unit(
    run_dir: RunDir,
    log: UnitLog,
    rows: Sequence[Row],
    engines: Mapping[str, dict[str, Any]],
    lines: PublishedLines,
    before: Ledger | None = None,
) -> Counts:
    """Give a finished unit its file, with counts and usage; then its journals go.

    If another process has published the unit already, this one's file is discarded. Only journals
    that the published file counts are removed.

    Args:
        run_dir: The run.
        log: The unit's journals, flushed.
        rows: In chain order, then by step.
        engines: `describe_engine` by role.
        lines: Where the unit is noted for later scans.
        before: In a retry, what the unit had cost until then; its new file is for later.

    Returns:
        Counts of the rows.

    Raises:
        WorkError: The disk is full.
    """
    counts = count_rows(rows)
    path = run_dir.shard(log.unit) if before is None else run_dir.retried_shard(log.unit)
    usage = log.usage()
    usage.merge(before or Ledger())
    rows_before = []
    if before is not None:  # some of its rows are taken over
        with Table.open(run_dir.shard(log.unit)) as table:
            rows_before.append(table.attrs["engines"])
    attrs = {
        "unit": log.unit,
        "digest": log.digest,
        "counts": counts,
        "length_rule": count_length_rule(rows),
        "engines": weakest_engines([*rows_before, engines]),
        "usage": usage.to_json(),
        "journals": log.file_names,
    }
    columns = {column.name: [row[column.name] for row in rows] for column in ROW_COLUMNS}
    with TableWriter(path, ROW_COLUMNS, "unit", first_wins=True) as writer:
        writer.append(columns)
        writer.close(attrs)
    log.close()
    with Table.open(path) as table:
        lines.add(log.unit, table.attrs)
        for name in table.attrs["journals"]:
            (run_dir.journal / name).unlink(missing_ok=True)
    return counts


def add_counts(total: Counts, more: Mapping[str, Any]) -> None:
    """Add to each number of `total`, at any depth, that of `more`."""
    for key, value in more.items():
        if isinstance(value, Mapping):
            add_counts(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


def _refuse_empty(run_dir: RunDir, counts: Counts) -> None:
    if counts["kept"]:
        return
    with Table.open(run_dir.shard(0)) as table:
        details = [text for text in table.texts("detail", 0, table.num_rows) if text]
    first = f"; the first says: {details[0][:200]}" if details else ""
    eliminated = {reason: count for reason, count in counts["eliminated"].items() if count}
    raise WorkError(
        f"not one of {counts['attempted']} rewrites was kept: {counts['failed']} failed, "
        f"eliminated {eliminated}{first}. Look at some with `teams-hpc inspect "
        f"{run_dir.shard(0)}`, set that right, and run again with --rerun-from generate"
    )


def write_outcome(run_dir: RunDir, plan: Plan, digest: str) -> Counts:
    """Write the stage's manifest from the published units.

    Returns:
        Counts of all rows.

    Raises:
        WorkError: Not one row was kept.
        CorruptFileError: A unit is damaged or doesn't belong here.
    """
    counts: Counts = {}
    length_rule: Counts = {}
    units: dict[str, str] = {}
    engines: Engines = {}
    published = PublishedUnits(run_dir)
    for unit, attrs in published.attrs(range(plan.num_units)).items():
        path = run_dir.shard(unit)
        if attrs["digest"] != digest or attrs["num_rows"] != plan.num_rows_of(unit):
            raise CorruptFileError(
                f"{path} is not unit {unit} of this plan; run again with --rerun-from generate"
            )
        check_balance(attrs["counts"], str(path))
        if attrs["counts"]["attempted"] != attrs["num_rows"]:
            raise CorruptFileError(
                f"{path} has {attrs['num_rows']} rows, but counts {attrs['counts']['attempted']}; "
                "run again with --rerun-from generate"
            )
        add_counts(counts, attrs["counts"])
        add_counts(length_rule, attrs["length_rule"])
        units[path.name] = attrs["sha256"]
        engines = weakest_engines([engines, attrs["engines"]])
    _refuse_empty(run_dir, counts)
    is_exact = all(engine["exactness"] == "exact" for engine in engines.values())
    content = {
        "counts": counts,
        "length_rule": length_rule,
        "units": units,
        "sha256": combined_sha256(units),
        "exactness": "exact" if is_exact else "statistical",
        "engines": engines,
        "files": {run_dir.plan.name: file_digest(run_dir.plan)},
        "usage": generation_usage(run_dir, published).to_json(),
    }
    write_manifest(run_dir, "generate", content)
    return counts
