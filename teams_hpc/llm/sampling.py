"""Drawing tokens with noise that belongs to the request, not to the batch."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import torch

_MIX = ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32))
_LAST_SHIFT = 16
_WIDER = 64
"""A nucleus is looked for in the likeliest token, then among so many times more."""


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
    if values.device.type != "cpu":
        return values.topk(count)
    # Twice to ten times as fast as torch's.
    numbers = values.numpy()
    if count == 1:
        found = numbers.argmax(-1, keepdims=True)
    elif count == numbers.shape[-1]:
        found = numbers.argsort(-1)[:, ::-1]
    else:
        some = np.argpartition(numbers, -count, axis=-1)[:, -count:]
        order = np.take_along_axis(numbers, some, -1).argsort(-1)[:, ::-1]
        found = np.take_along_axis(some, order, -1)
    places = torch.from_numpy(np.ascontiguousarray(found))
    return values.gather(-1, places), places


def _draw(
    scaled: torch.Tensor, total: torch.Tensor, words: torch.Tensor, top_p: float, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token of each row's nucleus: tokens until the likelier ones reach `top_p`, with ties.

    Args:
        scaled: (batch, vocabulary).
        total: Its logsumexp, (batch, 1).
        words: (2, batch).
        top_p: See `next_tokens`.
        count: Among how many of the likeliest tokens to look.

    Returns:
        Tokens, (batch,), and where the nucleus isn't known to end among them.
    """
    values, tokens = _largest(scaled, count)
    likelihoods = (values - total).exp_()
    sums = likelihoods.cumsum(-1)
    is_in = sums - likelihoods < top_p
    is_in[:, 0] = True
    lowest = values.masked_fill(~is_in, float("inf")).amin(-1, keepdim=True)
    is_out = values < lowest
    # A tie with the last one would need more than what is left; half, to be safe from rounding.
    is_whole = (sums[:, -1] >= top_p) & (1.0 - sums[:, -1] < 0.5 * likelihoods[:, -1])
    is_open = ~(is_out[:, -1] | is_whole)
    if count == 1:
        return tokens[:, 0], is_open
    first, second = words[:, :, None]
    noise = _gumbel(first, second, tokens.int())
    best = (values + noise).masked_fill_(is_out, float("-inf")).argmax(-1, keepdim=True)
    return tokens.gather(-1, best)[:, 0], is_open


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
    total = scaled.logsumexp(-1, keepdim=True)
    # Few tokens are in most nuclei, and only those need to be in order and to have noise.
    count = 1
    chosen, is_open = _draw(scaled, total, words, top_p, count)
    while count < logits.shape[-1] and is_open.any():
        count = min(count * _WIDER, logits.shape[-1])
        rows = is_open.nonzero()[:, 0]
        chosen[rows], is_open[rows] = _draw(scaled[rows], total[rows], words[:, rows], top_p, count)
    return chosen
