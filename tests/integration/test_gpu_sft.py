"""`benchmarks/gpu_sft.py`: its dry mode, and what it says where there is no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TIMEOUT_S = 240.0


def start(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_sft.py"), *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
    )


def test_dry_it_does_every_step_and_writes_a_dated_result(tmp_path: Path) -> None:
    done = start(
        "--dry", "--results", str(tmp_path), "--peak-tflops", "1", "--peer-python", "false"
    )
    assert done.returncode == 0, done.stderr
    assert "trl is LEFT OUT" in done.stdout

    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-gpu-sft-dry.json")
    report = json.loads(path.read_text())
    assert report["is_dry"] is True
    assert report["command"][1:3] == ["benchmarks/gpu_sft.py", "--dry"]
    # The same attention twice: no difference, but both differ from float32.
    equality = report["equality"]
    assert equality["is_equal"] is True
    assert equality["flash_from_sdpa"]["logits"]["largest"] == 0.0
    assert equality["gradients_from_float32"]["flash"]["relative"] > 0.0
    assert report["verdict"]["flash_equals_sdpa"] is True
    assert report["verdict"]["is_never_below_trl"] is None

    lines = [line["repeats"][0] for line in report["results"].values()]
    assert len(lines) == 2
    for line in lines:
        assert line["tokens_per_s_per_gpu"] > 0.0
        assert 0.0 < line["mfu"] < line["mfu_field"]
    # Activation checkpointing changes no loss.
    assert lines[0]["losses"] == lines[1]["losses"]
    assert len(lines[0]["losses"]) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = start("--results", str(tmp_path))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "--dry" in done.stderr
    assert not list(tmp_path.iterdir())


def test_operations_of_llama_2_7b_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """6.74 billion parameters; PaLM's formula, 6 N + 12 L H Q T, worked out by hand."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("gpu_sft", BENCHMARKS / "gpu_sft.py")
    assert spec is not None
    assert spec.loader is not None
    gpu_sft = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_sft", gpu_sft)
    spec.loader.exec_module(gpu_sft)
    shape = gpu_sft.LLAMA_2_7B
    assert shape.parameters == 6_738_415_616
    packed, field = shape.operations(tokens=4096, squares=4096**2)
    assert field / 4096 == 6 * (6_738_415_616 - 32000 * 4096 - 65 * 4096) + 12 * 32 * 4096 * 4096
    # One sequence as long as the row: causal attention is half of what the field counts.
    assert field - packed == pytest.approx(6 * 32 * 4096 * 4096 * 4096)
    assert gpu_sft.peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu_sft.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu_sft.layers_that_fit(shape, 85e9, num_gpus=8) == 32
    assert 8 <= gpu_sft.layers_that_fit(shape, 85e9, num_gpus=1) < 16
