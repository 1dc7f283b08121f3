"""Attention of a packed pass over slots, against each slot's own, written out."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from teams_hpc.llm.slots import Part, SlotCache

HEADS, SIZE = 4, 8


@pytest.mark.parametrize("num_shared", [1, 2, 4])
@pytest.mark.parametrize("value_size", [8, 6])
def test_each_slot_sees_its_own_tokens_alone(num_shared: int, value_size: int) -> None:
    torch.manual_seed(0)
    cache = SlotCache(torch.device("cpu"), num_shared)
    held: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {0: [], 1: [], 3: []}
    # Lengths differ, a slot is left out, and the second pass makes the tensors grow.
    for lengths in ({0: 3, 1: 1, 3: 70}, {0: 2, 3: 40}):
        parts = [Part(slot, len(held[slot]), [7] * count) for slot, count in lengths.items()]
        cache.begin(parts, torch.float32)
        total = sum(lengths.values())
        query = torch.randn(1, HEADS, total, SIZE)
        keys = torch.randn(1, HEADS // num_shared, total, SIZE)
        values = torch.randn(1, HEADS // num_shared, total, value_size)
        found = cache.attend(query, *cache.update(keys, values, 0), scale=0.3)
        assert found.shape == (1, total, HEADS, value_size)
        place = 0
        for slot, count in lengths.items():
            for number in range(place, place + count):
                held[slot].append((keys[0, :, number], values[0, :, number]))
                expected = scaled_dot_product_attention(
                    query[0, :, number : number + 1],
                    *(
                        torch.stack(one, 1).repeat_interleave(num_shared, 0)
                        for one in zip(*held[slot], strict=True)
                    ),
                    scale=0.3,
                )
                assert torch.allclose(found[0, number], expected[:, 0], atol=1e-5)
            place += count
