"""A local Llama-family model through transformers: batched completion and likelihood scoring.

Sampling is keyed: each request draws its own noise from its seed and the position (the Gumbel-max
trick), so what it is batched with does not change which token is drawn. In float32 on a CPU with
`batching: fixed` that is exact; in bfloat16 or on a GPU the logits themselves may depend on the
batch, and results are statistical.

A tokenizer without a chat template (base models) gets a plain format: the messages one after the
other, then "Answer:".
"""

from collections.abc import Sequence
from typing import Any

import torch

from teams_hpc.config.digest import model_content_id
from teams_hpc.config.schema import TransformersEngineConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Completion, Exactness, Message, Request, Score, ScoreRequest
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
        self._tokenizer, self._model = load_model(config, self._device)
        self._content_id = model_content_id(config.model)
        self._stop_ids = stop_ids(self._tokenizer, self._model)
        if not self._stop_ids:
            raise EngineError(f"{config.model} names no end-of-text token; add it to its config")
        self._pad_id = pad_id(self._tokenizer, self._model, self._stop_ids)
        self._longest = int(self._model.config.max_position_embeddings)
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
        self._pending.append((request, self._encode(request.messages)))

    def step(self) -> list[Completion]:
        """One batch of the shortest prompts; with `fixed` all that is pending, batch by batch."""
        self._pending.sort(key=lambda entry: (len(entry[1]), entry[0].id))
        size = self._config.batch_size
        count = len(self._pending) if self._config.batching == "fixed" else size
        taken, self._pending = self._pending[:count], self._pending[count:]
        done: list[Completion] = []
        fitting = []
        for request, prompt in taken:
            if len(prompt) < self._longest:
                fitting.append((request, prompt))
            else:
                done.append(self._too_long(request, prompt))
        for start in range(0, len(fitting), size):
            with enough_memory(self._config):
                done += self._complete(fitting[start : start + size])
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

    @torch.inference_mode()
    def _complete(self, batch: Sequence[tuple[Request, list[int]]]) -> list[Completion]:
        prompts = [prompt for _, prompt in batch]
        seeds = [request.seed for request, _ in batch]
        ids, mask = self._pad_left(prompts)
        # Rows that reached their limit are cut below; the longest prompt sets the number of steps.
        limits = [min(self._config.max_tokens, self._longest - len(prompt)) for prompt in prompts]
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
                    if token in self._stop_ids or len(generated[row]) >= limits[row]:
                        open_rows.discard(row)
            if not open_rows:
                break
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return [
            self._completion(request, prompt, tokens)
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

    def _completion(self, request: Request, prompt: list[int], tokens: list[int]) -> Completion:
        is_stopped = bool(tokens) and tokens[-1] in self._stop_ids
        kept = tokens[:-1] if is_stopped else tokens
        return Completion(
            id=request.id,
            text=self._tokenizer.decode(kept, skip_special_tokens=True),
            finish_reason="stop" if is_stopped else "length",
            prompt_tokens=len(prompt),
            completion_tokens=len(tokens),
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
