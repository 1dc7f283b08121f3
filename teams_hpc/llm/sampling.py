"""Drawing tokens with noise that belongs to the request, not to the batch."""

import hashlib
from collections.abc import Sequence

import torch


def _noise(seed: int, position: int, size: int) -> torch.Tensor:
    """Gumbel noise (size,), a function of seed and position alone, in float32 on the CPU."""
    key = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    uniform = torch.rand(size, generator=generator).clamp_(min=1e-12, max=1.0 - 1e-7)
    return -torch.log(-torch.log(uniform))


def next_tokens(
    logits: torch.Tensor,
    seeds: Sequence[int],
    position: int,
    *,
    temperature: float,
    top_p: float,
) -> torch.Tensor:
    """One token for each row, by temperature and nucleus sampling; greedy at temperature 0.

    Args:
        logits: (batch, vocabulary), float32.
        seeds: Sampler seed of each row.
        position: Number of the token in its completion.
        temperature: Divides the logits.
        top_p: Keep the likeliest tokens whose probabilities reach this sum.

    Returns:
        Token ids, (batch,).
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    scaled = logits / temperature
    if top_p < 1.0:
        ordered, order = scaled.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        is_out = probabilities.cumsum(-1) - probabilities >= top_p
        scaled = scaled.masked_fill(is_out.gather(1, order.argsort(1)), float("-inf"))
    noise = torch.stack([_noise(seed, position, logits.shape[-1]) for seed in seeds])
    return (scaled + noise.to(scaled.device)).argmax(-1)
