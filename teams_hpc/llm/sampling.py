"""Drawing tokens with noise that belongs to the request, not to the batch."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import torch

_MIX = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32))
_LAST_SHIFT = 16
_MOST_LIKELY = 64
"""Among so many tokens a nucleus is looked for at first."""


def _shift(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right: that of signed integers would bring in ones."""
    return (values >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _mix(values: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers that looks random ("lowbias32"), in place."""
    for bits, factor in _MIX:
        values.bitwise_xor_(_shift(values, bits)).mul_(factor)
    return values.bitwise_xor_(_shift(values, _LAST_SHIFT))


def _words(keys: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """Two 32-bit words (2, keys) that are a function of each key's seed and position."""
    digests = [
        hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
        for seed, position in keys
    ]
    words = [struct.unpack("<ii", digest) for digest in digests]
    return torch.tensor(words, dtype=torch.int32).T.to(device)


def _gumbel(first: torch.Tensor, second: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of some tokens, each a function of a key's two words and the token alone.

    A counter-based generator works on all of them at once, on the device where the logits are.
    """
    bits = _mix(_mix(token + first).add_(second))
    # Uniform in (0, 1), finest near 0, where the likeliest tokens are decided. At 1, to which some
    # round, the noise would be infinite and rule out even the only token there is.
    uniform = bits.float().mul_(2.0**-32).remainder_(1.0).clamp_(2.0**-33, 1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _noise(keys: Sequence[tuple[int, int]], size: int, device: torch.device) -> torch.Tensor:
    """Gumbel noise (keys, size) of all tokens."""
    first, second = _words(keys, device)[:, :, None]
    return _gumbel(first, second, torch.arange(size, dtype=torch.int32, device=device))


def _largest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row, descending, and where they are."""
    if values.device.type != "cpu" or count == values.shape[-1]:
        return values.topk(count)
    # Twice as fast as torch's.
    found = torch.from_numpy(np.argpartition(values.numpy(), -count, axis=-1)[:, -count:])
    ordered, places = values.gather(-1, found).sort(dim=-1, descending=True)
    return ordered, found.gather(-1, places)


def _draw(
    scaled: torch.Tensor, words: torch.Tensor, top_p: float, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each row's nucleus: tokens until the likelier ones reach `top_p`, with ties.

    Returns:
        Tokens, (batch,), and where the nucleus isn't known to end among the `count` likeliest.
    """
    values, tokens = _largest(scaled, count)
    likelihoods = (values - scaled.logsumexp(-1, keepdim=True)).exp_()
    is_in = likelihoods.cumsum(-1) - likelihoods < top_p
    is_in[:, 0] = True
    lowest = values.masked_fill(~is_in, float("inf")).amin(-1, keepdim=True)
    is_out = values < lowest
    first, second = words[:, :, None]
    noise = _gumbel(first, second, tokens.int())
    best = (values + noise).masked_fill_(is_out, float("-inf")).argmax(-1, keepdim=True)
    return tokens.gather(-1, best)[:, 0], ~is_out[:, -1]


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
    if top_p == 1.0:
        return (scaled + _noise(keys, logits.shape[-1], logits.device)).argmax(-1)
    words = _words(keys, logits.device)
    # Few tokens are in most nuclei, and only those need to be in order and to have noise.
    count = min(_MOST_LIKELY, logits.shape[-1])
    chosen, is_open = _draw(scaled, words, top_p, count)
    while count < logits.shape[-1] and is_open.any():
        count = min(count * _MOST_LIKELY, logits.shape[-1])
        rows = is_open.nonzero()[:, 0]
        chosen[rows], is_open[rows] = _draw(scaled[rows], words[:, rows], top_p, count)
    return chosen
