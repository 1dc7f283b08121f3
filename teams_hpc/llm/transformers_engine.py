"""A local Llama-family model through transformers: batched completion and likelihood scoring.

Sampling is keyed: each request draws its own noise from its seed and the position (the Gumbel-max
trick), so what it is batched with does not change which token is drawn. In float32 on a CPU with
`batching: fixed` that is exact; in bfloat16 or on a GPU the logits themselves may depend on the
batch, and results are statistical.

A tokenizer without a chat template (base models) gets a plain format: the messages one after the
other, then "Answer:".
"""

from collections.abc import Sequence

import torch

from teams_hpc.config.digest import model_content_id
from teams_hpc.config.schema import TransformersEngineConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Completion, Exactness, Message, Request, Score, ScoreRequest
from teams_hpc.llm.decoder import Decoder, Row
from teams_hpc.llm.local_model import (
    enough_memory,
    find_device,
    load_model,
    longest_sequence,
    pad_id,
    stop_ids,
)
from teams_hpc.llm.scoring import Choice, score_batch

_REFILL_SHARE = 8
"""Prompts are admitted when one in so many slots is free."""

_RETURN_SHARE = 4
"""With `refill` a step returns when one in so many requests is done."""


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
        self._pending: list[tuple[Request, list[int]]] = []
        self._decoder = Decoder(
            self._model,
            stop_ids=self._stop_ids,
            pad_id=self._pad_id,
            temperature=config.temperature,
            top_p=config.top_p,
        )

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
        return len(self._pending) + len(self._decoder)

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
                if len(self._decoder):
                    done += map(self._completion, self._decoder.advance())
        return done

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One prefill of each prompt, shared by its options.

        Raises:
            EngineError: A prompt is too long for the model.
        """
        encoded = [self._encode_options(request) for request in requests]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].prompt))
        scores: dict[int, Score] = {}
        for start in range(0, len(order), self._config.batch_size):
            chosen = order[start : start + self._config.batch_size]
            with enough_memory(self._config), torch.inference_mode():
                sums = score_batch(self._model, [encoded[index] for index in chosen], self._pad_id)
            for index, log_probabilities in zip(chosen, sums, strict=True):
                scores[index] = Score(
                    log_probabilities=tuple(log_probabilities),
                    prompt_tokens=len(encoded[index].prompt),
                )
        return [scores[index] for index in range(len(requests))]

    def close(self) -> None:
        """Free the model."""
        del self._model, self._decoder
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

    def _encode_options(self, request: ScoreRequest) -> Choice:
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
        return Choice(whole[0][:shared], [ids[shared:] for ids in whole])

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

    def _admit(self) -> list[Completion]:
        """Let the shortest prompts have the free rows; returns those that no row can hold."""
        size = self._config.batch_size
        free = size - len(self._decoder)
        # A pass has a fixed cost, so that a row or two may wait for more.
        if not self._pending or (len(self._decoder) and free * _REFILL_SHARE < size):
            return []
        self._pending.sort(key=lambda entry: (len(entry[1]), entry[0].id))
        taken, self._pending = self._pending[:free], self._pending[free:]
        rows = [
            Row(
                id=request.id,
                prompt=prompt,
                seed=request.seed,
                limit=min(self._config.max_tokens, self._longest - len(prompt)),
            )
            for request, prompt in taken
            if len(prompt) < self._longest
        ]
        if rows:
            self._decoder.admit(rows)
        return [
            self._too_long(request, prompt)
            for request, prompt in taken
            if len(prompt) >= self._longest
        ]

    def _completion(self, row: Row) -> Completion:
        is_stopped = row.tokens[-1] in self._stop_ids
        kept = row.tokens[:-1] if is_stopped else row.tokens
        return Completion(
            id=row.id,
            text=self._tokenizer.decode(kept, skip_special_tokens=True),
            finish_reason="stop" if is_stopped else "length",
            prompt_tokens=len(row.prompt),
            completion_tokens=len(row.tokens),
        )
