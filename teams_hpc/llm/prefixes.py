"""What to compute together: beginnings that prompts share once, and prompts of like length.

Prompts that ask for the same operation differ in the instruction alone, and verdicts in the pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SHORTEST = 24
"""A shorter beginning isn't worth a pass of its own."""

PASS_COST = {"cpu": 128, "cuda": 4096}
"""By device, tokens that take as long as a pass over next to nothing; roughly is enough."""

_MOST = 256
"""Groups are looked for among so many prompts at a time."""


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts, by number, that share their first `length` tokens; one alone shares none."""

    members: tuple[int, ...]
    length: int

    @property
    def saving(self) -> int:
        return self.length * (len(self.members) - 1)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return length


def group_prompts(prompts: Sequence[Sequence[int]]) -> list[Group]:
    """Divide prompts, a function of themselves alone, so that little is computed twice."""
    order = sorted(range(len(prompts)), key=lambda number: (list(prompts[number]), number))
    groups = []
    for start in range(0, len(order), _MOST):
        part = order[start : start + _MOST]
        alike = [common_length(prompts[one], prompts[other]) for one, other in pairwise(part)]
        groups += _divide(part, alike)
    return groups


def _divide(order: Sequence[int], alike: Sequence[int]) -> list[Group]:
    """Prompts next to each other in `order` share what `alike` says; cut where that is least."""
    if not alike:
        return [Group((number,), 0) for number in order]
    least = min(alike)
    whole = Group(tuple(order), least if least >= SHORTEST else 0)
    ends = [place + 1 for place, length in enumerate(alike) if length == least]
    parts: list[Group] = []
    for start, end in pairwise([0, *ends, len(order)]):
        parts += _divide(order[start:end], alike[start : end - 1])
    return [whole] if whole.saving > sum(part.saving for part in parts) else parts


def split_by_length(lengths: Sequence[int], pass_cost: int) -> list[list[int]]:
    """Divide rows, by number, into passes with the least padding.

    Args:
        lengths: Tokens of each row.
        pass_cost: What a pass costs however small it is, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda number: (lengths[number], number))
    # The least cost of the first `end` rows, and where their last pass starts.
    best = [(0, 0)]
    for end in range(1, len(order) + 1):
        width = lengths[order[end - 1]]
        best.append(
            min((best[start][0] + pass_cost + width * (end - start), start) for start in range(end))
        )
    passes = []
    end = len(order)
    while end:
        start = best[end][1]
        passes.append(order[start:end])
        end = start
    return passes[::-1]
