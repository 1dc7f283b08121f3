"""Continuous batching: rows of tokens that grow together, and come and go one by one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
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
from teams_hpc.llm.slots import Part, SlotCache


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
    _text: list[int] = field(default_factory=list)
    _after: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for token in self.prompt:
            self._append(token)

    def __len__(self) -> int:
        """Tokens of the prompt and those drawn."""
        return len(self._text)

    @property
    def last(self) -> int:
        return self._text[-1]

    def take(self, token: int) -> None:
        """Add a token that was drawn."""
        self.tokens.append(token)
        self._append(token)

    def draft(self, most: int) -> list[int]:
        """What may come next: what came when the last two tokens drawn were last met."""
        if len(self.tokens) < 2:  # where a prompt ends says nothing of how a reply begins
            return []
        most = min(most, self.limit - len(self.tokens) - 1)
        start = self._after.get((self._text[-2], self._text[-1]))
        return [] if start is None else self._text[start : start + most]

    def _append(self, token: int) -> None:
        if len(self) > 1:
            self._after[self._text[-2], self._text[-1]] = len(self)
        self._text.append(token)


class Decoder:
    """Rows that are being completed; row i is in slot i of the cache.

    A prompt's last token is left to the first step, which thereby has nothing to do with prompts;
    so a pass over prompts needs no logits.

    Args:
        model: A causal language model of transformers.
        stop_ids: Tokens that end a row.
        num_draft_tokens: Most tokens to guess in a step.
        temperature: See `next_tokens`.
        top_p: See `next_tokens`.
    """

    def __init__(
        self,
        model: Any,
        *,
        stop_ids: frozenset[int],
        num_draft_tokens: int,
        temperature: float,
        top_p: float,
    ) -> None:
        self._model = model
        self._device: torch.device = model.device
        self._stop_ids = stop_ids
        self._num_draft_tokens = num_draft_tokens
        self._temperature = temperature
        self._top_p = top_p
        self._pass_cost = PASS_COST[self._device.type]
        num_heads = model.config.num_attention_heads
        num_key_heads = getattr(model.config, "num_key_value_heads", None) or num_heads
        self._slots = SlotCache(self._device, num_heads // num_key_heads)
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
                Part(slots[leader], start, prompts[leader][start:end])
                for leader, (start, end) in zip(leaders, shared, strict=True)
            ]
        )
        rest = []
        for group, (_, end) in zip(groups, shared, strict=True):
            for number in group.members:
                if number != group.members[0]:
                    self._slots.copy(slots[group.members[0]], slots[number], end)
                rest.append(Part(slots[number], end, prompts[number][end:]))
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

    def _write(self, parts: Sequence[Part]) -> None:
        """Compute keys and values of some tokens in each slot."""
        parts = [part for part in parts if part.tokens]
        for chosen in split_by_length([len(part.tokens) for part in parts], self._pass_cost):
            self._forward(sorted(parts[number] for number in chosen), num_logits=1)

    def _forward(self, parts: Sequence[Part], num_logits: int = 0) -> torch.Tensor:
        """Logits of the last `num_logits` tokens, or of all of them."""
        tokens, positions = self._slots.begin(parts, self._model.dtype)
        output = self._model(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=self._slots,
            slots=self._slots,
            use_cache=True,
            logits_to_keep=num_logits,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def advance(self) -> list[Row]:
        """Draw tokens for each row; returns the rows that are done, whose slots are free."""
        drafts = [row.draft(self._num_draft_tokens) for row in self._rows]
        parts = [
            Part(slot, len(row) - 1, [row.last, *draft])
            for slot, (row, draft) in enumerate(zip(self._rows, drafts, strict=True))
        ]
        keys = [
            (row.seed, len(row.tokens) + place)
            for row, part in zip(self._rows, parts, strict=True)
            for place in range(len(part.tokens))
        ]
        chosen = iter(
            next_tokens(
                self._forward(parts).float(),
                keys,
                temperature=self._temperature,
                top_p=self._top_p,
            ).tolist()
        )
        for row, draft in zip(self._rows, drafts, strict=True):
            self._accept(row, draft, list(islice(chosen, len(draft) + 1)))
        return self._take_finished()

    def _accept(self, row: Row, draft: Sequence[int], drawn: Sequence[int]) -> None:
        """Take what was drawn as long as what stood before it was drawn too."""
        for number, token in enumerate(drawn):
            row.take(token)
            if token in self._stop_ids or number == len(draft) or token != draft[number]:
                return

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
            self._slots.rest()
        return done[::-1]
