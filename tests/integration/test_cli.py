"""The command line as a person meets it: help, refusals, and what is left on disk after them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def command(folder: Path, *words: str, **environment: str) -> tuple[int, str]:
    found = subprocess.run(
        (sys.executable, "-X", "importtime", "-m", "teams_hpc", *words),
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = found.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time")}
    said = [line for line in lines if not line.startswith("import time")]
    assert not imported & {"torch", "transformers", "h5py"}
    return found.returncode, "\n".join([found.stdout, *said]).strip()


def test_help_teaches_every_command(tmp_path: Path) -> None:
    code, output = command(tmp_path, "--help")
    assert code == 0
    names = (
        "run submit forecast stage status logs cancel report verify export inspect doctor config"
    )
    for name in names.split():
        assert name in output
    assert "144" in output


BAD_SEEDS = {
    "empty.jsonl": (b"", "empty"),
    "blank.txt": (b"\n \n", "blank.txt"),
    "no-instruction.jsonl": (b'{"instruction": "Sing."}\n{"prompt": "x"}\n', "line 2"),
    "broken-line.jsonl": (b'{"instruction": "Sing."}\n{"instruction": \n', "line 2"),
    "broken-utf8.txt": (b"Sing a song.\nSing \xff\xfe louder.\n", "line 2"),
}


@pytest.mark.parametrize("name", BAD_SEEDS)
def test_bad_seeds_are_refused_with_their_line(tmp_path: Path, name: str) -> None:
    content, expected = BAD_SEEDS[name]
    (tmp_path / name).write_bytes(content)
    code, output = command(tmp_path, "run", str(QUICKSTART), f"seeds.path={name}")
    assert code == 2
    assert expected in output
    assert name in output
    assert len(output.splitlines()) <= 12
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["generate.unitsize=3"], "did you mean unit_size?"),
        (["policy.iterations=soon"], "policy.iterations"),
        (["generate.num_steps=0"], "generate.num_steps"),
        (["seeds.path=nowhere.jsonl"], "seeds.path: no file"),
        (["expert.kind=transformers", "expert.model=nowhere"], "expert.model: no model folder"),
        (["sft.model=nowhere"], "sft.model: no model folder"),
        (["sft.attention=flash_attention_2"], "flash-attn"),
        (["evaluate.lm_eval_path=nowhere"], "evaluate.lm_eval_path: no folder"),
        (["dataset.decontaminate=[nowhere.txt]"], "dataset.decontaminate: no file"),
        (["site.executor=slurm"], "not inside an allocation"),
        (["site.num_sft_ranks=3", "sft.global_batch_rows=8"], "can't be shared equally by 3"),
        (["--rerun-from", "training"], "no stage 'training'"),
        (["run_dir=/proc/none/here"], "run_dir: can't write /proc/none"),
        (['run_dir="a\\0b"'], "NUL"),
        (["run_dir=" + 300 * "a"], "longer than the file system takes"),
        (["seeds.path=" + 300 * "a"], "longer than the file system takes"),
        (["run_dir=~nobody-of-that-name/run"], "no such home"),
    ],
)
def test_bad_configuration_is_refused_before_anything_is_written(
    tmp_path: Path, words: list[str], expected: str
) -> None:
    code, output = command(tmp_path, "run", str(QUICKSTART), *words)
    assert code == 2, output
    assert expected in output
    assert len(output.splitlines()) <= 12
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


FILES_OF_A_MODEL = {"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": None}, "has no config.json"),
        ({"config.json": "{"}, "config.json is damaged"),
        ({"config.json": "[]"}, "config.json is damaged"),
        ({"model.safetensors": None}, "has no *.safetensors"),
        ({"tokenizer.json": None}, "has no tokenizer"),
    ],
)
@pytest.mark.parametrize("key", ["expert.model", "sft.model"])
def test_half_a_model_is_refused_before_hours_of_work(
    tmp_path: Path, key: str, files: dict[str, str | None], expected: str
) -> None:
    (tmp_path / "half").mkdir()
    for name, text in (FILES_OF_A_MODEL | files).items():
        if text is not None:
            (tmp_path / "half" / name).write_text(text)
    kind = ["expert.kind=transformers"] if key == "expert.model" else []
    code, output = command(tmp_path, "run", str(QUICKSTART), *kind, f"{key}=half")
    assert code == 2, output
    assert f"{key}: {tmp_path}/half" in output
    assert expected in output
    assert not (tmp_path / "runs").exists()


def test_a_disk_without_room_for_the_first_file_is_no_place_for_a_run(tmp_path: Path) -> None:
    """The limit on the size of files stands for a full disk: it takes names, but no bytes."""
    words = ("run", str(QUICKSTART))
    done = subprocess.run(
        ("sh", "-c", 'ulimit -f 0; exec "$@"', "-", sys.executable, "-m", "teams_hpc", *words),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: run_dir: can't write {tmp_path}/runs/")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_missing_key_is_named_and_a_file_in_the_way_too(tmp_path: Path) -> None:
    words = ["expert.kind=http", "expert.base_url=http://127.0.0.1:9/v1", "expert.model=m"]
    code, output = command(
        tmp_path, "run", str(QUICKSTART), *words, "expert.api_key_env=NO_SUCH_KEY"
    )
    assert code == 2
    assert "NO_SUCH_KEY" in output
    (tmp_path / "file").write_text("")
    code, output = command(tmp_path, "run", str(QUICKSTART), "run_dir=file/run")
    assert code == 2
    assert "is a file, not a folder" in output


def test_wrong_commands_are_refused(tmp_path: Path) -> None:
    for words, expected in (
        (("run",), "CONFIG"),
        (("run", "nowhere.yaml"), "no config file"),
        (("status", "nowhere"), "not a run directory"),
        (("inspect", "nowhere.h5"), "no file"),
        (("fly",), "fly"),
    ):
        code, output = command(tmp_path, *words)
        assert code == 2, words
        assert expected in output
        assert "Traceback" not in output


def test_config_show_and_schema(tmp_path: Path) -> None:
    code, output = command(tmp_path, "config", "show", str(QUICKSTART), "sft.max_steps=7")
    assert code == 0
    assert "max_steps: 7" in output
    code, output = command(tmp_path, "config", "schema")
    assert code == 0
    schema = json.loads(output)
    assert "budget" in schema["properties"]
