"""A retry of failed rows, as workers see it: what is to be made again, and from which rows."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teams_hpc.errors import CorruptFileError
from teams_hpc.generation.evolve import Chain, Row, Steering
from teams_hpc.generation.plan import Plan
from teams_hpc.generation.published import PublishedUnits
from teams_hpc.llm.ledger import Ledger
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import publishing, read_json, replacing
from teams_hpc.storage.lease import Lease
from teams_hpc.storage.retry_folder import previous_path, read_retry_plan
from teams_hpc.storage.run_dir import RunDir, read_manifest
from teams_hpc.storage.shards import ROW_COLUMNS, Status, Table

_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """What is made again.

    Attributes:
        failed_chains: By unit, how many of its chains have failed rows.
    """

    failed_chains: Mapping[int, int]


def settle_retry(run_dir: RunDir, plan: Plan, lease_s: float, stop: StopFlag) -> Retry | None:
    """The retry in progress; None if there is none.

    One worker plans it while the others wait: who planned later would find units made again, or
    the whole retry finished.

    Raises:
        CorruptFileError: A unit is damaged.
        StopRequested: Asked to stop while another worker plans.
    """
    if not previous_path(run_dir).exists():
        return None
    with Lease(run_dir.leases / "retry-plan", lease_s) as lease:
        while (found := read_retry_plan(run_dir)) is None and not lease.acquire():
            stop.raise_if_set("nothing")
            time.sleep(_POLL_S)
        if found is None:
            found = read_retry_plan(run_dir)
        if found is None:
            if read_manifest(run_dir, "generate") is not None:  # finished just now
                return None
            found = _plan_retry(run_dir, plan)
            with publishing(run_dir.retry_plan) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return Retry(failed_chains={int(unit): n for unit, n in found["failed_chains"].items()})


def _plan_retry(run_dir: RunDir, plan: Plan) -> dict[str, Any]:
    previous = read_json(previous_path(run_dir))
    attrs = PublishedUnits(run_dir).attrs(range(plan.num_units))
    counted = Ledger()
    for unit, of_unit in attrs.items():
        path = run_dir.shard(unit)
        if of_unit["sha256"] != previous["units"].get(path.name):
            raise CorruptFileError(
                f"{path} holds other rows than the manifest said; run again with "
                "--rerun-from generate"
            )
        counted.merge(Ledger.from_json(of_unit["usage"]))
    failed = {
        unit: _count_failed(run_dir, plan, unit)
        for unit, of_unit in attrs.items()
        if of_unit["counts"]["failed"]
    }
    paid = Ledger.from_json(previous["usage"]).minus(counted)
    return {"failed_chains": failed, "usage_of_no_unit": paid.to_json()}


def _count_failed(run_dir: RunDir, plan: Plan, unit: int) -> int:
    chains = _chains_of_rows(_read_rows(run_dir, unit, ("status",)), plan.num_steps)
    return sum(map(_is_failed, chains))


def _read_rows(run_dir: RunDir, unit: int, names: Sequence[str]) -> list[Row]:
    with Table.open(run_dir.shard(unit)) as table:
        columns = table.read(0, table.num_rows, names)
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _chains_of_rows(rows: Sequence[Row], num_steps: int) -> list[list[Row]]:
    return [list(rows[at : at + num_steps]) for at in range(0, len(rows), num_steps)]


def _is_failed(rows: Sequence[Row]) -> bool:
    return any(row["status"] == Status.FAILED for row in rows)


def chains_to_retry(
    run_dir: RunDir, plan: Plan, unit: int, steering: Steering
) -> tuple[list[Chain], list[list[Row]]]:
    """The chains of a unit to be made again, and the rows of all its chains, in order.

    A chain that is made again fills its rows as it goes; those of the others are as they were.
    """
    chains: list[Chain] = []
    rows: list[list[Row]] = []
    names = [column.name for column in ROW_COLUMNS]
    before = _chains_of_rows(_read_rows(run_dir, unit, names), plan.num_steps)
    for key, earlier in zip(plan.chains_of(unit), before, strict=True):
        if not _is_failed(earlier):
            rows.append(earlier)
            continue
        chains.append(Chain(key, steering, {row["step"]: row for row in earlier}))
        rows.append(chains[-1].rows)
    return chains, rows


def usage_before(run_dir: RunDir, unit: int) -> Ledger:
    """What a unit had cost before it is made again."""
    with Table.open(run_dir.shard(unit)) as table:
        return Ledger.from_json(table.attrs["usage"])


def replace_units(run_dir: RunDir, retry: Retry) -> None:
    """Give each unit that was made again its place, one by one, whole; harmless to repeat."""
    for unit in retry.failed_chains:
        with replacing(run_dir.shard(unit)) as temporary:
            os.link(run_dir.retried_shard(unit), temporary)
