"""The key-value cache of sequences that start and end at different times.

Each sequence has a slot, a row of preallocated tensors, and begins there at position 0; a step
writes one position a row in place. So a step copies nothing that is already there, a sequence that
ends gives its row to another at once, and rows don't wait for each other. The taken slots are
always the first ones: when one is freed, the last moves into it.
"""

from collections.abc import Sequence
from typing import Any

import torch

_ROUND = 64
"""Rows hold a multiple of this many positions, so that growing is rare."""

_ALIGN = 8
"""A step looks at a multiple of this many positions; GPU kernels want masks aligned."""


def attention_mask(is_seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to attention scores: 0 where `is_seen`, else the lowest number of `dtype`."""
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
    return mask.masked_fill_(~is_seen, torch.finfo(dtype).min)


class SlotCache:
    """Stands in for a transformers cache while tokens are added one by one.

    Args:
        num_slots: Most sequences at a time.
        longest: Most positions of a sequence.
    """

    is_compileable = False

    def __init__(self, num_slots: int, longest: int) -> None:
        self._num_slots = num_slots
        self._longest = longest
        self._layers: list[list[torch.Tensor]] = []  # keys and values: (slot, head, position, size)
        self._lengths: list[int] = []
        self._width = 0
        self._rows = self._at = torch.empty(0)

    def __len__(self) -> int:
        """Sequences it holds."""
        return len(self._lengths)

    def put(self, prefilled: Any, starts: Sequence[int]) -> None:
        """Take over what a prefill left, in the next slots.

        Args:
            prefilled: The model's own cache, of sequences padded on the left.
            starts: Where each sequence begins in it, after its padding.
        """
        pairs = [(layer.keys, layer.values) for layer in prefilled.layers]
        width = pairs[0][0].shape[2]
        first, end = len(self), len(self) + len(starts)
        self._reserve(end, width, pairs)
        device = pairs[0][0].device
        order = torch.arange(width, device=device) + torch.tensor(starts, device=device)[:, None]
        order = order.clamp_(max=width - 1)[:, None, :, None]
        for held, new in zip(self._layers, pairs, strict=True):
            for target, source in zip(held, new, strict=True):
                target[first:end, :, :width] = source.gather(2, order.expand_as(source))
                # What another sequence left must be finite, though nothing looks at it.
                target[first:end, :, width:] = 0
        self._lengths += [width - start for start in starts]

    def drop(self, slot: int) -> None:
        """Free a slot; the last sequence moves into it."""
        length = self._lengths.pop()
        last = len(self._lengths)
        if slot != last:
            self._lengths[slot] = length
            for held in self._layers:
                for tensor in held:
                    tensor[slot] = tensor[last]
        if last == 0:
            self._layers.clear()

    def begin_step(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for one more token of every sequence.

        Returns:
            The attention mask, (slots, 1, 1, width), and the positions of the tokens, (slots, 1).
        """
        longest = max(self._lengths) + 1
        self._reserve(len(self), longest, self._layers)
        tensor = self._layers[0][0]
        self._width = min(-(-longest // _ALIGN) * _ALIGN, tensor.shape[2])
        self._rows = torch.arange(len(self), device=tensor.device)
        self._at = torch.tensor(self._lengths, device=tensor.device)
        is_seen = torch.arange(self._width, device=tensor.device) <= self._at[:, None]
        self._lengths = [length + 1 for length in self._lengths]
        return attention_mask(is_seen[:, None, None], dtype), self._at[:, None]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        """Called by the model's layers: write the step's token, give back all so far."""
        found = []
        for target, new in zip(self._layers[layer_idx], (keys, values), strict=True):
            target[self._rows, :, self._at] = new[:, :, 0]
            found.append(target[: len(self._rows), :, : self._width])
        return tuple(found)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Called by models that work out positions themselves; ours are given."""
        return self._width - 1

    def _reserve(self, rows: int, width: int, like: Sequence[Sequence[torch.Tensor]]) -> None:
        """Make the tensors large enough, keeping what they hold."""
        held_rows, held_width = self._layers[0][0].shape[::2] if self._layers else (0, 0)
        if rows <= held_rows and width <= held_width:
            return
        if rows > held_rows:
            rows = min(max(rows, 2 * held_rows), self._num_slots)
        if width > held_width:
            wanted = max(width, held_width + held_width // 2)
            width = min(-(-wanted // _ROUND) * _ROUND, self._longest)
        rows, width = max(rows, held_rows), max(width, held_width)
        grown = []
        for number, pair in enumerate(like):
            grown.append([one.new_zeros(rows, one.shape[1], width, one.shape[3]) for one in pair])
            if self._layers:
                for target, source in zip(grown[-1], self._layers[number], strict=True):
                    target[:held_rows, :, :held_width] = source
                self._layers[number] = []
        self._layers = grown
