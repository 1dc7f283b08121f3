"""A local Llama-family model through transformers: batched completion and likelihood scoring.

Sampling is keyed: each request draws its own noise from its seed and the position (the Gumbel-max
trick), so what it is batched with does not change which token is drawn. In float32 on a CPU with
`batching: fixed` that is exact; in bfloat16 or on a GPU the logits themselves may depend on the
batch, and results are statistical.

A tokenizer without a chat template (base models) gets a plain format: the messages one after the
other, then "Answer:".
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from teams_hpc.config.digest import model_content_id
from teams_hpc.config.schema import TransformersEngineConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Completion, Exactness, Message, Request, Score, ScoreRequest
from teams_hpc.llm.local_model import (
    enough_memory,
    find_device,
    load_model,
    longest_sequence,
    pad_id,
    stop_ids,
)
from teams_hpc.llm.sampling import next_tokens
from teams_hpc.llm.slots import SlotCache, attention_mask

_REFILL_SHARE = 8
"""Prompts are admitted when one in so many slots is free."""

_RETURN_SHARE = 4
"""With `refill` a step returns when one in so many requests is done."""


@dataclass(slots=True)
class _Row:
    """A request that is being completed; the row's place in the batch is its slot."""

    request: Request
    prompt: list[int]
    limit: int
    tokens: list[int] = field(default_factory=list)


class TransformersEngine:
    """See `llm.base.Engine`.

    Args:
        config: The model's folder and how to run it.

    Raises:
        EngineError: The folder holds no model that loads, or there is no such device.
    """

    def __init__(self, config: TransformersEngineConfig) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._config = config
        self._device = find_device(config.device)
        self._tokenizer, self._model = load_model(config, self._device)
        self._content_id = model_content_id(config.model)
        self._stop_ids = stop_ids(self._tokenizer, self._model)
        if not self._stop_ids:
            raise EngineError(f"{config.model} names no end-of-text token; add it to its config")
        self._pad_id = pad_id(self._tokenizer, self._model, self._stop_ids)
        self._longest = longest_sequence(self._model)
        self._slots = SlotCache(config.batch_size, self._longest)
        self._pending: list[tuple[Request, list[int]]] = []
        self._active: list[_Row] = []

    @property
    def content_id(self) -> str:
        return self._content_id

    @property
    def exactness(self) -> Exactness:
        is_exact = (
            self._config.dtype == "float32"
            and self._config.batching == "fixed"
            and self._device.type == "cpu"
        )
        return "exact" if is_exact else "statistical"

    @property
    def is_model(self) -> bool:
        return True

    @property
    def num_pending(self) -> int:
        return len(self._pending) + len(self._active)

    def add(self, request: Request) -> None:
        self._pending.append((request, self._encode(request.messages)))

    def step(self) -> list[Completion]:
        """Decode until enough is done; rows that end make room for what waits, the shortest first.

        With `fixed` that is all that was added, else a share of a batch: so that what comes next
        for the chains, and their verdicts, make batches too.
        """
        wanted = max(1, min(self._config.batch_size, self.num_pending) // _RETURN_SHARE)
        if self._config.batching == "fixed":
            wanted = self.num_pending
        done: list[Completion] = []
        with enough_memory(self._config), torch.inference_mode():
            while self.num_pending and len(done) < wanted:
                done += self._admit()
                if self._active:
                    done += self._advance()
        return done

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One prefill of each prompt, shared by its options.

        Raises:
            EngineError: A prompt is too long for the model.
        """
        encoded = [self._encode_options(request) for request in requests]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index][0]))
        scores: dict[int, Score] = {}
        for start in range(0, len(order), self._config.batch_size):
            chosen = order[start : start + self._config.batch_size]
            with enough_memory(self._config):
                sums = self._score_batch([encoded[index] for index in chosen])
            for index, log_probabilities in zip(chosen, sums, strict=True):
                scores[index] = Score(
                    log_probabilities=tuple(log_probabilities),
                    prompt_tokens=len(encoded[index][0]),
                )
        return [scores[index] for index in range(len(requests))]

    def close(self) -> None:
        """Free the model."""
        self._model = None
        self._slots = SlotCache(0, 0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _text(self, messages: Sequence[Message]) -> str:
        """The prompt, ready for the assistant's reply."""
        if self._tokenizer.chat_template is None:
            return "\n\n".join([*(message.content for message in messages), "Answer:"])
        turns = [{"role": message.role, "content": message.content} for message in messages]
        text: str = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return text

    def _tokens(self, text: str) -> list[int]:
        # A chat template writes its own special tokens; elsewhere the tokenizer adds them.
        has_template = self._tokenizer.chat_template is not None
        ids: list[int] = self._tokenizer(text, add_special_tokens=not has_template)["input_ids"]
        if not has_template and ids and ids[-1] in self._stop_ids:
            ids = ids[:-1]
        return ids

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        return self._tokens(self._text(messages))

    def _encode_options(self, request: ScoreRequest) -> tuple[list[int], list[list[int]]]:
        """What all options share, and the rest of each, end of turn included.

        Prompt and option are tokenised together, since tokens may merge where they meet.
        """
        prompt = self._text(request.messages)
        separator = "" if self._tokenizer.chat_template is not None else " "
        end = [min(self._stop_ids) if self._eos is None else self._eos]
        whole = [self._tokens(prompt + separator + option) + end for option in request.options]
        shared = min(len(self._tokens(prompt)), *(len(ids) - 1 for ids in whole))
        while any(ids[:shared] != whole[0][:shared] for ids in whole):
            shared -= 1
        longest = max(len(ids) for ids in whole)
        if longest > self._longest:
            raise EngineError(
                f"a prompt to be judged has {longest} tokens, more than the {self._longest} "
                f"positions of {self._config.model}; use a reviewer with a longer context"
            )
        return whole[0][:shared], [ids[shared:] for ids in whole]

    @property
    def _eos(self) -> int | None:
        eos: int | None = self._tokenizer.eos_token_id
        return eos

    def _too_long(self, request: Request, prompt: list[int]) -> Completion:
        return Completion(
            id=request.id,
            text="",
            finish_reason="error",
            prompt_tokens=len(prompt),
            completion_tokens=0,
            error=f"the prompt has {len(prompt)} tokens, the model {self._longest} positions",
        )

    def _pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, (batch, longest prompt)."""
        width = max(len(prompt) for prompt in prompts)
        ids = [[self._pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return (
            torch.tensor(ids, device=self._device),
            torch.tensor(mask, device=self._device),
        )

    def _admit(self) -> list[Completion]:
        """Prefill the shortest prompts into free slots; returns what can't or needn't go on."""
        free = self._config.batch_size - len(self._active)
        # A pass has a fixed cost, so that a slot or two may wait for more.
        if not self._pending or (self._active and free * _REFILL_SHARE < self._config.batch_size):
            return []
        self._pending.sort(key=lambda entry: (len(entry[1]), entry[0].id))
        taken, self._pending = self._pending[:free], self._pending[free:]
        fitting = [entry for entry in taken if len(entry[1]) < self._longest]
        if fitting:
            prompts = [prompt for _, prompt in fitting]
            ids, mask = self._pad_left(prompts)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
            )
            self._slots.put(
                output.past_key_values, [ids.shape[1] - len(prompt) for prompt in prompts]
            )
            rows = [
                _Row(request, prompt, min(self._config.max_tokens, self._longest - len(prompt)))
                for request, prompt in fitting
            ]
            self._active += rows
            self._extend(rows, output.logits)
        failed = [
            self._too_long(request, prompt)
            for request, prompt in taken
            if len(prompt) >= self._longest
        ]
        return failed + self._finished()

    def _advance(self) -> list[Completion]:
        """One more token of every active row."""
        mask, positions = self._slots.begin_step(self._model.dtype)
        output = self._model(
            input_ids=torch.tensor([row.tokens[-1:] for row in self._active], device=self._device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._slots,
            use_cache=True,
            logits_to_keep=1,
        )
        self._extend(self._active, output.logits)
        return self._finished()

    def _extend(self, rows: Sequence[_Row], logits: torch.Tensor) -> None:
        chosen = next_tokens(
            logits[:, -1].float(),
            [(row.request.seed, len(row.tokens)) for row in rows],
            temperature=self._config.temperature,
            top_p=self._config.top_p,
        )
        for row, token in zip(rows, chosen.tolist(), strict=True):
            row.tokens.append(token)

    def _finished(self) -> list[Completion]:
        """Completions of rows that have come to their end; their slots are free then."""
        done = []
        for slot in reversed(range(len(self._active))):
            row = self._active[slot]
            if row.tokens[-1] in self._stop_ids or len(row.tokens) >= row.limit:
                done.append(self._completion(row))
                self._slots.drop(slot)
                last = self._active.pop()
                if last is not row:
                    self._active[slot] = last
        return done[::-1]

    def _completion(self, row: _Row) -> Completion:
        is_stopped = row.tokens[-1] in self._stop_ids
        kept = row.tokens[:-1] if is_stopped else row.tokens
        return Completion(
            id=row.request.id,
            text=self._tokenizer.decode(kept, skip_special_tokens=True),
            finish_reason="stop" if is_stopped else "length",
            prompt_tokens=len(row.prompt),
            completion_tokens=len(row.tokens),
        )

    @torch.inference_mode()
    def _score_batch(self, batch: Sequence[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
        """Sums of log-probabilities, by prompt and option: one pass over prompts and options.

        A row is a prompt, padded on the left, and its options one after the other, which see the
        prompt and themselves, but not each other.
        """
        width = max(len(prompt) for prompt, _ in batch)
        num_tails = max(sum(map(len, options)) for _, options in batch)
        layout = torch.tensor(
            [_layout(prompt, options, width, num_tails, self._pad_id) for prompt, options in batch],
            device=self._device,
        )
        ids, positions, parts, before = layout.unbind(1)
        order = torch.arange(width + num_tails, device=self._device)
        is_same = (parts[:, None, :] == 0) | (parts[:, :, None] == parts[:, None, :])
        is_seen = is_same & (order[:, None] >= order) & (parts[:, None, :] >= 0)
        output = self._model(
            input_ids=ids,
            attention_mask=attention_mask(is_seen[:, None], self._model.dtype),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=num_tails + 1,
        )
        # Row t of the logits is of position width - 1 + t.
        each = output.logits.float().log_softmax(-1)
        rows = torch.arange(len(batch), device=self._device)[:, None]
        found = each[rows, before[:, width:] - (width - 1), ids[:, width:]].tolist()
        return [
            _sums(row, [len(option) for option in options])
            for row, (_, options) in zip(found, batch, strict=True)
        ]


def _layout(
    prompt: Sequence[int], options: Sequence[Sequence[int]], width: int, num_tails: int, pad: int
) -> list[list[int]]:
    """One row to be scored: tokens, positions, parts, and where each token is foretold.

    Part 0 is the prompt, the options count from 1, padding is -1.
    """
    padding = width - len(prompt)
    ids = [pad] * padding + list(prompt)
    positions = [0] * padding + list(range(len(prompt)))
    parts = [-1] * padding + [0] * len(prompt)
    before = [0] * width
    for part, option in enumerate(options, start=1):
        before += [width - 1, *range(len(ids), len(ids) + len(option) - 1)]
        ids += option
        positions += range(len(prompt), len(prompt) + len(option))
        parts += [part] * len(option)
    rest = width + num_tails - len(ids)
    return [
        ids + [pad] * rest,
        positions + [0] * rest,
        parts + [-1] * rest,
        before + [width - 1] * rest,
    ]


def _sums(values: Sequence[float], lengths: Sequence[int]) -> list[float]:
    """Sums of as many values as `lengths` says, one after the other."""
    left = iter(values)
    return [math.fsum(itertools.islice(left, length)) for length in lengths]
