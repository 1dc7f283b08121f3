"""Exports: what others read is what the data set holds, in plan order, whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from teams_hpc.dataset.build import DATASET_COLUMNS
from teams_hpc.dataset.export import export_rows
from teams_hpc.errors import CorruptFileError, TeamsError, UsageError
from teams_hpc.storage.atomic import write_json
from teams_hpc.storage.run_dir import RunDir, write_manifest
from teams_hpc.storage.shards import TableWriter

TEXTS = ['"quotes" \\ and \n lines', "\x00 \x1f \u2028 \u0085", "naïve 💥 日本", "", "{braces}"]
NUM_ROWS = 2500


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    """A finished data set; every third row is held out."""
    run_dir = RunDir(tmp_path / "run")
    columns: dict[str, list[Any]] = {
        column.name: [""] * NUM_ROWS if column.is_text else [1] * NUM_ROWS
        for column in DATASET_COLUMNS
    }
    columns["record_id"] = [f"{number:032x}" for number in range(NUM_ROWS)]
    columns["instruction"] = [f"{TEXTS[number % 5]} {number}" for number in range(NUM_ROWS)]
    columns["input"] = [TEXTS[number % 4] for number in range(NUM_ROWS)]
    columns["response"] = [TEXTS[number % 3] for number in range(NUM_ROWS)]
    columns["use"] = [int(number % 3 == 2) for number in range(NUM_ROWS)]
    columns["verdict_score"] = [float("nan"), *[0.75] * (NUM_ROWS - 1)]
    with TableWriter(run_dir.dataset_rows, DATASET_COLUMNS, "dataset") as writer:
        writer.append(columns)
        writer.close({})
    write_json(run_dir.inputs("dataset"), {"digest": "d", "inputs": {}})
    write_manifest(run_dir, "dataset", {})
    return run_dir


def expected(*uses: int) -> list[tuple[str, str, str]]:
    numbers = [number for number in range(NUM_ROWS) if int(number % 3 == 2) in uses]
    return [(f"{TEXTS[n % 5]} {n}", TEXTS[n % 4], TEXTS[n % 3]) for n in numbers]


def test_alpaca_is_one_json_list(run_dir: RunDir) -> None:
    path, count = export_rows(run_dir, "alpaca", None)
    records = json.loads(path.read_text(encoding="utf-8"))
    assert path.parent == run_dir.dataset
    assert len(records) == count
    assert [tuple(record.values()) for record in records] == expected(0)
    assert all(list(record) == ["instruction", "input", "output"] for record in records)


def test_chat_is_one_conversation_a_line(run_dir: RunDir, tmp_path: Path) -> None:
    path, count = export_rows(run_dir, "chat", tmp_path / "new" / "chat.jsonl", "held_out")
    with path.open(encoding="utf-8", newline="\n") as stream:
        conversations = [json.loads(line)["messages"] for line in stream]
    assert len(conversations) == count
    for (instruction, input_text, response), messages in zip(
        expected(1), conversations, strict=True
    ):
        user = f"{instruction}\n\n{input_text}" if input_text else instruction
        assert messages == [
            {"role": "user", "content": user},
            {"role": "assistant", "content": response},
        ]


def test_parquet_has_names_for_codes_and_all_rows(run_dir: RunDir, tmp_path: Path) -> None:
    path, count = export_rows(run_dir, "parquet", tmp_path / "rows.parquet", "all")
    table = pq.read_table(path)
    assert count == table.num_rows == NUM_ROWS
    columns = table.to_pydict()
    texts = zip(columns["instruction"], columns["input"], columns["response"], strict=True)
    assert list(texts) == expected(0, 1)
    assert columns["record_id"] == [f"{number:032x}" for number in range(NUM_ROWS)]
    assert columns["use"][:3] == ["train", "train", "held_out"]
    first = {name: columns[name][0] for name in ("operation", "split", "answer_finish", "step")}
    assert first == {
        "operation": "deepening",
        "split": "policy_select",
        "answer_finish": "stop",
        "step": 1,
    }


def test_wrong_use_is_refused_and_leaves_nothing(run_dir: RunDir, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for words, message in (
        (("csv", None), "--format: 'csv' is none of alpaca, chat, parquet"),
        (("alpaca", None, "test"), "--rows: 'test' is none of train, held_out, all"),
        (("alpaca", tmp_path), "is a folder"),
        (("alpaca", tmp_path / "file" / "a.json"), "can't write .*a.json: "),
        (("parquet", tmp_path / "file" / "a.parquet"), "can't write .*a.parquet: "),
    ):
        with pytest.raises(UsageError, match=message):
            export_rows(run_dir, *words)
    with pytest.raises(UsageError, match="no finished data set"):
        export_rows(RunDir(tmp_path / "none"), "alpaca", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_a_damaged_data_set_is_not_exported(run_dir: RunDir, tmp_path: Path) -> None:
    content = bytearray(run_dir.dataset_rows.read_bytes())
    content[len(content) // 2] ^= 1
    run_dir.dataset_rows.write_bytes(content)
    with pytest.raises(CorruptFileError, match="--rerun-from dataset") as caught:
        export_rows(run_dir, "alpaca", tmp_path / "out.json")
    assert isinstance(caught.value, TeamsError)
    assert not (tmp_path / "out.json").exists()
