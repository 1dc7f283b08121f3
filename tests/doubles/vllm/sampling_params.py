"""Sampling parameters, checked as vLLM 0.33.0 checks them."""

from dataclasses import dataclass, field
from enum import Enum


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(kw_only=True)
class SamplingParams:
    """Those of its fields that are used."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    max_tokens: int | None = 16
    prompt_logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        assert self.temperature >= 0.0
        assert 0.0 < self.top_p <= 1.0
        assert self.max_tokens is None or self.max_tokens >= 1
        assert self.seed is None or -(2**63) <= self.seed < 2**63
        assert not self.detokenize
