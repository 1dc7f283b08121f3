"""A Llama with and without Liger on a CPU, where Triton interprets the kernels; prints JSON.

A process of its own: TRITON_INTERPRET must be set before Triton is imported, and Liger changes
transformers' classes for good. Triton's interpreter lacks what the first lines give it.
"""

import importlib
import json
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from transformers import LlamaConfig, LlamaForCausalLM
from triton.runtime import interpreter

from teams_hpc.sft.engine import token_loss_sum
from teams_hpc.sft.liger import apply_liger, liger_loss_sum


class _Number(float):
    """A float that a kernel may convert, as the compiler lets it."""

    def to(self, dtype: object) -> "_Number":
        return self


_convert = interpreter._implicit_cvt
interpreter._implicit_cvt = lambda arg: _Number(arg) if type(arg) is float else _convert(arg)
importlib.import_module("liger_kernel.ops.rms_norm").rsqrt = lambda x: 1.0 / tl.sqrt(x)

ROWS, LENGTH, VOCABULARY = 2, 24, 320
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def _pass(model: Any, loss_sum: Callable[..., torch.Tensor]) -> tuple[float, torch.Tensor, int]:
    """Loss, gradient, and bytes kept for each token, of two packed rows with some tokens masked."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = (
        torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator) for _ in range(2)
    )
    targets[:, :5] = -100
    positions = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)]).expand(ROWS, -1)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    loss = loss_sum(logits, targets)
    (0.5 * loss).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return loss.item(), gradient, sum(kept.values()) // (ROWS * LENGTH)


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    plain = _pass(model, token_loss_sum)
    apply_liger(model)
    fused = _pass(model, liger_loss_sum)
    difference = float((plain[1] - fused[1]).norm() / plain[1].norm())
    found = {
        "losses": [plain[0], fused[0]],
        "gradient_difference": difference,
        "bytes_saved": plain[2] - fused[2],
        "norm": type(LlamaForCausalLM(LlamaConfig(**SHAPE)).model.norm).__name__,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
