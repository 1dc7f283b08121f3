"""A local Llama-family model through transformers: batched completion and likelihood scoring.

Sampling is keyed: each request draws its own noise from its seed and the position (the Gumbel-max
trick), so what it is batched with does not change which token is drawn. In float32 on a CPU with
`batching: fixed` that is exact: there the engine works with a number of threads that is part of the
configuration, because sums are divided among threads, and launchers set torch's number. In bfloat16
or on a GPU the logits themselves may depend on the batch, and results are statistical.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from teams_hpc.config.digest import model_content_id
from teams_hpc.config.schema import TransformersEngineConfig
from teams_hpc.llm.base import Completion, Exactness, Request, Score, ScoreRequest
from teams_hpc.llm.chat_text import ChatText
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
        self._config = config
        self._device = find_device(config.device)
        is_exact = config.batching == "fixed" and self._device.type == "cpu"
        self._threads = config.threads or (1 if is_exact else torch.get_num_threads())
        tokenizer, self._model = load_model(config, self._device)
        self._content_id = model_content_id(config.model)
        stops = stop_ids(tokenizer, self._model.generation_config, config.model)
        self._pad_id = pad_id(tokenizer, self._model, stops)
        self._chat = ChatText(
            tokenizer=tokenizer,
            stop_ids=stops,
            longest=longest_sequence(self._model),
            model=config.model,
        )
        self._pending: list[tuple[Request, list[int]]] = []
        self._decoder = Decoder(
            self._model,
            stop_ids=stops,
            num_draft_tokens=config.prompt_lookup_num_tokens,
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
        self._pending.append((request, self._chat.encode(request.messages)))

    def step(self) -> list[Completion]:
        """Decode until enough is done; rows that end make room for what waits, the shortest first.

        With `fixed` that is all that was added, else a share of a batch: so that what comes next
        for the chains, and their verdicts, make batches too.
        """
        wanted = max(1, min(self._config.batch_size, self.num_pending) // _RETURN_SHARE)
        if self._config.batching == "fixed":
            wanted = self.num_pending
        done: list[Completion] = []
        with self._at_work():
            while self.num_pending and len(done) < wanted:
                done += self._admit()
                if len(self._decoder):
                    done += [
                        self._chat.completion(row.id, len(row.prompt), row.tokens)
                        for row in self._decoder.advance()
                    ]
        return done

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One prefill of each prompt, shared by its options.

        Raises:
            EngineError: A prompt is too long for the model.
        """
        encoded = [Choice(*self._chat.encode_options(request)) for request in requests]
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].prompt))
        scores: dict[int, Score] = {}
        for start in range(0, len(order), self._config.batch_size):
            chosen = order[start : start + self._config.batch_size]
            with self._at_work():
                sums = score_batch(self._model, [encoded[index] for index in chosen], self._pad_id)
            for index, log_probabilities in zip(chosen, sums, strict=True):
                scores[index] = Score(
                    log_probabilities=tuple(log_probabilities),
                    prompt_tokens=len(encoded[index].prompt),
                )
        return [scores[index] for index in range(len(requests))]

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """See `llm.base.EmbeddingEngine`; of a text too long for the model, its beginning."""
        pooled = []
        for text in texts:
            ids = self._chat.plain(text)[: self._chat.longest] or [self._pad_id]
            with self._at_work():
                output = self._model.base_model(
                    input_ids=torch.tensor([ids], device=self._device), use_cache=False
                )
            pooled.append(output.last_hidden_state[0].float().mean(0).cpu())
        return torch.stack(pooled).numpy()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """With this engine's threads: torch has one number for all, and one for each OS thread."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with enough_memory(self._config), torch.inference_mode():
                yield
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        """Free the model."""
        del self._model, self._decoder
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _admit(self) -> list[Completion]:
        """Let the shortest prompts have the free rows; returns those that no row can hold."""
        size, longest = self._config.batch_size, self._chat.longest
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
                limit=min(self._config.max_tokens, longest - len(prompt)),
            )
            for request, prompt in taken
            if len(prompt) < longest
        ]
        if rows:
            self._decoder.admit(rows)
        return [
            self._chat.too_long(request.id, len(prompt))
            for request, prompt in taken
            if len(prompt) >= longest
        ]
