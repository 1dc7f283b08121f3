"""Key-value caches for sequences that start and end at different times, or begin alike.

Each sequence has a slot, a row of preallocated tensors, and starts there at position 0; a pass
writes its tokens in place. So nothing that is there is copied, a sequence that ends gives its row
to another at once, and what two prompts begin with is computed once and copied.

Both caches stand in for a transformers cache; models are given positions and ask the cache for
nothing else. Who sees whom is told by a mask, or by the slots themselves.

A pass over slots is packed: all tokens are one row for the model, whose matrix products so have no
padding, and only attention unfolds them. It is an attention implementation of its own, `ATTENTION`,
that a model must be loaded with; without slots it is PyTorch's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "slots"

_ROUND = 64
"""Rows hold a multiple of this many positions, so that growing is rare."""

_ALIGN = 8
"""A pass looks at a multiple of this many positions; GPU kernels want masks aligned."""

_GROUP = {"cpu": 16, "cuda": 1 << 30}
"""By device, slots whose attention is computed together: as wide as the longest of them."""


def attention_mask(is_seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What to add to attention scores: 0 where `is_seen`, else the lowest number of `dtype`."""
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=is_seen.device)
    return mask.masked_fill_(~is_seen, torch.finfo(dtype).min)


class Part(NamedTuple):
    """What a pass adds to one slot.

    Attributes:
        slot: The slot.
        start: Positions that are filled in it.
        tokens: At least one.
    """

    slot: int
    start: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class _Group:
    """Slots whose attention is computed together.

    Attributes:
        slots: In the cache.
        width: Positions looked at.
        unfold: Of each slot the places of its tokens in the pass, (slots, most tokens); one with
            fewer tokens repeats its last.
        fold: Where the tokens, in order, are among those, flattened.
        mask: (slots, 1, most tokens times heads that share a key head, width).
    """

    slots: slice | torch.Tensor
    width: int
    unfold: torch.Tensor
    fold: torch.Tensor
    mask: torch.Tensor


class SlotCache:
    """Keys and values of many sequences; a pass is about some of them."""

    is_compileable = False

    def __init__(self, device: torch.device, num_shared: int) -> None:
        """See the class.

        Args:
            device: Of the model.
            num_shared: How many of its attention heads share a key head.
        """
        self._device = device
        self._num_shared = num_shared
        # Of each layer keys and values: (slot, position, key head, size).
        self._layers: list[list[torch.Tensor]] = []
        self._num_slots = self._capacity = 0
        self._places = torch.empty(0)
        self._groups: list[_Group] = []

    def begin(self, parts: Sequence[Part], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Make ready for a pass that adds the tokens of `parts`, one part after the other.

        Args:
            parts: By ascending slot; only where they are all there are between the first and the
                last does a pass not have to copy what they hold.
            dtype: Of the model.

        Returns:
            Tokens and their positions, (1, tokens).
        """
        self._reserve(parts[-1].slot + 1, max(part.start + len(part.tokens) for part in parts))
        size = _GROUP[self._device.type]
        self._groups, first = [], 0
        for number in range(0, len(parts), size):
            some = parts[number : number + size]
            self._groups.append(self._group(some, first, dtype))
            first += sum(len(part.tokens) for part in some)
        packed = [
            (token, part.slot, part.start + place)
            for part in parts
            for place, token in enumerate(part.tokens)
        ]
        tokens, slots, positions = self._tensor(np.array(packed).T)
        self._places = slots * self._capacity + positions
        return tokens[None], positions[None]

    def _group(self, parts: Sequence[Part], first: int, dtype: torch.dtype) -> _Group:
        """Of parts whose tokens come in the pass from `first` on."""
        lengths = np.array([len(part.tokens) for part in parts])
        starts = np.array([part.start for part in parts])
        ends = lengths.cumsum()
        order = np.arange(lengths.max())
        is_real = order < lengths[:, None]
        places = np.minimum(order, lengths[:, None] - 1)
        longest = int((starts + lengths).max())
        width = min(-(-longest // _ALIGN) * _ALIGN, self._capacity)
        is_seen = np.arange(width) <= (starts[:, None] + places)[:, :, None]
        low, high = parts[0].slot, parts[-1].slot
        is_dense = high - low == len(parts) - 1
        return _Group(
            slots=slice(low, high + 1) if is_dense else self._tensor([part.slot for part in parts]),
            width=width,
            unfold=self._tensor(first + (ends - lengths)[:, None] + places),
            fold=self._tensor(np.flatnonzero(is_real)),
            mask=attention_mask(self._tensor(is_seen[:, None]), dtype).repeat(
                1, 1, self._num_shared, 1
            ),
        )

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of the pass's tokens, each to its own slot.

        Heads that share keys and values are more tokens of one head: nothing is copied for them.

        Args:
            query: (1, heads, tokens, size).
            keys: A layer's, (slots, key heads, positions, size), as `update` gave them.
            values: Likewise; their size may be another.
            scale: Of the scores.

        Returns:
            (1, tokens, heads, size of the values).
        """
        packed = query[0].transpose(0, 1)
        found = []
        for group in self._groups:
            unfolded = packed[group.unfold].transpose(1, 2)
            slots, heads, tokens, size = unfolded.shape
            attended = scaled_dot_product_attention(
                unfolded.reshape(slots, heads // self._num_shared, -1, size),
                keys[:, :, : group.width][group.slots],
                values[:, :, : group.width][group.slots],
                attn_mask=group.mask,
                scale=scale,
            ).reshape(slots, heads, tokens, -1)
            found.append(attended.transpose(1, 2).flatten(0, 1)[group.fold])
        return torch.cat(found)[None]

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values, device=self._device)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        """Called by the model's layers: write the pass's tokens, give back all there is."""
        if layer_idx == len(self._layers):
            self._layers.append(
                [
                    one.new_zeros(self._num_slots, self._capacity, one.shape[1], one.shape[3])
                    for one in (keys, values)
                ]
            )
        for held, new in zip(self._layers[layer_idx], (keys, values), strict=True):
            held.flatten(0, 1).index_copy_(0, self._places, new[0].transpose(0, 1))
        keys, values = self._layers[layer_idx]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Called by models that work out positions themselves; ours are given."""
        return 0

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Copy the first `length` positions of a slot, or all of it, to another."""
        for held in self._layers:
            for tensor in held:
                tensor[target, :length] = tensor[source, :length]

    def open(self, first: int, end: int, length: int) -> None:
        """Make room for sequences in the slots from `first` to `end`, and zero them.

        Masked or not, a NaN that another sequence left there would spread.
        """
        self._reserve(end, length)
        for held in self._layers:
            for tensor in held:
                tensor[first:end] = 0

    def rest(self) -> None:
        """No slot holds anything any more.

        A GPU's memory goes back, for whatever comes until the next sequence; torch keeps it at
        hand. On a CPU it stays, as the system would have to clear every page of it anew.
        """
        if self._device.type != "cpu":
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
                slots, width, heads, size = old.shape
                new = old.new_zeros(self._num_slots, self._capacity, heads, size)
                new[:slots, :width] = old
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


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    slots: SlotCache | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Called by the model's layers; `slots` is what the model was called with."""

    if slots is None:
        found: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )[0]
        return found, None
    return slots.attend(query, key, value, options["scaling"]), None


AttentionInterface.register(ATTENTION, _attention)
