"""The stage `dataset` on real shards: filters, tokenizer, packing, manifest, order and kills."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import locked, without_hdf5_locks
from transformers import AutoTokenizer

from teams_hpc.config import Config
from teams_hpc.dataset.balance import check_balance
from teams_hpc.dataset.build import build_dataset
from teams_hpc.dataset.export import export_dataset
from teams_hpc.dataset.templates import alpaca_prompt
from teams_hpc.errors import CorruptFileError, StopRequested, WorkError
from teams_hpc.generation.outcome import count_rows
from teams_hpc.rewriting.elimination import REASONS, Reason
from teams_hpc.rewriting.splits import SPLITS
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import write_json
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest
from teams_hpc.storage.shards import ROW_COLUMNS, Finish, Status, Table, TableWriter

PROJECT = Path(__file__).parents[2]
EQUAL = REASONS.index(Reason.EQUAL)
HELD_OUT = SPLITS.index("sft_held_out")
VERBS = ("Describe", "Compare", "Explain", "Sketch", "Rank", "Translate", "Summarise", "Question")
THINGS = ("rivers", "prime numbers", "violins", "tax law", "glaciers", "compilers", "bees", "opera")
PLACES = (
    "in Peru",
    "for a child",
    "as a table",
    "since 1900",
    "at sea",
    "under stress",
    "by night",
)
AWKWARD = "naïve 💥 \u2028 \x00 </s><s> {input} \ud83d end"


def row(
    number: int, instruction: str, response: str = "An answer.", **other: Any
) -> dict[str, Any]:
    """One row with every column; `number` makes its record id."""
    defaults = {column.name: "" if column.is_text else 0 for column in ROW_COLUMNS}
    return {
        **defaults,
        "record_id": f"{number:032x}",
        "seed_id": f"{number:032x}",
        "instruction": instruction,
        "response": response,
        "answer_finish": Finish.STOP,
        **other,
    }


def plain_rows(count: int = 60, first: int = 100) -> list[dict[str, Any]]:
    """Rows that no filter touches; one in five is held out."""
    rows = []
    for index in range(count):
        verb, thing, place = VERBS[index % 8], THINGS[index // 8], PLACES[index % 7]
        text = f"{verb} {thing} {place}, case {index} of {thing} and {index * 7} {verb}s."
        answer = f"{thing} {place}: " + f"point {index} holds. " * (index % 9 + 1)
        split = HELD_OUT if index % 5 == 0 else 0
        rows.append(row(first + index, text, answer, split=split, operation=index % 6))
    return rows


def special_rows() -> list[tuple[str, dict[str, Any]]]:
    """Rows with the fate that each must have."""
    long = "Write forty words on how the old lighthouse keeper spent every single evening of winter"
    held = "List the nine planets known before 2006 with their moons, ordered by their distance"
    return [
        ("not_kept", row(1, "Eliminated.", status=Status.ELIMINATED, reason=EQUAL)),
        ("not_kept", row(2, "Failed.", response="", status=Status.FAILED)),
        ("unanswered", row(3, "Never answered.", response="", answer_finish=Finish.NONE)),
        ("unanswered", row(4, "Answered with nothing.", response=" \n")),
        ("truncated", row(5, "Cut off.", answer_finish=Finish.LENGTH)),
        ("contaminated", row(6, "Fine text.", response="So THE quick, brown fox jumps over it.")),
        ("contaminated", row(7, "Who wrote it?")),
        ("train", row(8, "Fine too.", response="The quick brown fox jumps.")),
        ("train", row(10, long)),
        ("exact_duplicates", row(12, long)),
        ("near_duplicates", row(11, long.upper() + "!")),
        ("exact_duplicates", row(13, long.upper() + "!")),
        ("near_held_out", row(20, held)),
        ("held_out", row(22, held, split=HELD_OUT)),
        ("near_duplicates", row(23, held + "?", split=HELD_OUT)),
        ("near_held_out", row(21, held + "!")),
        ("train", row(30, "Translate.", input="Guten Morgen")),
        ("train", row(31, "Translate.", input="Buenas noches amigo mio")),
        ("train", row(40, f"Awkward {AWKWARD}", response=AWKWARD, input=AWKWARD)),
    ]


def make_run(root: Path, shards: Sequence[Sequence[Mapping[str, Any]]]) -> RunDir:
    """A run directory whose generation is done."""
    run_dir = RunDir(root)
    for stage in ("generate", "dataset"):
        write_json(run_dir.inputs(stage), {"digest": f"digest of {stage}", "inputs": {}})
    run_dir.metrics.mkdir(parents=True)
    units = {}
    for unit, rows in enumerate(shards):
        with TableWriter(run_dir.shard(unit), ROW_COLUMNS, "unit") as writer:
            names = [column.name for column in ROW_COLUMNS]
            writer.append({name: [row[name] for row in rows] for name in names})
            units[run_dir.shard(unit).name] = writer.close({"digest": "digest of generate"})
    counts = count_rows([row for rows in shards for row in rows])
    content = {"counts": counts, "units": units, "exactness": "exact"}
    write_manifest(run_dir, "generate", content)
    return run_dir


def make_config(folder: Path, **sft: Any) -> Config:
    """A small configuration with one benchmark to keep out."""
    benchmark = folder / "benchmark.jsonl"
    fields = {
        "question": "Who wrote it?",
        "choices": {"text": ["a b", "the quick brown fox jumps over"]},
    }
    benchmark.write_text(json.dumps(fields) + "\n", encoding="utf-8")
    model = {"vocab_size": 400, "max_position_embeddings": 256}
    return Config.model_validate(
        {
            "name": "test",
            "dataset": {"decontaminate": [benchmark], "decontamination_ngram": 6},
            "sft": {"model": model, "sequence_length": 256, **sft},
        }
    )


def in_units(rows: Sequence[dict[str, Any]], size: int) -> list[list[dict[str, Any]]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def all_rows() -> list[dict[str, Any]]:
    """Special rows spread among plain ones, so that duplicates stand in different shards."""
    rows = [special for _, special in special_rows()] + plain_rows()
    random.Random(5).shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("built")
    run_dir = make_run(folder / "run", in_units(all_rows(), 9))
    build_dataset(run_dir, make_config(folder), 0, StopFlag())
    return run_dir


def manifest_of(run_dir: RunDir) -> dict[str, Any]:
    manifest = read_manifest(run_dir, "dataset")
    assert manifest is not None
    return manifest


def test_every_row_meets_its_fate_and_the_counts_balance(built: RunDir) -> None:
    manifest = manifest_of(built)
    expected = [fate for fate, _ in special_rows()]
    plain = plain_rows()
    held_out = sum(row["split"] == HELD_OUT for row in plain)
    for fate in set(expected) - {"train", "held_out"}:
        assert manifest["counts"][fate] == expected.count(fate), fate
    assert manifest["counts"]["held_out"] == expected.count("held_out") + held_out
    assert manifest["counts"]["train"] == expected.count("train") + len(plain) - held_out
    assert check_balance(manifest) == []
    manifest["counts"]["train"] += 1
    assert len(check_balance(manifest)) == 2

    with Table.open(built.dataset_rows) as table:
        assert table.verify() == []
        rows = table.read(0, table.num_rows, ["record_id", "use", "instruction", "response"])
    stay = {row["record_id"] for fate, row in special_rows() if fate in ("train", "held_out")}
    stay |= {row["record_id"] for row in plain}
    planned = [row["record_id"] for row in all_rows() if row["record_id"] in stay]
    assert rows["record_id"] == planned, "plan order"
    awkward = rows["record_id"].index(f"{40:032x}")
    assert rows["response"][awkward] == AWKWARD.replace("\ud83d", "\ufffd")


def sequences_of(run_dir: RunDir, group: str) -> Iterator[tuple[int, list[int], list[int]]]:
    """(row of dataset.h5, tokens, labels) of every sequence in the packed file."""
    with h5py.File(run_dir.packed_rows, "r", locking=False) as file:
        columns = [file[group][name][:] for name in ("sequence_ids", "input_ids", "labels")]
    for ids, tokens, labels in zip(*columns, strict=True):
        for row_id in dict.fromkeys(ids[ids >= 0].tolist()):
            chosen = ids == row_id
            yield row_id, tokens[chosen].tolist(), labels[chosen].tolist()


def test_packed_tokens_are_the_prompts_and_responses(built: RunDir) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built.tokenizer, local_files_only=True)
    with Table.open(built.dataset_rows) as table:
        rows = table.read(0, table.num_rows, ["instruction", "input", "response", "use"])
    seen = []
    for use, group in enumerate(("train", "held_out")):
        for index, tokens, labels in sequences_of(built, group):
            assert rows["use"][index] == use
            prompt = alpaca_prompt(rows["instruction"][index], rows["input"][index])
            first = next(i for i, label in enumerate(labels) if label != -100)
            assert labels == [-100] * first + tokens[first:]
            assert (tokens[0], tokens[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
            assert tokens.count(tokenizer.eos_token_id) == 1, "text made a special token"
            assert tokenizer.decode(tokens[1:first]) == prompt
            assert tokenizer.decode(tokens[first:-1]) == rows["response"][index]
            seen.append(index)
    assert sorted(seen) == list(range(len(rows["use"])))


def test_packed_file_is_mappable_and_says_what_it_is(built: RunDir) -> None:
    manifest = manifest_of(built)
    with h5py.File(built.packed_rows, "r", locking=False) as file:
        assert file.attrs["sequence_length"] == 256
        assert file.attrs["template"] == "alpaca"
        assert file.attrs["vocab_size"] == manifest["tokenizer"]["vocab_size"] <= 400
        for group in ("train", "held_out"):
            for dataset in file[group].values():
                assert dataset.dtype == np.int32
                assert dataset.chunks is None
                assert dataset.compression is None
                assert dataset.shape == (manifest["packing"][group]["rows"], 256)
            padding = (file[group]["sequence_ids"][:] == -1).mean()
            assert padding == pytest.approx(manifest["packing"][group]["padding_share"])


def contents(run_dir: RunDir) -> dict[str, bytes]:
    return {
        str(path.relative_to(run_dir.dataset)): path.read_bytes()
        for path in sorted(run_dir.dataset.rglob("*"))
        if path.is_file()
    }


def test_equal_work_gives_equal_files(built: RunDir, tmp_path: Path) -> None:
    again = make_run(tmp_path / "elsewhere", in_units(all_rows(), 9))
    build_dataset(again, make_config(tmp_path), 0, StopFlag())
    assert contents(again) == contents(built)


def test_the_order_of_rows_changes_their_order_alone(built: RunDir, tmp_path: Path) -> None:
    rows = all_rows()[::-1]
    other = make_run(tmp_path / "run", in_units(rows, 7))
    build_dataset(other, make_config(tmp_path), 0, StopFlag())
    assert manifest_of(other)["counts"] == manifest_of(built)["counts"]
    with Table.open(built.dataset_rows) as first, Table.open(other.dataset_rows) as second:
        ids = [table.texts("record_id", 0, table.num_rows) for table in (first, second)]
    assert ids[0] == ids[1][::-1]


def test_a_damaged_missing_or_foreign_shard_is_refused_with_a_remedy(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", in_units(plain_rows(20), 5))
    config, shard = make_config(tmp_path), run_dir.shard(2)
    whole = shard.read_bytes()

    def refusal() -> str:
        with pytest.raises(CorruptFileError) as caught:
            build_dataset(run_dir, config, 0, StopFlag())
        message = str(caught.value)
        assert "unit-00002" in message
        assert "--rerun-from generate" in message
        return message

    middle = len(whole) // 2
    shard.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    refusal()
    shard.write_bytes(whole[:middle])
    refusal()
    shard.unlink()
    assert "missing" in refusal()
    shutil.copy(run_dir.shard(1), shard)
    assert "is not the shard" in refusal()
    assert not run_dir.manifest("dataset").exists()
    shard.write_bytes(whole)
    build_dataset(run_dir, config, 0, StopFlag())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attempted": 21, "kept": 20}, "20 rows read, but generation counts 21 attempted"),
        ({"kept": 20, "failed": 0}, r"1 rows not kept, .* 0 eliminated \+ 0 failed = 0"),
        ({"eliminated": {"equal": 2}}, r"1 rows not kept, .* 2 eliminated \+ 1 failed = 3"),
    ],
)
def test_rows_that_generation_does_not_count_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    rows = [*plain_rows(19), row(1, "Failed.", status=Status.FAILED)]
    run_dir = make_run(tmp_path / "run", in_units(rows, 5))
    manifest = read_manifest(run_dir, "generate")
    assert manifest is not None
    whole = {**manifest, "counts": manifest["counts"] | changes}
    write_manifest(run_dir, "generate", whole)
    with pytest.raises(CorruptFileError, match=f"{said}.*--rerun-from generate"):
        build_dataset(run_dir, make_config(tmp_path), 0, StopFlag())
    assert not run_dir.manifest("dataset").exists()
    assert not run_dir.dataset_rows.exists()


def test_without_rows_to_train_on_it_fails_and_says_why(tmp_path: Path) -> None:
    rows = [
        row(1, "Held out.", split=HELD_OUT),
        row(2, "Gone.", status=Status.ELIMINATED, reason=EQUAL),
    ]
    run_dir = make_run(tmp_path / "run", [rows])
    with pytest.raises(WorkError, match=r"of 2 rows 1 not_kept, 1 held_out; .*seeds\.limit"):
        build_dataset(run_dir, make_config(tmp_path), 0, StopFlag())
    assert not run_dir.manifest("dataset").exists()


def test_too_short_a_row_drops_prompts_and_cuts_responses_in_the_counts(tmp_path: Path) -> None:
    rows = [
        row(1, "A fine day."),
        row(2, "A word. " + "Other words entirely. " * 90),
        row(3, "B", response="many words " * 190),
        row(4, "Held out elsewhere", split=HELD_OUT),
    ]
    run_dir = make_run(tmp_path / "run", [rows])
    build_dataset(run_dir, make_config(tmp_path), 0, StopFlag())
    packing = manifest_of(run_dir)["packing"]["train"]
    assert (packing["sequences"], packing["prompt_too_long"]) == (2, 1)
    assert packing["truncated_responses"] == 1
    tokenizer = AutoTokenizer.from_pretrained(run_dir.tokenizer, local_files_only=True)
    lengths = {index: len(tokens) for index, tokens, _ in sequences_of(run_dir, "train")}
    assert lengths[2] == 256
    cut = next(tokens for index, tokens, _ in sequences_of(run_dir, "train") if index == 2)
    assert tokenizer.eos_token_id not in cut
    with pytest.raises(WorkError, match=r"sft\.sequence_length: 16 tokens are too few"):
        build_dataset(
            make_run(tmp_path / "tiny", [rows]),
            make_config(tmp_path, sequence_length=16),
            0,
            StopFlag(),
        )


def test_a_stop_request_leaves_nothing_half_written(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", in_units(plain_rows(20), 5))
    stop = StopFlag(reason="SIGTERM")
    with pytest.raises(StopRequested):
        build_dataset(run_dir, make_config(tmp_path), 0, stop)
    assert [path.name for path in run_dir.dataset.iterdir()] == ["inputs.json"]


BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path({tests!r})))
import integration.test_dataset as t
t.build_dataset(t.RunDir(Path({root!r})), t.make_config(Path({folder!r})), 0, t.StopFlag())
"""


def test_killed_halfway_and_run_again_it_makes_the_same(built: RunDir, tmp_path: Path) -> None:
    """SIGKILL as soon as the tokenizer's folder is there: rows written, the rest half done."""
    run_dir = make_run(tmp_path / "run", in_units(all_rows(), 9))
    code = BUILD.format(
        tests=str(Path(__file__).parents[1]), root=str(run_dir.root), folder=str(tmp_path)
    )
    process = subprocess.Popen(
        (sys.executable, "-c", code), env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    while not run_dir.tokenizer.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert run_dir.dataset_rows.exists()
    assert not run_dir.manifest("dataset").exists(), "it was killed too late to show anything"
    (run_dir.dataset / ".dataset.h5.0123456789ab.tmp").write_bytes(b"torn")
    build_dataset(run_dir, make_config(tmp_path), 0, StopFlag())
    assert contents(run_dir) == contents(built)
    times = {path: path.stat().st_mtime_ns for path in run_dir.dataset.rglob("*")}
    build_dataset(run_dir, make_config(tmp_path), 0, StopFlag())
    assert {path: path.stat().st_mtime_ns for path in run_dir.dataset.rglob("*")} == times


@pytest.mark.parametrize("locking", [None, "FALSE"])
def test_no_lock_on_a_file_is_asked_for(locking: str | None, built: RunDir, tmp_path: Path) -> None:
    """Every file is locked by somebody else, as if a file system refused all locks."""
    run_dir = make_run(tmp_path / "run", in_units(all_rows(), 9))
    code = BUILD.format(
        tests=str(Path(__file__).parents[1]), root=str(run_dir.root), folder=str(tmp_path)
    )
    environment = {**without_hdf5_locks(locking), "OMP_NUM_THREADS": "1"}
    with locked(run_dir.shards.iterdir()):
        subprocess.run((sys.executable, "-c", code), env=environment, timeout=120, check=True)
    assert contents(run_dir) == contents(built)
    files = (run_dir.shard(0), run_dir.dataset_rows, run_dir.packed_rows)
    with locked(files):
        assert_shown(run_dir, *(inspected(path, environment) for path in files))


def assert_shown(run_dir: RunDir, unit: str, rows: str, packed: str) -> None:
    """Counts, columns and rows of the three files; of a row each column, codes with their names."""
    manifest, first = manifest_of(run_dir), all_rows()[0]
    counts = manifest["counts"]
    assert unit.startswith(f"{run_dir.shard(0)}: 9 rows\n")
    num_rows = counts["train"] + counts["held_out"]
    assert rows.startswith(f"{run_dir.dataset_rows}: {num_rows} rows\n")
    names = [column.name for column in ROW_COLUMNS]
    assert f"  columns: {', '.join(names)}\n" in unit
    assert f"  columns: {', '.join([*names, 'use'])}\n" in rows
    for shown in (unit, rows):
        lines = shown[shown.index("\nrow 0\n") : shown.index("\nrow 1\n")].splitlines()[2:]
        assert [line.split(":")[0].strip() for line in lines][: len(names)] == names
        assert f"  record_id: {first['record_id']}" in lines
        assert f"  instruction: {first['instruction']}" in lines
        assert "  operation: 2 (concretizing)" in lines
        assert "\nrow 2\n" not in shown
    num_sequences = manifest["packing"]["train"]["rows"]
    assert f"train/input_ids: ({num_sequences}, 256) int32\n" in packed
    tokens = next(sequences_of(run_dir, "train"))[1]
    assert f"train tokens: [{', '.join(map(str, tokens[:9]))}, " in packed


def inspected(path: Path, environment: Mapping[str, str]) -> str:
    words = (sys.executable, "-m", "teams_hpc", "inspect", "--rows", "2", str(path))
    shown = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return shown.stdout


TEXTS = ("é", "", "€ 5 or £ 4", "💥", "plain", "naïve\u2028 \x00 \U0001f9d1\u200d\U0001f680\n", "")


def rows_by_documented_lines(document: str, path: Path) -> list[str]:
    """What the five lines of a document, word for word but for the path, read from a file."""
    text = (PROJECT / document).read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(import h5py\n.*?)```", text, re.DOTALL)
    assert lines.split("\n")[3:-1], "five lines"
    lines, count = re.subn(r'"[^"]+\.h5"', repr(str(path)), lines)
    assert count == 1
    names: dict[str, Any] = {}
    exec(lines, names)
    rows: list[str] = names["rows"]
    return rows


@pytest.mark.parametrize("document", ["README.md", "docs/design.md"])
def test_documented_lines_read_every_row(document: str, built: RunDir, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", [[row(n, text) for n, text in enumerate(TEXTS)]])
    assert rows_by_documented_lines(document, run_dir.shard(0)) == list(TEXTS)
    with Table.open(built.dataset_rows) as table:
        expected = table.texts("instruction", 0, table.num_rows)
    assert rows_by_documented_lines(document, built.dataset_rows) == expected
    assert any("💥" in text for text in expected)


def test_exports_hold_the_awkward_row(built: RunDir, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    counts = manifest_of(built)["counts"]
    assert export_dataset(built, "alpaca", path) == counts["train"]
    outputs = [record["output"] for record in json.loads(path.read_text(encoding="utf-8"))]
    assert AWKWARD.replace("\ud83d", "\ufffd") in outputs
