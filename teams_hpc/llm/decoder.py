"""Continuous batching: rows of tokens that grow together, and come and go one by one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from teams_hpc.llm.prefixes import SHORTEST, Group, common_length, group_prompts
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
        self._slots = SlotCache(self._device)
        self._rows: list[Row] = []

    def __len__(self) -> int:
        """Rows that aren't done."""
        return len(self._rows)

    def admit(self, rows: Sequence[Row]) -> None:
        """Take in rows; what they begin with alike, or as rows that are there, is copied."""
        prompts = [row.prompt[:-1] for row in rows]
        groups = group_prompts(prompts)
        # Leaders take the first slots, so that one pass computes what each group shares.
        leaders = [group.members[0] for group in groups]
        others = [number for group in groups for number in group.members[1:]]
        first = len(self._rows)
        slot_of = {number: first + place for place, number in enumerate(leaders + others)}
        self._slots.open(first, first + len(rows), max(map(len, prompts)))
        shared = [
            self._lead(group, prompts[group.members[0]], slot_of[group.members[0]])
            for group in groups
        ]
        heads = [prompts[leader][:end] for leader, (_, end) in zip(leaders, shared, strict=True)]
        self._write(first, heads, [start for start, _ in shared])
        starts = {}
        for group, (_, end) in zip(groups, shared, strict=True):
            for number in group.members:
                starts[number] = end
                if number != group.members[0]:
                    self._slots.copy(slot_of[group.members[0]], slot_of[number], end)
        order = leaders + others
        self._write(first, [prompts[number] for number in order], [starts[n] for n in order])
        self._rows += [rows[number] for number in order]

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

    def _write(self, first: int, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        """Compute keys and values of `tokens` from `starts` on, in the slots from `first` on."""
        rest = [list(one[start:]) for one, start in zip(tokens, starts, strict=True)]
        width = max(len(one) for one in rest)
        if width:
            self._forward(
                first, [one + [self._pad_id] * (width - len(one)) for one in rest], starts
            )

    def _forward(self, first: int, ids: list[list[int]], starts: Sequence[int]) -> torch.Tensor:
        """Logits of the last column."""
        mask, positions = self._slots.begin(first, starts, len(ids[0]), self._model.dtype)
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
            self._forward(0, last, starts).float(),
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
