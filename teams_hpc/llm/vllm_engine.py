"""A local model through vLLM: its scheduler batches whatever is in flight, over one or more GPUs.

Prompts are tokenised here, as for the transformers engine, so that the same folder gets the same
prompt from both. Sampling is seeded for each request, but which kernels run depends on the batch:
results are statistical.
"""

import gc
import itertools
import os
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

from teams_hpc.config.digest import model_content_id
from teams_hpc.config.schema import VllmEngineConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Completion, Exactness, Request, Score, ScoreRequest
from teams_hpc.llm.chat_text import ChatText
from teams_hpc.llm.local_model import folder_stop_ids, load_tokenizer

_ENVIRONMENT = {
    # The scheduler runs in this process, so that nothing outlives it. Says nothing to anybody.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
_ENDED_WELL = ("stop", "length")


class VllmEngine:
    """See `llm.base.Engine`. Requests are in flight from `add` on.

    Args:
        config: The model's folder and how to run it.

    Raises:
        EngineError: vLLM is not installed, or can't load the folder here.
    """

    def __init__(self, config: VllmEngineConfig) -> None:
        self._config = config
        tokenizer = load_tokenizer(config.model)
        stop_ids = folder_stop_ids(tokenizer, config.model)
        self._content_id = model_content_id(config.model)
        self._vllm = _import_vllm()
        self._engine: Any = self._load()
        longest = int(self._engine.model_config.max_model_len)
        self._chat = ChatText(
            tokenizer=tokenizer, stop_ids=stop_ids, longest=longest, model=config.model
        )
        self._in_flight: dict[str, tuple[Request, int]] = {}
        self._done: list[Completion] = []
        self._scored: dict[str, Any] = {}
        self._numbers = itertools.count()

    @property
    def content_id(self) -> str:
        return self._content_id

    @property
    def exactness(self) -> Exactness:
        return "statistical"

    @property
    def is_model(self) -> bool:
        return True

    @property
    def num_pending(self) -> int:
        return len(self._in_flight) + len(self._done)

    def add(self, request: Request) -> None:
        prompt = self._chat.encode(request.messages)
        room = self._chat.longest - len(prompt)
        if room < 1:
            self._done.append(self._chat.too_long(request.id, len(prompt)))
            return
        config = self._config
        key = self._send(
            prompt,
            max_tokens=min(config.max_tokens, room),
            temperature=config.temperature,
            top_p=config.top_p,
            seed=request.seed,
            stop_token_ids=sorted(self._chat.stop_ids),
        )
        self._in_flight[key] = (request, len(prompt))

    def step(self) -> list[Completion]:
        """Let vLLM work until a reply is there; returns those that are."""
        while self._in_flight and not self._done:
            self._step()
        done, self._done = self._done, []
        return done

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Each option after its prompt is one prefill; the prompt's log-probabilities are read.

        Raises:
            EngineError: A prompt is too long for the model.
        """
        # vLLM wants room for one more token, which nobody reads.
        encoded = [
            self._chat.encode_options(request, self._chat.longest - 1) for request in requests
        ]
        keys = [
            [self._send(shared + tail, **_SCORING) for tail in tails] for shared, tails in encoded
        ]
        left = {key for of_request in keys for key in of_request}
        while left - self._scored.keys():
            self._step(left)
        return [
            Score(
                log_probabilities=tuple(
                    _sum_of_tail(self._scored.pop(key), shared, tail)
                    for key, tail in zip(of_request, tails, strict=True)
                ),
                prompt_tokens=len(shared),
            )
            for of_request, (shared, tails) in zip(keys, encoded, strict=True)
        ]

    def close(self) -> None:
        """Free what vLLM holds."""
        if self._engine is None:
            return
        self._engine.engine_core.shutdown()
        self._engine = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _load(self) -> Any:
        config = self._config
        options: dict[str, Any] = {}
        if config.max_model_len is not None:
            options["max_model_len"] = config.max_model_len
        with self._naming_faults("can't load the model in"):
            arguments = self._vllm.EngineArgs(
                model=str(config.model),
                dtype=config.dtype,
                tensor_parallel_size=config.tensor_parallel_size,
                gpu_memory_utilization=config.gpu_memory_utilization,
                trust_remote_code=False,
                load_format="safetensors",
                disable_log_stats=True,
                **options,
            )
            return self._vllm.LLMEngine.from_engine_args(arguments)

    def _send(self, prompt: list[int], **sampling: Any) -> str:
        """Hand a prompt over; returns the name it goes by."""
        from vllm.sampling_params import RequestOutputKind

        key = str(next(self._numbers))
        with self._naming_faults("can't ask"):
            parameters = self._vllm.SamplingParams(
                detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **sampling
            )
            self._engine.add_request(
                request_id=key,
                prompt=self._vllm.TokensPrompt(prompt_token_ids=prompt),
                params=parameters,
            )
        return key

    def _step(self, scoring: Set[str] = frozenset()) -> None:
        """One step; what is finished goes where it belongs."""
        with self._naming_faults("failed at work:"):
            outputs = self._engine.step()
        for output in outputs:
            if output.request_id in scoring:
                self._scored[output.request_id] = output.prompt_logprobs
            elif output.finished and output.request_id in self._in_flight:
                request, num_prompt = self._in_flight.pop(output.request_id)
                self._done.append(self._completion(request, num_prompt, output.outputs[0]))

    def _completion(self, request: Request, num_prompt: int, output: Any) -> Completion:
        if output.finish_reason in _ENDED_WELL:
            return self._chat.completion(request.id, num_prompt, list(output.token_ids))
        return Completion(
            id=request.id,
            text="",
            finish_reason="error",
            prompt_tokens=num_prompt,
            completion_tokens=len(output.token_ids),
            error=f"vLLM ended the request: {output.finish_reason}",
        )

    @contextmanager
    def _naming_faults(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its own errors have no common base over its versions
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise EngineError(
                f"vLLM {what} {self._config.model}: {reason} (where memory is short, lower "
                "gpu_memory_utilization or max_model_len, or raise tensor_parallel_size)"
            ) from error


_SCORING = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
"""Of each prompt token its own log-probability; the one token that has to be written is greedy."""


def _sum_of_tail(by_position: Sequence[Any], shared: list[int], tail: list[int]) -> float:
    places = enumerate(tail, start=len(shared))
    return float(sum(by_position[place][token].logprob for place, token in places))


def _import_vllm() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except ImportError as error:
        raise EngineError(f"kind vllm needs the package vllm (extra 'vllm'): {error}") from None
    return vllm
