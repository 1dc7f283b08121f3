"""Drawing tokens with noise that belongs to the request, not to the batch."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import torch

_MIX = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32))
_LAST_SHIFT = 16


def _shift(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right: that of signed integers would bring in ones."""
    return (values >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _mix(values: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers that looks random ("lowbias32"), in place."""
    for bits, factor in _MIX:
        values.bitwise_xor_(_shift(values, bits)).mul_(factor)
    return values.bitwise_xor_(_shift(values, _LAST_SHIFT))


def _noise(keys: Sequence[tuple[int, int]], size: int, device: torch.device) -> torch.Tensor:
    """Gumbel noise (keys, size), each row a function of its seed and position alone.

    A counter-based generator works on all rows at once, on the device where the logits are.
    """
    digests = [
        hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
        for seed, position in keys
    ]
    words = torch.tensor([struct.unpack("<ii", digest) for digest in digests], dtype=torch.int32)
    first, second = words.to(device)[:, :, None].unbind(1)
    counter = torch.arange(size, dtype=torch.int32, device=device)
    bits = _mix(_mix(counter + first).add_(second))
    # Uniform in (0, 1), finest near 0, where the likeliest tokens are decided. At 1, to which some
    # round, the noise would be infinite and rule out even the only token there is.
    uniform = bits.float().mul_(2.0**-32).remainder_(1.0).clamp_(2.0**-33, 1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _ascending(values: torch.Tensor) -> torch.Tensor:
    if values.device.type == "cpu":  # several times as fast as torch's
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def _keep_nucleus(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """Rule out tokens whose likelier ones alone reach `top_p`; ties stay together."""
    ordered = _ascending(scaled)
    likelier = 1.0 - ordered.softmax(-1).cumsum(-1)
    is_out = likelier >= top_p
    is_out[:, -1] = False
    lowest = ordered.masked_fill(is_out, float("inf")).amin(-1, keepdim=True)
    return scaled.masked_fill(scaled < lowest, float("-inf"))


def next_tokens(
    logits: torch.Tensor,
    keys: Sequence[tuple[int, int]],
    *,
    temperature: float,
    top_p: float,
) -> torch.Tensor:
    """One token for each row, by temperature and nucleus sampling; greedy at temperature 0.

    Args:
        logits: (batch, vocabulary), float32.
        keys: For each row its sampler seed and the number of the token in its completion.
        temperature: Divides the logits.
        top_p: Keep the likeliest tokens whose probabilities reach this sum.

    Returns:
        Token ids, (batch,).
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    scaled = logits / temperature
    if top_p < 1.0:
        scaled = _keep_nucleus(scaled, top_p)
    return (scaled + _noise(keys, logits.shape[-1], logits.device)).argmax(-1)
