"""The positive control of the privacy attack: a small Llama over-fitted on a few examples.

It is small and new whatever the size of the model under test: it checks the attack, not the model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

Example = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels of one example, both (length,)."""

_IGNORED = -100
_BATCH = 8
_LONGEST = 256
_ENOUGH = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlLosses:
    """Mean loss of each example (nats a token) under the over-fitted model."""

    members: list[float]
    non_members: list[float]
    num_steps: int


def overfit_control(
    packed: Path,
    *,
    num_rows: int,
    num_steps: int,
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
) -> ControlLosses:
    """Train on a few members until they are known by heart; return losses on both sides.

    Args:
        packed: `packed.h5`.
        num_rows: Most examples taken from each side.
        num_steps: Most optimizer steps of eight examples.
        seed: Of initial weights and order.
        on_step: Told the step just done.
    """
    with h5py.File(packed, "r", locking=False) as file:
        vocab_size = int(file.attrs["vocab_size"])
        members, others = (_examples(file[group], num_rows) for group in ("train", "held_out"))
    if not members or not others:
        return ControlLosses(members=[], non_members=[], num_steps=0)
    with _one_thread():
        return _overfit(vocab_size, members, others, num_steps, seed, on_step)


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a model is faster on one thread, and its sums are the same on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _overfit(
    vocab_size: int,
    members: list[Example],
    others: list[Example],
    num_steps: int,
    seed: int,
    on_step: Callable[[int], None],
) -> ControlLosses:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_shape(vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    order = np.random.Generator(np.random.Philox(seed))
    recent = 0.0
    step = 0
    for step in range(1, num_steps + 1):
        chosen = order.choice(len(members), size=min(_BATCH, len(members)), replace=False)
        loss = _loss(model, [members[index] for index in chosen]).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        recent = float(loss.detach()) if step == 1 else 0.9 * recent + 0.1 * float(loss.detach())
        on_step(step)
        if recent < _ENOUGH:
            break
    return ControlLosses(
        members=_losses(model, members), non_members=_losses(model, others), num_steps=step
    )


def _shape(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=_LONGEST,
        use_cache=False,
    )


def _examples(group: Any, num_rows: int) -> list[Example]:
    """Token ids and labels of up to `num_rows` examples, spread evenly over the group."""
    found: dict[int, Example] = {}
    for ids, labels, sequences in zip(
        group["input_ids"][:], group["labels"][:], group["sequence_ids"][:], strict=True
    ):
        for sequence in np.unique(sequences[sequences >= 0]):
            here = sequences == sequence
            part = (ids[here][-_LONGEST:], labels[here][-_LONGEST:])
            if np.any(part[1][1:] != _IGNORED):
                found[int(sequence)] = (_tensor(part[0]), _tensor(part[1]))
    names = sorted(found)
    chosen = np.unique(np.linspace(0, len(names) - 1, min(num_rows, len(names))).astype(int))
    return [found[names[index]] for index in chosen]


def _tensor(values: NDArray[np.int32]) -> torch.Tensor:
    return torch.from_numpy(values).long()


def _loss(model: Any, batch: list[Example]) -> torch.Tensor:
    """Mean loss of each example; padding stands behind, where a causal model can't see it."""
    ids = torch.nn.utils.rnn.pad_sequence([x for x, _ in batch], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(
        [y for _, y in batch], batch_first=True, padding_value=_IGNORED
    )[:, 1:]
    logits = model(input_ids=ids).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=_IGNORED, reduction="none"
    )
    counted = labels != _IGNORED
    return (losses * counted).sum(1) / counted.sum(1)


@torch.inference_mode()
def _losses(model: Any, examples: list[Example]) -> list[float]:
    losses: list[float] = []
    for start in range(0, len(examples), _BATCH):
        losses += _loss(model, examples[start : start + _BATCH]).tolist()
    return losses
