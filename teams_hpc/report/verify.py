"""Does the run hold what it says? Checksums, balance and plan coverage."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from teams_hpc.config import Config
from teams_hpc.config.digest import file_digest
from teams_hpc.dataset.balance import check_against_generation
from teams_hpc.dataset.balance import check_balance as check_dataset_balance
from teams_hpc.errors import TeamsError
from teams_hpc.generation.outcome import Counts, add_counts, count_outcomes
from teams_hpc.pipeline.graph import stage_graph
from teams_hpc.pipeline.inputs import is_done
from teams_hpc.report.verification import Verification
from teams_hpc.storage.atomic import read_json
from teams_hpc.storage.run_dir import RunDir, read_manifest
from teams_hpc.storage.shards import Table


def _file_faults(run_dir: RunDir, stage: str, manifest: dict[str, Any]) -> Iterator[str]:
    for name, expected in manifest.get("files", {}).items():
        path = run_dir.stage_dir(stage) / name
        if not path.is_file():
            yield f"{path} is missing; make it again with --rerun-from {stage}"
        elif file_digest(path) != expected:
            yield f"{path} has changed since it was made; make it again with --rerun-from {stage}"


def generation_balance(counts: dict[str, Any]) -> list[str]:
    """Faults in `attempted = kept + eliminated + failed`."""
    eliminated = sum(counts["eliminated"].values())
    total = counts["kept"] + eliminated + counts["failed"]
    if counts["attempted"] == total:
        return []
    return [
        f"generate: {counts['attempted']} steps attempted, but {counts['kept']} kept + "
        f"{eliminated} eliminated + {counts['failed']} failed = {total}"
    ]


def _by_name(counts: Counts) -> Counter[str]:
    totals = {name: counts[name] for name in ("attempted", "kept", "failed")}
    return Counter({**totals, **counts["eliminated"]})


def _differences(found: Counts, said: Counts) -> str:
    """The counts that differ, by name; a reason that only one of them knows counts as none."""
    ours, theirs = _by_name(found), _by_name(said)
    names = [name for name in {**ours, **theirs} if ours[name] != theirs[name]]
    return ", ".join(f"{name} is {ours[name]}, not {theirs[name]}" for name in names)


def _shard_faults(run_dir: RunDir, manifest: dict[str, Any]) -> Iterator[str]:
    """Every unit of the plan there once, whole; its rows, and all together, as they are counted."""
    num_units = read_json(run_dir.plan)["num_units"]
    num_rows = 0
    counts: Counts = {}
    for unit in range(num_units):
        path = run_dir.shard(unit)
        if not path.is_file():
            yield f"{path} is missing: unit {unit} of the plan's {num_units}"
            continue
        with Table.open(path) as table:
            faults = table.verify()
            yield from faults
            num_rows += table.num_rows
            if table.attrs["sha256"] != manifest["units"].get(path.name):
                yield f"{path} holds other rows than the manifest says"
            if not faults:
                rows = table.read(0, table.num_rows, ("status", "reason"))
                found = count_outcomes(rows["status"], rows["reason"])
                add_counts(counts, found)
                if wrong := _differences(found, table.attrs["counts"]):
                    yield f"{path} does not count its rows right: {wrong}"
    extra = len(list(run_dir.shards.glob("unit-*.h5"))) - num_units
    if extra > 0:
        yield f"{run_dir.shards}: {extra} more units than the plan has"
    attempted = manifest["counts"]["attempted"]
    if num_rows != attempted:
        yield f"{run_dir.shards}: {num_rows} rows, but the manifest says {attempted}"
    elif counts.get("attempted") != num_rows:
        return  # some unit couldn't be counted, which was said
    elif wrong := _differences(counts, manifest["counts"]):
        yield f"{run_dir.shards}: the manifest does not count the rows right: {wrong}"


def verify_run(run_dir: RunDir, config: Config) -> Verification:
    """Check every finished stage.

    A stage that isn't finished is a fault too: nothing reports success on partial work.
    """
    verification = Verification()
    for stage in stage_graph(config):
        manifest = read_manifest(run_dir, stage.name)
        if manifest is None or not is_done(run_dir, config, stage):
            verification.faults.append(f"{stage.name} is not done; `teams-hpc run` goes on with it")
            continue
        files = list(_file_faults(run_dir, stage.name, manifest))
        verification.add(f"{stage.name}: {len(manifest.get('files', {}))} files as made", files)
        if stage.name == "generate":
            _check(verification, "generate: every unit of the plan, whole", run_dir, manifest)
            verification.add(
                "generate: attempted = kept + eliminated + failed",
                generation_balance(manifest["counts"]),
            )
        if stage.name == "dataset":
            faults = check_dataset_balance(manifest)
            if generated := read_manifest(run_dir, "generate"):
                faults += check_against_generation(manifest["counts"], generated["counts"])
            verification.add("dataset: every row generated is accounted for", faults)
    return verification


def _check(
    verification: Verification, what: str, run_dir: RunDir, manifest: dict[str, Any]
) -> None:
    try:
        verification.add(what, list(_shard_faults(run_dir, manifest)))
    except (TeamsError, OSError) as error:
        verification.faults.append(str(error))
