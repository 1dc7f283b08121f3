"""Key-value caches for sequences that start and end at different times, or begin alike.

Each sequence has a slot, a row of preallocated tensors, and starts there at position 0; a pass
writes its tokens in place. So nothing that is there is copied, a sequence that ends gives its row
to another at once, and what two prompts begin with is computed once and copied.

Both caches stand in for a transformers cache; models are given mask and positions and ask the
cache for nothing else.
"""

from collections.abc import Sequence
from typing import Any

import torch

_ROUND = 64
"""Rows hold a multiple of this many positions, so that growing is rare."""

_ALIGN = 8
"""A pass looks at a multiple of this many positions; GPU kernels want masks aligned."""


def attention_mask(is_seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to attention scores: 0 where `is_seen`, else the lowest number of `dtype`."""
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
    return mask.masked_fill_(~is_seen, torch.finfo(dtype).min)


class SlotCache:
    """Keys and values of many sequences; a pass is about consecutive slots."""

    is_compileable = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Of each layer keys and values: (slot, head, position, size).
        self._layers: list[list[torch.Tensor]] = []
        self._num_slots = self._capacity = 0
        self._width = 0
        self._rows = self._at = torch.empty(0)
        self._chosen: slice | torch.Tensor = slice(0)

    def begin(
        self, slots: Sequence[int], starts: Sequence[int], num_tokens: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make ready for a pass that adds `num_tokens` to each of `slots`.

        A slot's padding goes to the right of its tokens: nothing before it sees it, and what comes
        later is written over it.

        Args:
            slots: Ascending; only where they are all there are between the first and the last does
                a pass not have to copy what they hold.
            starts: Positions that are filled in each slot.
            num_tokens: Tokens of each row, padding included.
            dtype: Of the mask.

        Returns:
            The attention mask, (slots, 1, num_tokens, width), and positions, (slots, num_tokens).
        """
        longest = max(starts) + num_tokens
        self._reserve(slots[-1] + 1, longest)
        self._width = min(-(-longest // _ALIGN) * _ALIGN, self._capacity)
        self._rows = torch.tensor(slots, device=self._device)
        is_dense = slots[-1] - slots[0] == len(slots) - 1
        self._chosen = slice(slots[0], slots[-1] + 1) if is_dense else self._rows
        self._at = torch.tensor(starts, device=self._device)[:, None]
        self._at = self._at + torch.arange(num_tokens, device=self._device)
        is_seen = torch.arange(self._width, device=self._device) <= self._at[:, :, None]
        return attention_mask(is_seen[:, None], dtype), self._at

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        """Called by the model's layers: write the pass's tokens, give back all of its slots."""
        if layer_idx == len(self._layers):
            self._layers.append(
                [
                    one.new_zeros(self._num_slots, one.shape[1], self._capacity, one.shape[3])
                    for one in (keys, values)
                ]
            )
        found = []
        for held, new in zip(self._layers[layer_idx], (keys, values), strict=True):
            held[self._rows[:, None], :, self._at] = new.transpose(1, 2)
            found.append(held[:, :, : self._width][self._chosen])
        return tuple(found)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Called by models that work out positions themselves; ours are given."""
        return 0

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Copy the first `length` positions of a slot, or all of it, to another."""
        for held in self._layers:
            for tensor in held:
                tensor[target, :, :length] = tensor[source, :, :length]

    def open(self, first: int, end: int, length: int) -> None:
        """Make room for sequences in the slots from `first` to `end`, and zero them.

        Masked or not, a NaN that another sequence left there would spread.
        """
        self._reserve(end, length)
        for held in self._layers:
            for tensor in held:
                tensor[first:end] = 0

    def free(self) -> None:
        """Give all memory back."""
        self._layers = []
        self._num_slots = self._capacity = 0

    def _reserve(self, num_slots: int, length: int) -> None:
        """Make the tensors large enough, keeping what they hold."""
        if num_slots <= self._num_slots and length <= self._capacity:
            return
        if length > self._capacity:
            wanted = max(length, self._capacity + self._capacity // 2)
            self._capacity = -(-wanted // _ROUND) * _ROUND
        self._num_slots = max(num_slots, self._num_slots)
        for held in self._layers:
            for place, old in enumerate(held):
                slots, heads, width, size = old.shape
                new = old.new_zeros(self._num_slots, heads, self._capacity, size)
                new[:slots, :, :width] = old
                held[place] = new


class PrefixCache:
    """Keys and values of one beginning, seen by every row of later passes, which leave nothing.

    The first pass fills it.
    """

    is_compileable = False

    def __init__(self) -> None:
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        """Called by the model's layers."""
        if layer_idx == len(self._layers):
            self._layers.append((keys, values))
            return keys, values
        return tuple(
            torch.cat([held.expand(len(new), -1, -1, -1), new], dim=2)
            for held, new in zip(self._layers[layer_idx], (keys, values), strict=True)
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Called by models that work out positions themselves; ours are given."""
        return 0
