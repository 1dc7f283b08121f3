"""Counting what engines were asked: calls and tokens by stage, role and model.

The ledger has no file of its own to fall out of step: every durable result (a policy iteration, a
generated unit, a manifest) carries the usage that made it, and `status`, the budget and the report
add those up. A call that was sent but whose result was not made durable is `in_doubt`, and so is a
try that the server may have worked on though no usable reply came (`Completion.lost`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from teams_hpc.llm.base import Completion, RoleName

WIZARDLM_CALLS = 624_000
"""52,000 Alpaca seeds x 4 rounds x 3 calls; second-hand, see docs/design.md on spending."""


@dataclass(slots=True, kw_only=True)
class Usage:
    """What one role asked of one model."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_doubt: int = 0

    def add(self, other: "Usage") -> None:
        self.calls += other.calls
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.in_doubt += other.in_doubt

    def count(self, completions: Sequence[Completion]) -> None:
        """Add what a batch of completions cost."""
        self.calls += len(completions)
        self.prompt_tokens += sum(completion.prompt_tokens for completion in completions)
        self.completion_tokens += sum(completion.completion_tokens for completion in completions)
        self.in_doubt += sum(completion.lost for completion in completions)

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in Usage.__slots__}


@dataclass(slots=True)
class Ledger:
    """Usage by (role, model content id)."""

    rows: dict[tuple[RoleName, str], Usage] = field(default_factory=dict)

    def of(self, role: RoleName, model: str) -> Usage:
        """The row to add to; made if it isn't there."""
        return self.rows.setdefault((role, model), Usage())

    def merge(self, other: "Ledger") -> None:
        for (role, model), usage in other.rows.items():
            self.of(role, model).add(usage)

    def minus(self, other: "Ledger") -> "Ledger":
        """What is in this one beyond another that is part of it."""
        rest = Ledger()
        for key, usage in self.rows.items():
            part = other.rows.get(key, Usage())
            left = {name: getattr(usage, name) - getattr(part, name) for name in Usage.__slots__}
            if any(left.values()):
                rest.rows[key] = Usage(**left)
        return rest

    def total(self, role: RoleName) -> Usage:
        """Usage of one role over all models."""
        total = Usage()
        for (name, _), usage in self.rows.items():
            if name == role:
                total.add(usage)
        return total

    def to_json(self) -> list[dict[str, Any]]:
        """Rows for a manifest, in a fixed order."""
        return [
            {"role": role, "model": model, **usage.as_dict()}
            for (role, model), usage in sorted(self.rows.items())
        ]

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> "Ledger":
        ledger = cls()
        for row in rows:
            counts = {name: int(row[name]) for name in Usage.__slots__}
            ledger.of(row["role"], row["model"]).add(Usage(**counts))
        return ledger
