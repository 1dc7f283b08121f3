"""Log-probabilities of given answers: prompts with all their options in one pass."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from teams_hpc.llm.prefixes import PASS_COST, SHORTEST, common_length, split_by_length
from teams_hpc.llm.slots import PrefixCache, attention_mask


@dataclass(frozen=True, slots=True)
class Choice:
    """Tokens of a prompt, and of each option to be scored after it."""

    prompt: list[int]
    options: list[list[int]]


def score_batch(model: Any, choices: Sequence[Choice], pad_id: int) -> list[list[float]]:
    """Sums of log-probabilities, by prompt and option.

    What all prompts begin with is computed once; the rest in passes of like length.
    """
    shared = _shared_length(choices)
    cache = PrefixCache()
    if shared:
        _fill(model, cache, choices[0].prompt[:shared])
    lengths = [len(choice.prompt) - shared for choice in choices]
    sums: dict[int, list[float]] = {}
    for chosen in split_by_length(lengths, PASS_COST[model.device.type]):
        some = [choices[number] for number in chosen]
        found = _score_pass(model, some, pad_id, shared, cache if shared else None)
        sums.update(zip(chosen, found, strict=True))
    return [sums[number] for number in range(len(choices))]


def _score_pass(
    model: Any, choices: Sequence[Choice], pad_id: int, shared: int, cache: PrefixCache | None
) -> list[list[float]]:
    """Score by one pass.

    A row is a prompt, padded on the left, and its options one after the other, which see the
    prompt and themselves, but not each other.
    """
    width = max(len(choice.prompt) for choice in choices) - shared
    num_tails = max(sum(map(len, choice.options)) for choice in choices)
    layout = torch.tensor(
        [_layout(choice, shared, width, num_tails, pad_id) for choice in choices],
        device=model.device,
    )
    ids, positions, parts, before = layout.unbind(1)
    output = model(
        input_ids=ids,
        attention_mask=attention_mask(_seen(parts, shared), model.dtype),
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=num_tails + 1,
    )
    each = output.logits.float().log_softmax(-1)  # its first row foretells token `width`
    rows = torch.arange(len(choices), device=model.device)[:, None]
    found = each[rows, before[:, width:] - (width - 1), ids[:, width:]].tolist()
    return [
        _sums(row, [len(option) for option in choice.options])
        for row, choice in zip(found, choices, strict=True)
    ]


def _shared_length(choices: Sequence[Choice]) -> int:
    """Tokens that all prompts begin with, their last one left out; 0 if that is not worth it."""
    if len(choices) < 2:
        return 0
    # Of sorted lists, the first and the last differ the soonest.
    low, *_, high = sorted(choice.prompt for choice in choices)
    length = min(common_length(low, high), *(len(choice.prompt) - 1 for choice in choices))
    return length if length >= SHORTEST else 0


def _fill(model: Any, cache: PrefixCache, tokens: list[int]) -> None:
    order = torch.arange(len(tokens), device=model.device)
    model(
        input_ids=torch.tensor([tokens], device=model.device),
        attention_mask=attention_mask((order[:, None] >= order)[None, None], model.dtype),
        position_ids=order[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def _seen(parts: torch.Tensor, shared: int) -> torch.Tensor:
    """Who sees whom, (batch, 1, tokens, shared + tokens): everyone the beginning."""
    order = torch.arange(parts.shape[1], device=parts.device)
    is_same = (parts[:, None, :] == 0) | (parts[:, :, None] == parts[:, None, :])
    is_seen = is_same & (order[:, None] >= order) & (parts[:, None, :] >= 0)
    beginning = is_seen.new_ones(is_seen.shape[0], is_seen.shape[1], shared)
    return torch.cat([beginning, is_seen], dim=2)[:, None]


def _layout(
    choice: Choice, shared: int, width: int, num_tails: int, pad_id: int
) -> list[list[int]]:
    """One row to be scored: tokens, positions, parts, and where each token is foretold.

    Part 0 is the prompt, the options count from 1, padding is -1.
    """
    prompt, total = choice.prompt[shared:], len(choice.prompt)
    padding = width - len(prompt)
    ids = [pad_id] * padding + prompt
    positions = [0] * padding + list(range(shared, total))
    parts = [-1] * padding + [0] * len(prompt)
    before = [0] * width
    for part, option in enumerate(choice.options, start=1):
        before += [width - 1, *range(len(ids), len(ids) + len(option) - 1)]
        ids += option
        positions += range(total, total + len(option))
        parts += [part] * len(option)
    rest = width + num_tails - len(ids)
    return [
        ids + [pad_id] * rest,
        positions + [0] * rest,
        parts + [-1] * rest,
        before + [width - 1] * rest,
    ]


def _sums(values: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Sums of as many values as `lengths` says, one after the other."""
    left = iter(values)
    return [math.fsum(itertools.islice(left, length)) for length in lengths]
