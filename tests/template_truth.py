"""The template world as a Markov decision process, solved exactly.

A state is (kind of the text, operations applied to it), with steps left. What is fruitful, and
where it leads, is the grammar's own rule (`llm.grammar.world`), fault rate included. What a
fruitful step earns is the judge's probability; it hangs a little on the words drawn, so its
expectation for each kind and operation is taken over many rewrites by the grammar itself, from
seeds of that kind (its standard error is told). A pointless step earns the judge's floor.

Not in it, since no state could hold them all: a text that nearly repeats one before its parent
earns nothing. That touches paraphrases of long texts alone; `play` shows that it doesn't matter.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from teams_hpc.config.policy import PolicyConfig
from teams_hpc.llm.grammar.judge import p_not_equal
from teams_hpc.llm.grammar.world import (
    ADDITIONS_BEFORE_BREADTH,
    FRUITFUL,
    KINDS,
    P_SAME_KIND,
    is_fruitful,
    read,
    rewrite,
)
from teams_hpc.policy.environment import Episode, World
from teams_hpc.rewriting.identity import keyed_seed
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.seeds import Seed

NAMES = tuple(str(operation) for operation in OPERATIONS)
P_FAULT = 0.01
"""Share of rewrites that copy the prompt on purpose: they earn nothing and lead nowhere."""

State = tuple[str, frozenset[str]]
Choice = Callable[[int, State], Mapping[str, float]]
"""Probabilities of operations at a step (from 0) and a state."""


@dataclass(frozen=True)
class Means:
    """Mean P(Not Equal) of fruitful rewrites by kind and operation, with standard errors."""

    mean: Mapping[tuple[str, str], float]
    error: Mapping[tuple[str, str], float]
    floor: float

    @classmethod
    def measure(cls, seeds: Sequence[Seed], rewrites: int) -> "Means":
        """Draw `rewrites` fruitful rewrites of each kind and operation by the grammar."""
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        by_kind: dict[str, list[str]] = defaultdict(list)
        for seed in seeds:
            by_kind[read(seed.instruction).kind].append(seed.instruction)
        for kind in KINDS:
            texts = by_kind[kind]
            for name in (*sorted(FRUITFUL[kind]), "breadth"):
                for number in range(rewrites):
                    text = texts[number % len(texts)]
                    if name == "breadth":
                        text = _with_additions(text, number)
                    after = rewrite(name, text, keyed_seed("truth", kind, name, number))
                    found[kind, name].append(p_not_equal(text, after))
        pointless = rewrite("breadth", seeds[0].instruction, 1)
        return cls(
            mean={key: math.fsum(values) / len(values) for key, values in found.items()},
            error={key: float(np.std(v, ddof=1)) / len(v) ** 0.5 for key, v in found.items()},
            floor=p_not_equal(seeds[0].instruction, pointless),
        )


def _with_additions(text: str, number: int) -> str:
    """A text on which breadth is fruitful."""
    for name in sorted(FRUITFUL[read(text).kind])[:ADDITIONS_BEFORE_BREADTH]:
        text = rewrite(name, text, keyed_seed("truth", "addition", name, number))
    assert is_fruitful("breadth", text)
    return text


@dataclass(frozen=True)
class Truth:
    """The decision process; values are expected sums of rewards over `length` steps.

    Attributes:
        means: What fruitful steps earn.
        kinds: How often each kind begins an episode.
        length: Steps of an episode.
    """

    means: Means
    kinds: Mapping[str, float]
    length: int = PolicyConfig().episode_length

    @classmethod
    def of(cls, seeds: Sequence[Seed], means: Means) -> "Truth":
        counts = Counter(read(seed.instruction).kind for seed in seeds)
        return cls(means, {kind: count / len(seeds) for kind, count in counts.items()})

    def outcome(self, state: State, name: str) -> tuple[float, list[tuple[float, State]]]:
        """Expected reward of an operation, and where it leads with which probability."""
        kind, applied = state
        if name == "breadth":
            fruitful = len(applied) >= ADDITIONS_BEFORE_BREADTH
        else:
            fruitful = name in FRUITFUL[kind] and name not in applied
        good = 1.0 - P_FAULT
        if not fruitful:
            return good * self.means.floor, [(1.0, state)]
        if name == "breadth":
            changed = (1.0 - P_SAME_KIND) / (len(KINDS) - 1)
            chances = {other: P_SAME_KIND if other == kind else changed for other in KINDS}
            after = [(good * p, (other, frozenset[str]())) for other, p in chances.items()]
        else:
            after = [(good, (kind, applied | {name}))]
        return good * self.means.mean[kind, name], [*after, (P_FAULT, state)]

    def solve(self) -> tuple[float, Choice]:
        """Mean reward a step of the best policy, and that policy, by backward induction.

        Of operations that are equally good the first is chosen.
        """
        values = dict.fromkeys(_states(), 0.0)
        best: dict[tuple[int, State], str] = {}
        for step in reversed(range(self.length)):
            later, values = values, {}
            for state in later:
                of = {name: self._then(state, name, later) for name in NAMES}
                chosen = max(of, key=of.__getitem__)
                best[step, state], values[state] = chosen, of[chosen]
        return self._mean(values.__getitem__), lambda step, state: {best[step, state]: 1.0}

    def value(self, choice: Choice) -> float:
        """Mean reward a step of a policy that looks at step and state alone."""
        values: dict[State, float] = dict.fromkeys(_states(), 0.0)
        for step in reversed(range(self.length)):
            values = {
                state: math.fsum(
                    chance * self._then(state, name, values)
                    for name, chance in choice(step, state).items()
                )
                for state in values
            }
        return self._mean(values.__getitem__)

    def _then(self, state: State, name: str, values: Mapping[State, float]) -> float:
        earned, after = self.outcome(state, name)
        return earned + math.fsum(p * values[then] for p, then in after)

    def _mean(self, of: Callable[[State], float]) -> float:
        total = math.fsum(share * of((kind, frozenset())) for kind, share in self.kinds.items())
        return total / self.length

    def simple(self) -> dict[str, float]:
        """Mean reward a step of policies that don't look: the best of each sort."""
        constant = max(self.value(always((name,))) for name in NAMES)
        orders = (self.value(always(order)) for order in permutations(NAMES))
        return {
            "constant": constant,
            "uniform": self.value(lambda step, state: dict.fromkeys(NAMES, 1 / len(NAMES))),
            "round_robin": self.value(always(NAMES)),
            "best_order": max(orders),
        }


def always(order: Sequence[str]) -> Choice:
    """The operations of `order` again and again."""
    return lambda step, state: {order[step % len(order)]: 1.0}


def _states() -> list[State]:
    """Every kind with every set of its fruitful operations."""
    return [
        (kind, frozenset(name for place, name in enumerate(sorted(names)) if chosen >> place & 1))
        for kind, names in FRUITFUL.items()
        for chosen in range(2 ** len(names))
    ]


def play(world: World, seeds: Sequence[Seed], choice: Choice, episodes: int) -> NDArray[np.float64]:
    """Rewards of a policy of states in the real world, (episodes of all seeds, steps)."""
    started = [
        Episode.begin(("truth", seed.id, number), seed)
        for seed in seeds
        for number in range(episodes)
    ]
    rewards = []
    for step in range(world.settings.episode_length):
        operations = []
        for episode in started:
            reading = read(episode.texts[-1][0])
            chances = choice(step, (reading.kind, reading.applied))
            names = list(chances)
            draw = keyed_seed(*episode.key, step, "choice") / 2**63
            place = int(np.searchsorted(np.cumsum(list(chances.values())), draw, side="right"))
            operations.append(NAMES.index(names[min(place, len(names) - 1)]))
        rewards.append([outcome.reward for outcome in world.step(started, operations)])
    return np.array(rewards, dtype=np.float64).T
