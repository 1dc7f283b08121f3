"""What happened in a batch of episodes, counted by step."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from teams_hpc.policy.environment import ENGINE_ERROR, Outcome
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.reviewer import ZeroReason

SATURATED_BELOW, SATURATED_ABOVE = 0.02, 0.98
"""A verdict outside these tells hardly more than yes or no."""

ZERO_REASONS = (*(str(reason) for reason in tuple(ZeroReason)[1:]), ENGINE_ERROR)


@dataclass(slots=True)
class Tally:
    """Operations and outcomes of episodes side by side, one entry a step."""

    operations: list[list[int]] = field(default_factory=list)
    outcomes: list[list[Outcome]] = field(default_factory=list)

    def add(self, operations: Sequence[int], outcomes: Sequence[Outcome]) -> None:
        """Add one step of all episodes."""
        self.operations.append([int(operation) for operation in operations])
        self.outcomes.append(list(outcomes))

    @property
    def rewards(self) -> list[list[float]]:
        """By step, then by episode."""
        return [[outcome.reward for outcome in step] for step in self.outcomes]

    @property
    def reward_by_step(self) -> list[float]:
        return [sum(step) / len(step) for step in self.rewards]

    @property
    def operations_by_step(self) -> list[list[int]]:
        """How often each of the six was chosen, by step."""
        return [[step.count(code) for code in range(len(OPERATIONS))] for step in self.operations]

    @property
    def zero_reasons(self) -> dict[str, int]:
        counts = Counter(outcome.zero for step in self.outcomes for outcome in step)
        return {reason: counts[reason] for reason in ZERO_REASONS}

    @property
    def accepted_share(self) -> float:
        """Share of steps whose rewrite became the next parent."""
        flags = [outcome.is_accepted for step in self.outcomes for outcome in step]
        return sum(flags) / len(flags)

    @property
    def verdicts(self) -> list[float]:
        """P(Not Equal) to the parent of every rewrite that was judged."""
        return [
            outcome.p_not_equal
            for step in self.outcomes
            for outcome in step
            if outcome.p_not_equal is not None
        ]


def saturated_share(verdicts: Sequence[float]) -> float:
    """Share of verdicts below 0.02 or above 0.98; 0 of none."""
    saturated = sum(not SATURATED_BELOW <= p <= SATURATED_ABOVE for p in verdicts)
    return saturated / max(1, len(verdicts))
