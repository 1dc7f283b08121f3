"""Room for the fine-tuning: by hand for known models, and against what torch really allocates."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from teams_hpc.config import Config, ModelShape, load_config
from teams_hpc.errors import ConfigError
from teams_hpc.pipeline.room import (
    GpuRoom,
    disk_room,
    gpu_room,
    num_parameters,
    room_faults,
    room_lines,
)
from teams_hpc.pipeline.submit import submission_scripts
from teams_hpc.report.doctor import diagnose
from teams_hpc.sft.engine import token_loss_sum

_LLAMA = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_2 = ModelShape(
    **_LLAMA,
    vocab_size=32_000,
    intermediate_size=11_008,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
LLAMA_3 = ModelShape(
    **_LLAMA,
    vocab_size=128_256,
    intermediate_size=14_336,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
N2, N3 = 6_738_415_616, 8_030_261_248


def make(shape: ModelShape, ranks: int = 4, **sft: Any) -> Config:
    values = {
        "attention": "flash_attention_2",
        "sequence_length": 4096,
        "global_batch_rows": 64,
        "micro_batch_rows": 4,
        "activation_checkpointing": True,
        **sft,
    }
    site = {"gpus_per_node": 4, "num_sft_ranks": ranks}
    return Config(name="a", sft={"model": shape, **values}, site=site)


def room(shape: ModelShape, ranks: int = 4, **sft: Any) -> GpuRoom:
    return gpu_room(make(shape, ranks, **sft), shape, ranks)


def test_llama_2_7b_on_four_gpus() -> None:
    """The example of docs/design.md."""
    found, tokens = room(LLAMA_2), 4 * 4096
    assert found.parameters == 2 * N2 / 4
    assert found.optimizer == 12 * N2 / 4
    assert found.gradients == 4 * N2 / 4
    assert found.buffers == 2 * (1e9 + 2 * 5e8)
    assert found.activations == tokens * (32 * 2 * 4096 + 8 * 4096)
    assert found.layer == tokens * (186_368 + 2 * (2 * 11_008 + 4096))
    assert found.loss == tokens * 12 * 32_000
    assert found.host == 0
    assert found.total / 1e9 == pytest.approx(47.4, abs=0.05)


def test_llama_3_8b_on_eight_gpus() -> None:
    found, tokens = room(LLAMA_3, 8, micro_batch_rows=2), 2 * 4096
    assert found.states == 18 * N3 / 8
    assert found.layer == tokens * (200_704 + 2 * (2 * 14_336 + 4096))
    assert found.loss / 1e9 == pytest.approx(12.61, abs=0.005)
    assert found.total / 1e9 == pytest.approx(39.1, abs=0.05)


def test_offloading_moves_states_to_the_host() -> None:
    optimizer = room(LLAMA_2, offload_optimizer=True)
    assert (optimizer.optimizer, optimizer.gradients, optimizer.update) == (0, 0, 0)
    assert optimizer.parameters == 2 * N2 / 4
    assert optimizer.host == 20 * N2 / 4
    both = room(LLAMA_2, offload_optimizer=True, offload_parameters=True)
    assert both.states == 0
    assert both.host == 22 * N2 / 4


def test_stage_2_type_attention_and_checkpointing() -> None:
    two = room(LLAMA_2, zero_stage=2)
    assert two.parameters == 2 * N2
    assert two.buffers == 2 * 1e9
    assert two.update == 4 * N2 / 4
    whole = room(LLAMA_2, dtype="float32")
    assert whole.states == 16 * N2 / 4  # trained in place: no copy of the weights
    assert room(LLAMA_2, dtype="float32", zero_stage=2).states == 4 * N2 + 16 * N2 / 4
    assert whole.loss == room(LLAMA_2).loss
    kept = room(LLAMA_2, activation_checkpointing=False)
    assert kept.activations == 4 * 4096 * (32 * 186_368 + 8 * 4096)
    assert kept.layer == 4 * 4096 * 2 * (2 * 11_008 + 4096)
    masked = room(LLAMA_3, activation_checkpointing=False, attention="sdpa")
    # Keys and values repeated four times, and a mask of numbers in each layer.
    more = 32 * 2 * (2 * (4096 - 1024) + 4096) + 4096
    flash = room(LLAMA_3, activation_checkpointing=False)
    assert masked.activations - flash.activations == 4 * 4096 * more


def test_the_micro_batch_that_is_really_used_counts() -> None:
    assert room(LLAMA_2, 32).loss == room(LLAMA_2, 4, micro_batch_rows=2).loss
    few, one = room(LLAMA_2, 4, micro_batch_rows=1), room(LLAMA_2, 64)
    assert few.activations == one.activations
    assert few.work == few.update == 4e9  # larger here than what a pass needs
    assert one.work == one.activations + one.loss


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        result = torch.empty_like(q.transpose(1, 2))
        ctx.save_for_backward(q, k, v, result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _really_allocated(shape: ModelShape, dtype: torch.dtype, length: int, checkpoint: bool) -> int:
    """Peak of a forward and backward pass, without parameters and their gradients, in bytes."""
    ALL_ATTENTION_FUNCTIONS.register(
        "counted", lambda module, q, k, v, mask, **_: (_Attention.apply(q, k, v), None)
    )
    default = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(LlamaConfig(**shape.model_dump()))
        finally:
            torch.set_default_dtype(default)
        model.set_attn_implementation("counted")
        if checkpoint:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():  # DeepSpeed takes each gradient at once
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        tokens = torch.zeros(1, length, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(model.train())
        with tracker:
            logits = model(input_ids=tokens, use_cache=False).logits
            loss = token_loss_sum(logits, tokens)
            del logits
            loss.backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return sum(size for kind, size in peak.items() if str(kind).endswith(("ACT", "TEMP")))


@pytest.mark.filterwarnings("ignore:Expected a tensor or a traceable wrapper:UserWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("vocab_size", [1_000, 64_000])
def test_activations_and_loss_are_what_torch_allocates(
    dtype: str, checkpoint: bool, vocab_size: int
) -> None:
    values = {"vocab_size": vocab_size, "hidden_size": 512, "intermediate_size": 1600}
    shape = LLAMA_3.model_copy(update={**values, "num_hidden_layers": 3})
    sft = {"dtype": dtype, "micro_batch_rows": 1, "activation_checkpointing": checkpoint}
    estimated = room(shape, 64, **sft)
    really = _really_allocated(shape, getattr(torch, dtype), 4096, checkpoint)
    work = estimated.activations + max(estimated.layer, estimated.loss)
    # Rotary angles and statistics of norms are left out; what a phase has freed is counted on.
    assert 0.88 < really / work < 1.04


def test_disk_holds_checkpoints_a_conversion_and_the_model() -> None:
    disk = disk_room(make(LLAMA_2, keep_checkpoints=2))
    assert disk.checkpoints == 3 * 12 * N2
    assert disk.conversion == 24 * N2
    assert disk.model == 2 * N2
    assert disk.total / 1e9 == pytest.approx(417.8, abs=0.1)
    assert disk_room(make(LLAMA_2, zero_stage=2)).checkpoint == 14 * N2


def test_a_folder_tells_its_shape(tmp_path: Path) -> None:
    def write(**values: Any) -> Config:
        (tmp_path / "config.json").write_text(json.dumps(values))
        return Config(name="a", sft={"model": tmp_path})

    (tmp_path / "a.safetensors").write_bytes(b"1234")
    whole = LLAMA_3.model_dump() | {"model_type": "llama", "rope_theta": 5e5}
    assert num_parameters(write(**whole)) == N3
    old = LLAMA_2.model_dump() | {"model_type": "llama"}
    del old["num_key_value_heads"], old["tie_word_embeddings"]
    assert num_parameters(write(**old)) == N2
    assert num_parameters(write(**whole | {"model_type": "other"})) == 2
    assert num_parameters(write(model_type="llama")) == 2
    assert num_parameters(write(**whole | {"vocab_size": 256})) == 2  # we would build none such


def load(folder: Path, *words: str) -> Config:
    """Llama-2-7B on the A100 site, as `submit` sees it."""
    path = folder / "run.yaml"
    site = Path(__file__).parents[2] / "configs" / "sites" / "slurm-a100.yaml"
    content = {"name": "a", "extends": str(site), "sft": make(LLAMA_2).sft.model_dump(mode="json")}
    path.write_text(json.dumps(content))
    return load_config(path, [f"run_dir={folder / 'run'}", "site.gpu_memory_gb=80", *words])


def test_what_can_not_fit_is_refused_with_the_keys_to_change(tmp_path: Path) -> None:
    assert room_faults(load(tmp_path)) == []
    config = load(tmp_path, "sft.activation_checkpointing=false")
    (fault,) = room_faults(config)
    assert fault.startswith("site.gpu_memory_gb: a GPU has 80 GB, but the fine-tuning needs about")
    for key in (
        "sft.micro_batch_rows from 4",
        "sft.activation_checkpointing=true",
        "num_sft_ranks",
    ):
        assert key in fault
    assert "sft.zero_stage" not in fault
    shown = submission_scripts(config, lambda *_: None)
    assert "GB of 80 GB: weights 1.7" in next(shown)
    with pytest.raises(ConfigError, match=r"site\.gpu_memory_gb"):
        next(shown)
    assert any(line.what == "site.gpu_memory_gb" and line.is_fault for line in diagnose(config))
    assert room_faults(config.model_copy(update={"site": Config(name="b").site})) == []
    unknown = load(tmp_path, "sft.activation_checkpointing=false", "site.gpu_memory_gb=null")
    assert room_faults(unknown) == []


def test_what_is_offloaded_must_fit_into_the_nodes(tmp_path: Path) -> None:
    words = ("sft.offload_optimizer=true", "site.gpus_per_node=8")
    assert room_faults(load(tmp_path, *words)) == []
    (fault,) = room_faults(load(tmp_path, *words, "site.slurm.stages.sft.mem_gb=120"))
    # 20 bytes of each parameter and 4 GB for each of 8 processes: 166.8 x 10^9 bytes.
    assert fault.startswith("site.slurm.stages.sft.mem_gb: a job of the fine-tuning gets 120 GB")
    assert "needs about 155" in fault


def test_the_estimate_is_shown(tmp_path: Path) -> None:
    config = load(tmp_path)
    lines = room_lines(config)
    assert lines[0] == "room for the fine-tuning of 6.74 B parameters, estimated:"
    assert lines[1].startswith("  each of 8 GPUs: 32.3 GB of 80 GB: weights 1.7, optimizer 10.1,")
    assert lines[2].startswith("  disk: 418 GB: 3 checkpoints 243, conversion")
    assert "room for" in next(submission_scripts(config, lambda *_: None))
    absent = load(tmp_path, "sft.model=nowhere")
    assert room_lines(absent)[0].startswith("room for the fine-tuning: not known")
    small = Config(name="a", site={"gpus_per_node": 1}, run_dir=tmp_path / "run")
    found = {line.what: line.found for line in diagnose(small) if line.level == "ok"}
    assert "disk" in found


CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("llama2-7b-a100", LLAMA_2),
        ("llama2-7b-a100-40gb", LLAMA_2),
        ("llama3-8b-a100", LLAMA_3),
        ("llama3-8b-a100-40gb", LLAMA_3),
        ("paper-llama1-7b", LLAMA_2.model_copy(update={"max_position_embeddings": 2048})),
    ],
)
def test_shipped_configs_fit_on_one_to_eight_nodes(
    name: str, shape: ModelShape, tmp_path: Path
) -> None:
    """With the numbers that stand in their comments."""
    path = CONFIGS / f"{name}.yaml"
    said = dict(re.findall(r"(\d+) GPUs: (\d+) GB", path.read_text()))
    assert len(said) == (1 if name.startswith("paper") else 5)
    words = [f"sft.model={json.dumps(shape.model_dump())}", f"run_dir={tmp_path / 'run'}"]
    assert load_config(path).site.gpu_memory_gb == (40 if "40gb" in name else 80)
    for gpus in (4, 8):
        for nodes in (1, 2, 4, 8):
            ranks = gpus * nodes
            site = [f"site.gpus_per_node={gpus}", f"site.num_sft_ranks={ranks}"]
            config = load_config(path, words + site)
            assert room_faults(config) == []
            if str(ranks) in said:
                total = gpu_room(config, shape, ranks).total
                assert f"{total / 1e9:.0f}" == said[str(ranks)]
