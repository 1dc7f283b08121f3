"""Continuous batching: rows of tokens that grow together, and come and go one by one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from teams_hpc.llm.prefixes import (
    PASS_COST,
    SHORTEST,
    Group,
    common_length,
    group_prompts,
    split_by_length,
)
from teams_hpc.llm.sampling import next_tokens
from teams_hpc.llm.slots import SlotCache


@dataclass(slots=True, kw_only=True)
class Row:
    """A prompt and what has been drawn for it.

    Attributes:
        id: Whose it is.
        prompt: At least one token.
        seed: Of its sampler.
        limit: Most tokens to draw.
        tokens: Those drawn.
    """

    id: str
    prompt: list[int]
    seed: int
    limit: int
    tokens: list[int] = field(default_factory=list)


class Decoder:
    """Rows that are being completed; row i is in slot i of the cache.

    A prompt's last token is left to the first step, which thereby has nothing to do with prompts;
    so a pass over prompts needs no logits.

    Args:
        model: A causal language model of transformers.
        stop_ids: Tokens that end a row.
        pad_id: Any token with an embedding.
        temperature: See `next_tokens`.
        top_p: See `next_tokens`.
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: frozenset[int],
        pad_id: int,
        temperature: float,
        top_p: float,
    ) -> None:
        self._model = model
        self._device: torch.device = model.device
        self._stop_ids = stop_ids
        self._pad_id = pad_id
        self._temperature = temperature
        self._top_p = top_p
        self._pass_cost = PASS_COST[self._device.type]
        self._slots = SlotCache(self._device)
        self._rows: list[Row] = []

    def __len__(self) -> int:
        """Rows that aren't done."""
        return len(self._rows)

    def admit(self, rows: Sequence[Row]) -> None:
        """Take in rows; what they begin with alike, or as rows that are there, is copied."""
        prompts = [row.prompt[:-1] for row in rows]
        groups = group_prompts(prompts)
        slots = range(len(self._rows), len(self._rows) + len(rows))
        self._slots.open(slots.start, slots.stop, max(map(len, prompts)))
        leaders = [group.members[0] for group in groups]
        shared = [
            self._lead(group, prompts[leader], slots[leader])
            for leader, group in zip(leaders, groups, strict=True)
        ]
        self._write(
            [
                (slots[leader], start, prompts[leader][start:end])
                for leader, (start, end) in zip(leaders, shared, strict=True)
            ]
        )
        rest = []
        for group, (_, end) in zip(groups, shared, strict=True):
            for number in group.members:
                if number != group.members[0]:
                    self._slots.copy(slots[group.members[0]], slots[number], end)
                rest.append((slots[number], end, prompts[number][end:]))
        self._write(rest)
        self._rows += rows

    def _lead(self, group: Group, prompt: Sequence[int], slot: int) -> tuple[int, int]:
        """Copy what a row that is there begins with alike.

        Returns:
            How much that is, and how much the group shares (one alone: what was copied).
        """
        alike = [common_length(prompt, row.prompt) for row in self._rows]
        longest = max(alike, default=0)
        end = group.length or longest
        start = min(longest, end)
        if start < SHORTEST:
            return 0, group.length
        self._slots.copy(alike.index(longest), slot, start)
        return start, end

    def _write(self, parts: Sequence[tuple[int, int, list[int]]]) -> None:
        """Compute keys and values of some tokens in each (slot, start, tokens)."""
        parts = [part for part in parts if part[2]]
        for chosen in split_by_length([len(part[2]) for part in parts], self._pass_cost):
            some = sorted(parts[number] for number in chosen)
            width = max(len(tokens) for _, _, tokens in some)
            self._forward(
                [slot for slot, _, _ in some],
                [start for _, start, _ in some],
                [tokens + [self._pad_id] * (width - len(tokens)) for _, _, tokens in some],
            )

    def _forward(
        self, slots: Sequence[int], starts: Sequence[int], ids: list[list[int]]
    ) -> torch.Tensor:
        """Logits of the last column."""
        mask, positions = self._slots.begin(slots, starts, len(ids[0]), self._model.dtype)
        output = self._model(
            input_ids=torch.tensor(ids, device=self._device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._slots,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def advance(self) -> list[Row]:
        """Draw a token for each row; returns the rows that are done, whose slots are free."""
        last = [(row.tokens or row.prompt)[-1:] for row in self._rows]
        starts = [len(row.prompt) - 1 + len(row.tokens) for row in self._rows]
        chosen = next_tokens(
            self._forward(range(len(last)), starts, last).float(),
            [(row.seed, len(row.tokens)) for row in self._rows],
            temperature=self._temperature,
            top_p=self._top_p,
        )
        for row, token in zip(self._rows, chosen.tolist(), strict=True):
            row.tokens.append(token)
        return self._take_finished()

    def _take_finished(self) -> list[Row]:
        done = []
        for slot in reversed(range(len(self._rows))):
            row = self._rows[slot]
            if row.tokens[-1] in self._stop_ids or len(row.tokens) >= row.limit:
                done.append(row)
                last = self._rows.pop()
                if last is not row:
                    self._rows[slot] = last
                    self._slots.copy(len(self._rows), slot)
        if not self._rows:
            self._slots.free()
        return done[::-1]
