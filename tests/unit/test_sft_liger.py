"""`sft.liger`: the same numbers from fused kernels, or a clear refusal."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from teams_hpc.config import Config, ModelShape
from teams_hpc.config.check import input_faults
from teams_hpc.config.schema import SftConfig
from teams_hpc.errors import WorkError
from teams_hpc.pipeline.room import gpu_room, layer_bytes
from teams_hpc.sft.engine import token_loss_sum
from teams_hpc.sft.liger import apply_liger, check_liger, liger_loss_sum

LACKING = [name for name in ("liger_kernel", "triton") if not importlib.util.find_spec(name)]
NEEDS_LIGER = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")
SHAPE = ModelShape(hidden_size=64, intermediate_size=160)


def test_it_is_refused_where_it_can_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_liger(SftConfig(), "cpu")
    with pytest.raises(WorkError, match=r"sft\.liger: .*no CUDA device.*sft\.liger=false"):
        check_liger(SftConfig(liger=True), "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(WorkError, match="liger-kernel is not installed"):
        check_liger(SftConfig(liger=True), "cuda")
    faults = input_faults(Config(name="a", run_dir=tmp_path, sft={"liger": True}))
    assert [fault for fault in faults if "site.gpus_per_node is 0" in fault]
    assert [fault for fault in faults if "extra 'liger'" in fault]
    assert not input_faults(Config(name="a", run_dir=tmp_path))


def test_another_architecture_is_refused() -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(hidden_size=16, vocab_size=300, **heads))
    with pytest.raises(WorkError, match=r"sft\.liger: .*qwen2"):
        apply_liger(model)


@NEEDS_LIGER
def test_interpreted_kernels_give_the_same_loss_and_gradient_and_keep_less() -> None:
    done = subprocess.run(
        (sys.executable, "tests/liger_interpreted.py"),
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-6)
    assert found["gradient_difference"] < 1e-6
    assert found["norm"] == "LigerRMSNorm"
    plain, fused = (
        layer_bytes(SftConfig(liger=liger, dtype="float32"), SHAPE) for liger in (False, True)
    )
    # Two layers, and the last norm.
    assert found["bytes_saved"] == pytest.approx(2 * (plain - fused) + 4 * 64, rel=0.02)


def test_room_needs_less_with_liger() -> None:
    plain, fused = (
        gpu_room(Config(name="a", sft={"liger": liger}), SHAPE, 1) for liger in (False, True)
    )
    assert fused.loss == plain.loss / 2
    assert fused.activations < plain.activations


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@NEEDS_LIGER
def test_kernels_agree_in_bfloat16() -> None:
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads)).cuda().bfloat16()
    tokens = torch.randint(1024, (2, 128), device="cuda")

    def once(loss_sum):  # type: ignore[no-untyped-def]
        model.zero_grad()
        loss = loss_sum(model(input_ids=tokens, use_cache=False).logits, tokens)
        loss.backward()
        gradient = torch.cat([p.grad.float().flatten() for p in model.parameters()])
        return loss.item(), gradient

    plain = once(token_loss_sum)
    apply_liger(model)
    fused = once(liger_loss_sum)
    assert fused[0] == pytest.approx(plain[0], rel=5e-3)
    assert (fused[1] - plain[1]).norm() < 0.05 * plain[1].norm()
