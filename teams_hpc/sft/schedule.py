"""Learning rate and length of the schedule: pure functions of the step."""

import math

from teams_hpc.config.schema import SftConfig


def schedule_steps(settings: SftConfig, num_rows: int) -> int:
    """Optimizer steps of the whole schedule: as configured, or so many epochs over the rows."""
    if settings.schedule_steps is not None:
        return settings.schedule_steps
    return max(1, math.ceil(settings.num_epochs * num_rows / settings.global_batch_rows))


def learning_rate(settings: SftConfig, step: int, total: int) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then a cosine down to zero."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    share = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
