"""What a step trains on and how fast: batch shares, order of rows, targets, learning rate."""

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teams_hpc.config import Config
from teams_hpc.config.schema import SftConfig
from teams_hpc.errors import CorruptFileError, UsageError, WorkError
from teams_hpc.sft.data import IGNORED, PackedRows, RowOrder
from teams_hpc.sft.deepspeed_config import deepspeed_config, plan_batch
from teams_hpc.sft.schedule import Schedule


@given(
    rows=st.integers(1, 96), world_size=st.integers(1, 12), most=st.integers(1, 40), data=st.data()
)
def test_batch_is_divided_exactly_or_refused_with_sizes_that_work(rows, world_size, most, data):
    sft = SftConfig(global_batch_rows=rows, micro_batch_rows=most)
    if rows % world_size:
        with pytest.raises(UsageError) as refused:
            plan_batch(sft, world_size)
        listed = str(refused.value).partition("one of ")[2].partition(", or")[0]
        sizes = [int(word) for word in listed.split(", ")]
        assert sizes == [size for size in range(1, rows + 1) if rows % size == 0]
        return
    plan = plan_batch(sft, world_size)
    assert plan.micro_rows * plan.accumulation_steps * world_size == rows
    assert plan.micro_rows <= most
    larger = range(plan.micro_rows + 1, most + 1)
    assert not any((rows // world_size) % size == 0 for size in larger)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deepspeed_config_follows_ours(stage, dtype):
    sft = SftConfig(
        zero_stage=stage,
        dtype=dtype,
        global_batch_rows=24,
        micro_batch_rows=5,
        grad_clip=0.7,
        offload_optimizer=True,
        offload_parameters=stage == 3,
    )
    made = deepspeed_config(Config(name="x", sft=sft), 2, "cuda")
    assert made["train_batch_size"] == 24
    assert made["train_micro_batch_size_per_gpu"] == 4
    assert made["gradient_accumulation_steps"] == 3
    assert made["gradient_clipping"] == 0.7
    assert made["bf16"]["enabled"] == (dtype == "bfloat16")
    assert made["zero_allow_untested_optimizer"] is True
    zero = made["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert ("offload_param" in zero) == (stage == 3)


def test_deepspeed_config_needs_no_torch():
    code = (
        "import sys, teams_hpc.sft.deepspeed_config\n"
        "sys.exit(bool({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@given(rows=st.integers(1, 50), batch=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation_of_all_rows(rows, batch, seed):
    order = RowOrder(rows, seed)
    steps = math.ceil(3 * rows / batch)
    sequence = np.concatenate([order.rows(step * batch, batch) for step in range(steps)])
    for epoch in range(3):
        assert sorted(sequence[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_order_is_a_function_of_seed_and_place_alone():
    walked, fresh = RowOrder(30, 5), RowOrder(30, 5)
    for step in range(9):
        last = walked.rows(step * 7, 7)
    np.testing.assert_array_equal(last, fresh.rows(56, 7))
    assert list(RowOrder(30, 6).rows(0, 30)) != list(RowOrder(30, 5).rows(0, 30))
    assert list(fresh.rows(0, 30)) != list(fresh.rows(30, 30))
    with pytest.raises(WorkError, match="no training rows"):
        RowOrder(0, 5)


def _write_packed(path: Path, length: int = 8) -> None:
    """One row: a sequence of five tokens, one of two, one of padding."""
    columns = {
        "input_ids": [5, 6, 7, 8, 9, 3, 4, 0],
        "labels": [-100, -100, 7, 8, 9, -100, 4, -100],
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 0],
        "sequence_ids": [0, 0, 0, 0, 0, 1, 1, -1],
    }
    with h5py.File(path, "w") as file:
        file.attrs.update(pad_token_id=0, vocab_size=10, sequence_length=length)
        for group, count in (("train", 3), ("held_out", 0)):
            for name, row in columns.items():
                values = np.array([row] * count, dtype="<i4").reshape(count, length)
                file.create_dataset(f"{group}/{name}", data=values)


def test_targets_are_the_next_token_within_a_sequence(tmp_path):
    path = tmp_path / "packed.h5"
    _write_packed(path)
    rows = PackedRows.open(path, "train", 8)
    batch = rows.read([0, 2])
    assert len(rows) == 3
    assert len(PackedRows.open(path, "held_out", 8)) == 0
    x = IGNORED
    assert batch.targets[1].tolist() == [x, 7, 8, 9, x, 4, x, x]
    assert batch.num_loss_tokens == 8
    assert batch.num_tokens == 14
    assert batch.without_loss().num_loss_tokens == 0
    with pytest.raises(CorruptFileError, match="sequence_length 16"):
        PackedRows.open(path, "train", 16)
    with pytest.raises(CorruptFileError, match="rerun-from dataset"):
        PackedRows.open(tmp_path / "absent.h5", "train", 8)


def test_schedule_length():
    def steps(**values):
        schedule = Schedule.of(SftConfig(global_batch_rows=8, **values), num_rows=21)
        return schedule.num_steps, schedule.stop_step

    assert steps(num_epochs=3.0) == (8, 8)
    assert steps(num_epochs=0.01) == (1, 1)
    assert steps(num_epochs=3.0, max_steps=5) == (8, 5)
    assert steps(num_epochs=3.0, max_steps=50) == (8, 8)
    assert steps(schedule_steps=40, max_steps=7) == (40, 7)


def test_learning_rate_rises_then_follows_a_cosine_to_zero():
    schedule = Schedule(num_steps=110, stop_step=50, warmup_steps=10, peak=2.0)
    rates = [schedule.learning_rate(step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[110] == pytest.approx(0.0)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    flat = Schedule(num_steps=4, stop_step=4, warmup_steps=0, peak=1.0)
    assert [flat.learning_rate(step) for step in (0, 2)] == pytest.approx([1.0, 0.5])
