"""How long to train, and how fast: cosine learning rate with warm-up."""

import math
from dataclasses import dataclass

from teams_hpc.config.schema import SftConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The learning rate of each optimizer step.

    Attributes:
        num_steps: Steps of the whole schedule, where the rate reaches zero.
        stop_step: Steps to train; at most `num_steps`.
        warmup_steps: Steps of linear rise.
        peak: Highest rate.
    """

    num_steps: int
    stop_step: int
    warmup_steps: int
    peak: float

    @classmethod
    def of(cls, sft: SftConfig, num_rows: int) -> "Schedule":
        """The schedule for `num_rows` packed rows of training data."""
        num_steps = sft.schedule_steps or max(
            1, math.ceil(sft.num_epochs * num_rows / sft.global_batch_rows)
        )
        return cls(
            num_steps=num_steps,
            stop_step=min(sft.max_steps or num_steps, num_steps),
            warmup_steps=sft.warmup_steps,
            peak=sft.learning_rate,
        )

    def learning_rate(self, step: int) -> float:
        """Rate of the update that follows `step` updates."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
