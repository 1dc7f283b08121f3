"""What units and the stage say of themselves: counts that balance, and how exact the rows are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from teams_hpc.config import Config
from teams_hpc.config.schema import (
    HttpEngineConfig,
    TemplateEngineConfig,
    TransformersEngineConfig,
)
from teams_hpc.dataset.balance import Fate
from teams_hpc.errors import CorruptFileError
from teams_hpc.generation import outcome, worker
from teams_hpc.generation.outcome import count_rows, describe_engine, weakest_engines
from teams_hpc.generation.worker import generate
from teams_hpc.llm.http_engine import HttpEngine
from teams_hpc.llm.template_engine import TemplateEngine
from teams_hpc.llm.transformers_engine import TransformersEngine
from teams_hpc.report.verify import verify_run
from teams_hpc.rewriting.elimination import REASONS, Reason
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import write_json
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest
from teams_hpc.storage.shards import ROW_COLUMNS, Status, Table, TableWriter

CONFIG = Config.model_validate(
    {
        "name": "t",
        "seeds": {"limit": 12},
        "generate": {"policy": "uniform", "num_steps": 2, "unit_size": 3},
    }
)


def make_run(root: Path) -> RunDir:
    run_dir = RunDir(root)
    run_dir.metrics.mkdir(parents=True)
    for stage in ("generate", "dataset"):
        write_json(run_dir.inputs(stage), {"digest": "d", "inputs": {}})
    return run_dir


def generated(run_dir: RunDir) -> dict[str, Any]:
    generate(run_dir, CONFIG, 0, StopFlag())
    manifest = read_manifest(run_dir, "generate")
    assert manifest is not None
    return manifest


def outcomes(*pairs: tuple[int, Reason]) -> list[dict[str, Any]]:
    return [{"status": status, "reason": REASONS.index(reason)} for status, reason in pairs]


def test_a_row_that_is_neither_kept_nor_eliminated_nor_failed_is_refused() -> None:
    kept, equal = (Status.KEPT, Reason.NONE), (Status.ELIMINATED, Reason.EQUAL)
    failed = (Status.FAILED, Reason.ENGINE_ERROR)
    counts = count_rows(outcomes(kept, kept, equal, failed))
    assert (counts["attempted"], counts["kept"], counts["failed"]) == (4, 2, 1)
    assert {name: n for name, n in counts["eliminated"].items() if n} == {"equal": 1}
    for stray in (
        (max(Status) + 1, Reason.NONE),
        (Status.ELIMINATED, Reason.NONE),
        (Status.ELIMINATED, Reason.ENGINE_ERROR),
    ):
        with pytest.raises(CorruptFileError, match=r"rows of a unit do not balance: .*'kept': 1"):
            count_rows(outcomes(kept, stray))


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> str:
    """Write a unit's file anew, sound in itself, with other columns or attributes."""
    with Table.open(path) as table:
        columns = table.read(0, table.num_rows, [column.name for column in ROW_COLUMNS])
        own = ("unit", "digest", "counts", "length_rule", "engines", "usage", "journals")
        attrs = {key: table.attrs[key] for key in own}
    change(columns, attrs)
    path.unlink()
    with TableWriter(path, ROW_COLUMNS, "unit") as writer:
        writer.append(columns)
        return writer.close(attrs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kept": 7}, r"unit-00002\.h5 do not balance"),
        ({"attempted": 7, "kept": 7, "eliminated": {}}, "has 6 rows, but counts 7"),
    ],
)
def test_units_that_do_not_balance_make_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], said: str
) -> None:
    run_dir = make_run(tmp_path)
    real = outcome.write_outcome

    def write_outcome(*arguments: Any) -> Any:
        rewrite(run_dir.shard(2), lambda _, attrs: attrs["counts"].update(changes))
        return real(*arguments)

    monkeypatch.setattr(worker, "write_outcome", write_outcome)
    with pytest.raises(CorruptFileError, match=said):
        generate(run_dir, CONFIG, 0, StopFlag())
    assert not run_dir.manifest("generate").exists()


def generation_faults(run_dir: RunDir) -> list[str]:
    """What `verify` says, but of the stages that are not done here."""
    faults = verify_run(run_dir, CONFIG).faults
    return [fault for fault in faults if not fault.endswith("`teams-hpc run` goes on with it")]


def test_verify_counts_the_rows_anew(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    manifest = generated(run_dir)
    counts = manifest["counts"]
    assert generation_faults(run_dir) == []

    swapped = {**counts, "kept": counts["kept"] - 1, "failed": counts["failed"] + 1}
    write_manifest(run_dir, "generate", {**manifest, "counts": swapped})
    assert generation_faults(run_dir) == [
        f"{run_dir.shards}: the manifest does not count the rows right: "
        f"kept is {counts['kept']}, not {counts['kept'] - 1}, "
        f"failed is {counts['failed']}, not {counts['failed'] + 1}"
    ]

    path = run_dir.shard(1)
    digest = rewrite(path, lambda rows, _: rows.update(status=[Status.FAILED, *rows["status"][1:]]))
    write_manifest(
        run_dir, "generate", {**manifest, "units": {**manifest["units"], path.name: digest}}
    )
    of_unit, of_run = generation_faults(run_dir)
    assert of_unit.startswith(f"{path} does not count its rows right: ")
    assert "failed is 1, not 0" in of_unit
    assert f"failed is {counts['failed'] + 1}, not {counts['failed']}" in of_run


def test_verify_compares_a_data_set_with_the_generation_it_was_made_of(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    counts = generated(run_dir)["counts"]
    lost = counts["attempted"] - counts["kept"]
    packing = {"sequences": counts["kept"], "prompt_too_long": 0}
    none = {"sequences": 0, "prompt_too_long": 0}
    some = {"read": counts["attempted"], "not_kept": lost, "train": counts["kept"]}
    right = dict.fromkeys(Fate, 0) | some
    content = {"counts": right, "packing": {"train": packing, "held_out": none}}
    write_manifest(run_dir, "dataset", content)
    assert generation_faults(run_dir) == []
    wrong = {**right, "read": counts["attempted"] - 1, "not_kept": lost - 1}
    write_manifest(run_dir, "dataset", {**content, "counts": wrong})
    assert len(generation_faults(run_dir)) == 2


def http_engine() -> HttpEngine:
    return HttpEngine(HttpEngineConfig(base_url="http://localhost:1/v1", model="m"))


@pytest.fixture
def describe(tiny_llama: Path) -> Callable[[str], dict[str, Any]]:
    """`describe_engine` of engines as they are, by the words a user would say."""

    def described(words: str) -> dict[str, Any]:
        if words == "template":
            return describe_engine(TemplateEngine(TemplateEngineConfig()))
        if words == "http":
            engine = http_engine()
            try:
                return describe_engine(engine)
            finally:
                engine.close()
        dtype, batching, device = words.split()
        values = {"dtype": dtype, "batching": batching, "device": "cpu"}
        local = TransformersEngine(TransformersEngineConfig(model=tiny_llama, **values))
        local._device = torch.device(device)  # no GPU is needed to say what one would give
        return describe_engine(local)

    return described


@pytest.mark.parametrize(
    ("expert", "reviewer", "expected"),
    [
        ("template", "template", "exact"),
        ("template", "float32 fixed cpu", "exact"),
        ("http", "template", "statistical"),
        ("template", "http", "statistical"),
        ("float32 fixed cpu", "bfloat16 fixed cpu", "statistical"),
        ("float32 refill cpu", "template", "statistical"),
        ("float32 fixed cuda", "float32 fixed cpu", "statistical"),
    ],
)
def test_a_run_is_as_exact_as_its_weakest_engine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    describe: Callable[[str], dict[str, Any]],
    expert: str,
    reviewer: str,
    expected: str,
) -> None:
    run_dir = make_run(tmp_path)
    engines = {"expert": describe(expert), "reviewer": describe(reviewer)}
    real = worker.publish_unit
    monkeypatch.setattr(
        worker,
        "publish_unit",
        lambda run_dir, log, rows, _, *rest: real(run_dir, log, rows, engines, *rest),
    )
    manifest = generated(run_dir)
    assert manifest["exactness"] == expected
    assert manifest["engines"] == engines


@pytest.mark.parametrize("statistical", [{0}, {1, 2}, {3}])
def test_one_unit_on_a_gpu_makes_a_run_statistical(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistical: set[int]
) -> None:
    run_dir = make_run(tmp_path)
    real = worker.publish_unit

    def publish(run_dir: RunDir, log: Any, rows: Any, engines: Any, *rest: Any) -> Any:
        if log.unit in statistical:
            engines = {**engines, "expert": {**engines["expert"], "exactness": "statistical"}}
        return real(run_dir, log, rows, engines, *rest)

    monkeypatch.setattr(worker, "publish_unit", publish)
    manifest = generated(run_dir)
    assert manifest["exactness"] == "statistical"
    found = {role: engine["exactness"] for role, engine in manifest["engines"].items()}
    assert found == {"expert": "statistical", "reviewer": "exact"}


def test_the_weakest_engine_of_each_role_counts_whatever_comes_after() -> None:
    exact, statistical = ({"exactness": word} for word in ("exact", "statistical"))
    units = [{"expert": exact}, {"expert": statistical, "instructor": exact}, {"expert": exact}]
    assert weakest_engines(units) == {"expert": statistical, "instructor": exact}
    assert weakest_engines([]) == {}
