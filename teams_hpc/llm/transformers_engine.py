"""A local Llama-family model through transformers: batched completion and likelihood scoring.

Sampling is keyed: each request draws its own noise from its seed and the position (the Gumbel-max
trick), so what it is batched with does not change which token is drawn. In float32 on a CPU with
`batching: fixed` that is exact; in bfloat16 or on a GPU the logits themselves may depend on the
batch, and results are statistical.
"""

from collections.abc import Sequence
from typing import Any

import torch

from teams_hpc.config.digest import model_content_id
from teams_hpc.config.schema import TransformersEngineConfig
from teams_hpc.llm.base import Completion, Exactness, Request, Score, ScoreRequest
from teams_hpc.llm.chat_text import ChatText
from teams_hpc.llm.local_model import enough_memory, find_device, load_model, pad_id, stop_ids
from teams_hpc.llm.sampling import next_tokens


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
        tokenizer, self._model = load_model(config, self._device)
        self._content_id = model_content_id(config.model)
        stops = stop_ids(tokenizer, self._model.generation_config, config.model)
        self._pad_id = pad_id(tokenizer, self._model, stops)
        self._chat = ChatText(
            tokenizer=tokenizer,
            stop_ids=stops,
            longest=int(self._model.config.max_position_embeddings),
            model=config.model,
        )
        self._pending: list[tuple[Request, list[int]]] = []

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
        return len(self._pending)

    def add(self, request: Request) -> None:
        self._pending.append((request, self._chat.encode(request.messages)))

    def step(self) -> list[Completion]:
        """One batch of the shortest prompts; with `fixed` all that is pending, batch by batch."""
        self._pending.sort(key=lambda entry: (len(entry[1]), entry[0].id))
        size = self._config.batch_size
        count = len(self._pending) if self._config.batching == "fixed" else size
        taken, self._pending = self._pending[:count], self._pending[count:]
        done: list[Completion] = []
        fitting = []
        for request, prompt in taken:
            if len(prompt) < self._chat.longest:
                fitting.append((request, prompt))
            else:
                done.append(self._chat.too_long(request, len(prompt)))
        for start in range(0, len(fitting), size):
            with enough_memory(self._config):
                done += self._complete(fitting[start : start + size])
        return done

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """One prefill of each prompt, shared by its options.

        Raises:
            EngineError: A prompt is too long for the model.
        """
        encoded = [self._chat.encode_options(request) for request in requests]
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
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _pad_left(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, (batch, longest prompt)."""
        width = max(len(prompt) for prompt in prompts)
        ids = [[self._pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return (
            torch.tensor(ids, device=self._device),
            torch.tensor(mask, device=self._device),
        )

    @torch.inference_mode()
    def _complete(self, batch: Sequence[tuple[Request, list[int]]]) -> list[Completion]:
        prompts = [prompt for _, prompt in batch]
        seeds = [request.seed for request, _ in batch]
        ids, mask = self._pad_left(prompts)
        # Rows that reached their limit are cut below; the longest prompt sets the number of steps.
        most, longest = self._config.max_tokens, self._chat.longest
        limits = [min(most, longest - len(prompt)) for prompt in prompts]
        generated: list[list[int]] = [[] for _ in batch]
        open_rows = set(range(len(batch)))
        cache: Any = None
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for position in range(max(limits)):
            output = self._forward(ids, mask, positions, cache, num_logits=1)
            cache = output.past_key_values
            chosen = next_tokens(
                output.logits[:, -1].float(),
                seeds,
                position,
                temperature=self._config.temperature,
                top_p=self._config.top_p,
            )
            for row, token in enumerate(chosen.tolist()):
                if row in open_rows:
                    generated[row].append(token)
                    if token in self._chat.stop_ids or len(generated[row]) >= limits[row]:
                        open_rows.discard(row)
            if not open_rows:
                break
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return [
            self._chat.completion(request, len(prompt), tokens)
            for (request, prompt), tokens in zip(batch, generated, strict=True)
        ]

    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        *,
        num_logits: int,
    ) -> Any:
        """One pass over `ids`, with logits of its last `num_logits` positions alone.

        Those of a whole prompt would be the largest tensor by far, and nobody reads them.
        """
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=num_logits,
        )

    @torch.inference_mode()
    def _score_batch(self, batch: Sequence[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
        """Sums of log-probabilities, by prompt and option."""
        ids, mask = self._pad_left([prompt for prompt, _ in batch])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = self._forward(ids, mask, positions, None, num_logits=1)
        counts = [len(options) for _, options in batch]
        rows = torch.arange(len(batch), device=self._device).repeat_interleave(
            torch.tensor(counts, device=self._device)
        )
        output.past_key_values.batch_select_indices(rows)
        tails = [option for _, options in batch for option in options]
        width = max(len(tail) for tail in tails)
        tail_ids = torch.tensor(
            [tail + [self._pad_id] * (width - len(tail)) for tail in tails], device=self._device
        )
        first = output.logits[rows]
        last = positions[rows, -1:]
        whole_mask = torch.cat([mask[rows], torch.ones_like(tail_ids)], dim=1)
        later = self._forward(
            tail_ids,
            whole_mask,
            last + 1 + torch.arange(width, device=self._device),
            output.past_key_values,
            num_logits=width,
        ).logits[:, :-1]
        logits = torch.cat([first, later], dim=1).float()
        each = logits.log_softmax(-1).gather(2, tail_ids[:, :, None])[:, :, 0]
        lengths = torch.tensor([len(tail) for tail in tails], device=self._device)
        counted = torch.arange(width, device=self._device) < lengths[:, None]
        sums = (each.double() * counted).sum(1).tolist()
        flat = iter(sums)
        return [[next(flat) for _ in range(count)] for count in counts]
