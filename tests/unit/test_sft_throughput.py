"""The numbers of a step: FLOPs against counted ones, MFU, padding; and where they are written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from teams_hpc.config.schema import SftConfig
from teams_hpc.runtime.metrics import read_metrics
from teams_hpc.runtime.ranks import Ranks
from teams_hpc.sft.data import Batch
from teams_hpc.sft.metrics_log import MetricsLog
from teams_hpc.sft.throughput import Meter, ModelFlops, peak_memory_bytes, peak_tflops
from teams_hpc.sft.world import World

RANKS = Ranks(rank=0, world_size=4, local_rank=0, local_world_size=4)


class FourAlike(World):
    """A world in which this process's numbers are everybody's."""

    def max(self, value: float) -> float:
        return value


def llama(*, tie: bool, **values: Any) -> Any:
    shape = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**(shape | heads | values), tie_word_embeddings=tie))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("length", [16, 64])
def test_flops_are_those_that_torch_counts(tie: bool, length: int) -> None:
    model = llama(tie=tie)
    model.set_attn_implementation("eager")  # its products are all seen
    tokens = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    needed = ModelFlops.of(model).needed(length, length**2)
    norms = 6 * length * sum(p.numel() for p in model.parameters() if p.ndim == 1)
    # Rotary angles are a product of their own, computed once and without a gradient.
    assert counter.get_total_flops() == pytest.approx(needed - norms, rel=0.005)


def test_llama_2_7b_needs_46_gflop_a_token_at_4096() -> None:
    with torch.device("meta"):
        shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
        model = llama(tie=False, vocab_size=32000, **shape, **heads)
    flops = ModelFlops.of(model)
    assert flops.num_parameters == 6_738_415_616 - 32_000 * 4096
    assert flops.needed(4096, 4096**2) / 4096 == pytest.approx(39.644e9 + 6.442e9, rel=1e-4)


def test_pairs_are_counted_within_sequences() -> None:
    batch = Batch(
        input_ids=np.zeros((1, 8), dtype=np.int64),
        position_ids=np.array([[0, 1, 2, 3, 4, 0, 1, 0]]),
        targets=np.zeros((1, 8), dtype=np.int64),
        sequence_ids=np.array([[0, 0, 0, 0, 0, 1, 1, -1]]),
    )
    assert batch.num_pairs == 5**2 + 2**2


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA RTX A4000", None),
        (None, None),
    ],
)
def test_the_peak_is_known_or_stated_or_nothing(device: str | None, expected: float | None) -> None:
    assert peak_tflops(SftConfig(), device) == expected
    assert peak_tflops(SftConfig(dtype="float32"), device) is None
    assert peak_tflops(SftConfig(peak_tflops=2.5, dtype="float32"), device) == 2.5


def test_a_line_says_speed_padding_memory_and_mfu() -> None:
    sft = SftConfig(global_batch_rows=8, sequence_length=100, peak_tflops=2e-9)
    model = llama(tie=True)
    meter = Meter.of(sft, FourAlike(ranks=RANKS, device="cpu"), model)
    line = meter.measure(tokens=600.0, pairs=30_000.0, seconds=2.0)
    assert line["tokens_per_s"] == 300.0
    assert line["tokens_per_s_per_process"] == 75.0
    assert line["padding_share"] == 0.25
    flops = 6 * model.num_parameters() * 600 + 12 * 3 * 32 * 30_000
    assert line["mfu"] == pytest.approx(flops / 2.0 / (4 * 2000.0))
    assert 0.05 < line["peak_memory_gb"] < 100
    unknown = Meter.of(SftConfig(), FourAlike(ranks=RANKS, device="cpu"), model)
    assert "mfu" not in unknown.measure(1.0, 1.0, 1.0)


def test_memory_is_this_process_alone_and_its_peak() -> None:
    before = peak_memory_bytes("cpu")
    block = np.ones(2 * before // 8)
    peak = peak_memory_bytes("cpu")
    assert peak > 2 * before
    del block
    assert peak_memory_bytes("cpu") > 0.99 * peak  # the kernel counts in batches


def events(folder: Path, name: str) -> list[tuple[int, float]]:
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(name)]


def write(folder: Path, start: int, stop: int, value: float) -> None:
    log = MetricsLog(folder, start, enabled=True)
    if start == 0:
        log.append({"step": 0, "held_out_loss": value})
    for step in range(start + 1, stop + 1):
        log.append({"step": step, "loss": value, "held_out_loss": None})


def test_steps_that_are_done_again_are_not_doubled(tmp_path: Path) -> None:
    """Twice from the beginning, then from step 3, never closed: as after kills."""
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    write(tmp_path, 0, 2, 1.0)
    write(tmp_path, 0, 5, 2.0)
    write(tmp_path, 3, 6, 3.0)
    expected = [(1, 2.0), (2, 2.0), (3, 2.0), (4, 3.0), (5, 3.0), (6, 3.0)]
    assert events(tmp_path, "loss") == expected
    assert events(tmp_path, "held_out_loss") == [(0, 2.0)]
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [(line["step"], line["loss"]) for line in lines] == expected


def test_without_tensorboard_or_off_the_first_process_no_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write(tmp_path, 0, 2, 1.0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    other = MetricsLog(tmp_path, 1, enabled=False)
    other.append({"step": 2, "loss": 1.0})
    other.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
