"""How fast a step was, how much of it was padding, and the memory it took."""

import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from teams_hpc.config.schema import SftConfig
from teams_hpc.sft.world import Device, World

# Dense bfloat16 in TFLOP/s, from NVIDIA's data sheets (half of what they print "with sparsity");
# the first name that is found counts.
_PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "A40": 149.7,
    "L40S": 362.0,
}


def peak_tflops(sft: SftConfig, device_name: str | None) -> float | None:
    """The peak that MFU is a share of: as configured, else that of a known GPU in bfloat16.

    Args:
        sft: May state it.
        device_name: What CUDA calls the GPU; None on a CPU.

    Returns:
        TFLOP/s of one process's device; None where nothing says it.
    """
    if sft.peak_tflops is not None or device_name is None or sft.dtype != "bfloat16":
        return sft.peak_tflops
    for name, tflops in _PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return tflops
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlops:
    """Floating-point operations that training needs (PaLM, arXiv 2204.02311, appendix B).

    For each token 6 N in matrix products, forwards and backwards, and 12 L H Q T in attention: L
    layers, H heads of width Q, T the length of the token's own sequence, as causality is not
    deducted. What activation checkpointing computes again does not count: it is no progress.

    Attributes:
        num_parameters: N: those that take part in products, so not an input embedding that is
            only looked up.
        num_layers: L.
        heads_width: H Q.
    """

    num_parameters: int
    num_layers: int
    heads_width: int

    @classmethod
    def of(cls, model: Any) -> "ModelFlops":
        """Those of a Llama, whole or divided by ZeRO-3."""
        shape = model.config
        numbers = {id(p): getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
        if not shape.tie_word_embeddings:
            del numbers[id(model.get_input_embeddings().weight)]
        head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
        return cls(
            num_parameters=sum(numbers.values()),
            num_layers=shape.num_hidden_layers,
            heads_width=shape.num_attention_heads * head,
        )

    def needed(self, num_tokens: float, num_pairs: float) -> float:
        """Operations for so many tokens.

        Args:
            num_tokens: Tokens that aren't padding.
            num_pairs: Sum of the squares of the lengths of their sequences.
        """
        products = 6.0 * self.num_parameters * num_tokens
        return products + 12.0 * self.num_layers * self.heads_width * num_pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """Turns what a step did, and its seconds, into the numbers of a line of `metrics.jsonl`."""

    world: World
    flops: ModelFlops
    peak_tflops: float | None
    places: int
    """Tokens that the rows of a step have room for, over all processes."""

    @classmethod
    def of(cls, sft: SftConfig, world: World, model: Any) -> "Meter":
        """For a model on this process's device."""
        name = torch.cuda.get_device_name() if world.device == "cuda" else None
        return cls(
            world=world,
            flops=ModelFlops.of(model),
            peak_tflops=peak_tflops(sft, name),
            places=sft.global_batch_rows * sft.sequence_length,
        )

    def measure(self, tokens: float, pairs: float, seconds: float) -> dict[str, float]:
        """Called by all processes together.

        Args:
            tokens: Of the step, over all processes, padding left out.
            pairs: Sum of the squares of the lengths of the step's sequences.
            seconds: The step took so long.
        """
        line = {
            "tokens_per_s": tokens / seconds,
            "tokens_per_s_per_process": tokens / seconds / self.world.size,
            "padding_share": 1.0 - tokens / self.places,
            "peak_memory_gb": self.world.max(peak_memory_bytes(self.world.device)) / 1e9,
        }
        if self.peak_tflops is not None:
            peak = self.peak_tflops * 1e12 * self.world.size
            line["mfu"] = self.flops.needed(tokens, pairs) / seconds / peak
        return line


def peak_memory_bytes(device: Device) -> int:
    """The most that this process has held so far: tensors on its GPU, or resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of a parent too, on Linux
