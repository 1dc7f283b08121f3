"""A double of vLLM with the part of its interface that `teams_hpc` uses, on a CPU.

Names of arguments and what comes back are those of vLLM 0.33.0; whatever else is passed is an error
here. The model is computed by transformers, a token for every running request each step.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllm.sampling_params import RequestOutputKind, SamplingParams

__all__ = ["EngineArgs", "LLMEngine", "SamplingParams", "TokensPrompt"]
__version__ = "0.33.0"


class VLLMValidationError(Exception):
    """As in vLLM 0.33 not a `ValueError`."""


def TokensPrompt(*, prompt_token_ids: list[int]) -> dict[str, Any]:
    """A typed dictionary in vLLM."""
    return {"prompt_token_ids": prompt_token_ids}


@dataclass(kw_only=True)
class EngineArgs:
    """Those of its some two hundred fields that are used."""

    model: str
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    trust_remote_code: bool = False
    load_format: str = "auto"
    disable_log_stats: bool = False


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool


@dataclass
class _Running:
    request_id: str
    prompt: list[int]
    params: SamplingParams
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    cache: Any = None


@dataclass
class ModelConfig:
    max_model_len: int


class _EngineCore:
    is_shut_down = False

    def shutdown(self, timeout: float | None = None) -> None:
        self.is_shut_down = True


class LLMEngine:
    num_loaded = 0
    aborts: frozenset[str] = frozenset()
    """Ids of requests that end with `abort`."""

    def __init__(self, engine_args: EngineArgs) -> None:
        type(self).num_loaded += 1
        self.args = engine_args
        config = AutoConfig.from_pretrained(engine_args.model)
        own = int(config.max_position_embeddings)
        if (engine_args.max_model_len or own) > own:
            raise ValueError(f"max_model_len ({engine_args.max_model_len}) is more than {own}")
        self.model_config = ModelConfig(max_model_len=engine_args.max_model_len or own)
        self.engine_core = _EngineCore()
        dtype = getattr(torch, engine_args.dtype)
        self._model = AutoModelForCausalLM.from_pretrained(engine_args.model, dtype=dtype).eval()
        self._eos = self._model.generation_config.eos_token_id
        self._running: list[_Running] = []

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> "LLMEngine":
        assert Path(engine_args.model).is_dir()
        assert not engine_args.trust_remote_code
        return cls(engine_args)

    def add_request(
        self,
        request_id: str,
        prompt: dict[str, Any],
        params: SamplingParams,
        arrival_time: float | None = None,
        priority: int = 0,
    ) -> str:
        if not isinstance(request_id, str):
            raise TypeError("request_id must be a string")
        assert request_id not in {one.request_id for one in self._running}
        ids = prompt["prompt_token_ids"]
        if not ids or len(ids) >= self.model_config.max_model_len:
            raise VLLMValidationError(f"a prompt of {len(ids)} tokens")
        generator = torch.Generator()
        if params.seed is not None:
            generator.manual_seed(params.seed)
        self._running.append(_Running(request_id, ids, params, generator))
        return f"{request_id}-internal"

    def has_unfinished_requests(self) -> bool:
        return bool(self._running)

    @torch.inference_mode()
    def step(self) -> list[RequestOutput]:
        assert self._running, "vLLM would wait for ever"
        outputs = []
        for one in list(self._running):
            new = one.tokens[-1:] or one.prompt
            found = self._model(torch.tensor([new]), past_key_values=one.cache, use_cache=True)
            one.cache, logits = found.past_key_values, found.logits[0].float()
            one.tokens.append(_draw(logits[-1], one))
            reason = self._finish_reason(one)
            if reason is not None:
                self._running.remove(one)
            if reason is not None or one.params.output_kind is not RequestOutputKind.FINAL_ONLY:
                outputs.append(_output(one, logits, reason))
        return outputs

    def _finish_reason(self, one: _Running) -> str | None:
        if one.request_id in self.aborts:
            return "abort"
        if one.tokens[-1] == self._eos or one.tokens[-1] in one.params.stop_token_ids:
            return "stop"
        length = len(one.prompt) + len(one.tokens)
        is_full = length >= self.model_config.max_model_len
        return "length" if is_full or len(one.tokens) >= one.params.max_tokens else None


def _draw(logits: torch.Tensor, one: _Running) -> int:
    if one.params.temperature == 0.0:
        return int(logits.argmax())
    probabilities = (logits / one.params.temperature).softmax(-1)
    ordered, order = probabilities.sort(descending=True)
    ordered[ordered.cumsum(0) - ordered >= one.params.top_p] = 0.0
    return int(order[torch.multinomial(ordered, 1, generator=one.generator)])


def _output(one: _Running, logits: torch.Tensor, reason: str | None) -> RequestOutput:
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    if one.params.prompt_logprobs is not None:
        each = logits.log_softmax(-1)
        prompt_logprobs = [None] + [
            {token: Logprob(float(each[place, token]))}
            for place, token in enumerate(one.prompt[1:])
        ]
    completion = CompletionOutput(
        index=0,
        text="",  # nothing was to be detokenised
        token_ids=list(one.tokens),
        cumulative_logprob=None,
        logprobs=None,
        finish_reason=reason,
    )
    return RequestOutput(
        one.request_id, None, one.prompt, prompt_logprobs, [completion], reason is not None
    )
