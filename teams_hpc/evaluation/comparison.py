"""Two generations of the same seeds with different policies, at equal expert calls.

A policy that keeps more also asks for more answers, so rows are counted for each hundred expert
calls, and diversity is compared between as many chains of either side as the same number of calls
pays for. Rows of one seed are not independent, so seeds are drawn whole, the same for both sides.

Rates have bootstrap intervals over seeds (with replacement). A text drawn twice would count as a
lack of diversity, so diversity has intervals from random halves of the seeds (McCarthy 1969): the
spread of a half around the mean of halves is that of the whole around the truth.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teams_hpc.errors import UsageError
from teams_hpc.evaluation.diversity import text_vectors
from teams_hpc.llm.base import EmbeddingEngine
from teams_hpc.rewriting.elimination import REASONS
from teams_hpc.rewriting.near_duplicates import words
from teams_hpc.storage.atomic import read_json
from teams_hpc.storage.run_dir import RunDir, read_manifest
from teams_hpc.storage.shards import Finish, Status, Table

Floats = NDArray[np.float64]
Chain = tuple[str, int]

_COLUMNS = (
    "seed_id",
    "trajectory",
    "status",
    "reason",
    "instruction",
    "rewrite_finish",
    "answer_finish",
)
_MAY_DIFFER = ("generate.policy", "upstream.select")
_TAIL = (0.025, 0.975)
_HALVES = 400
_MOST_TEXTS = 2000


@dataclass(slots=True)
class _Rows:
    """The rows of one generation, by chain in plan order.

    Attributes:
        calls: Expert calls of each chain.
        attempted: Steps of each chain.
        reasons: Steps of each chain by reason; `none` is kept.
        texts: Kept instructions of each chain.
    """

    calls: Counter[Chain] = field(default_factory=Counter)
    attempted: Counter[Chain] = field(default_factory=Counter)
    reasons: dict[Chain, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    texts: dict[Chain, list[str]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def read(cls, run_dir: RunDir) -> "_Rows":
        rows = cls()
        for path in sorted(run_dir.shards.glob("unit-*.h5")):
            with Table.open(path) as table:
                columns = table.read(0, table.num_rows, _COLUMNS)
            for values in zip(*columns.values(), strict=True):
                rows._add(dict(zip(columns, values, strict=True)))
        return rows

    def count(self, chain: Chain, name: str) -> int:
        """Calls or attempted steps of a chain, or its steps with that reason."""
        if name == "calls":
            return self.calls[chain]
        return self.attempted[chain] if name == "attempted" else self.reasons[chain][name]

    def _add(self, row: Mapping[str, Any]) -> None:
        chain = (row["seed_id"], int(row["trajectory"]))
        asked = sum(row[name] != Finish.NONE for name in ("rewrite_finish", "answer_finish"))
        self.calls[chain] += asked
        self.attempted[chain] += 1
        self.reasons[chain][str(REASONS[row["reason"]])] += 1
        if row["status"] == Status.KEPT:
            self.texts[chain].append(row["instruction"])


def compare_generations(
    ours: RunDir,
    other: RunDir,
    *,
    num_bootstrap: int,
    seed: int,
    eyes: EmbeddingEngine | None = None,
) -> dict[str, Any]:
    """Kept rows, eliminations and diversity of two runs that differ in the policy alone.

    Args:
        ours: A run whose generation is done.
        other: Another one.
        num_bootstrap: Resamples of a rate.
        seed: Keys the resampling.
        eyes: Whose hidden states measure the spread of embeddings; None: it isn't measured.

    Raises:
        UsageError: A generation isn't done, or they differ in more than the policy.
    """
    policies = _policies(ours, other)
    sides = (_Rows.read(ours), _Rows.read(other))
    by_seed = _chains_by_seed(sides)
    measures = _rates(sides, by_seed, num_bootstrap, seed)
    measures |= _diversity(sides, by_seed, eyes, seed)
    return {
        "policies": policies,
        "num_seeds": len(by_seed),
        "expert_calls": [sum(side.calls.values()) for side in sides],
        "attempted": [sum(side.attempted.values()) for side in sides],
        "kept": [sum(map(len, side.texts.values())) for side in sides],
        "eyes": eyes.content_id if eyes else None,
        "measures": measures,
    }


def _policies(ours: RunDir, other: RunDir) -> list[str]:
    """What chose operations in each run."""
    inputs = []
    for run_dir in (ours, other):
        if read_manifest(run_dir, "generate") is None:
            raise UsageError(f"the generation of {run_dir.root} isn't done; run it first")
        inputs.append(read_json(run_dir.inputs("generate"))["inputs"])
    keys = (inputs[0].keys() | inputs[1].keys()) - set(_MAY_DIFFER)
    changed = sorted(key for key in keys if inputs[0].get(key) != inputs[1].get(key))
    if changed:
        raise UsageError(
            f"{ours.root} and {other.root} can't be compared: {changed[0]} differs, but only "
            "generate.policy may"
        )
    return [str(one.get("generate.policy")) for one in inputs]


def _chains_by_seed(sides: Sequence[_Rows]) -> list[list[Chain]]:
    by_seed: dict[str, list[Chain]] = defaultdict(list)
    for chain in sides[0].attempted:
        by_seed[chain[0]].append(chain)
    if sides[0].attempted.keys() != sides[1].attempted.keys():
        raise UsageError("the two runs have different chains; run both to their end")
    return list(by_seed.values())


def _rates(
    sides: Sequence[_Rows], by_seed: Sequence[Sequence[Chain]], num_bootstrap: int, seed: int
) -> dict[str, Any]:
    """Kept rows for 100 expert calls, and shares of steps by what became of them."""
    found = [reasons for side in sides for reasons in side.reasons.values()]
    occurring = {reason for some in found for reason in some}
    reasons = [str(reason) for reason in REASONS if str(reason) in occurring]
    counts = {
        (place, name): np.array(
            [sum(side.count(chain, name) for chain in chains) for chains in by_seed], np.float64
        )
        for place, side in enumerate(sides)
        for name in (*reasons, "calls", "attempted")
    }
    drawn = np.random.default_rng(seed).integers(len(by_seed), size=(num_bootstrap, len(by_seed)))

    def ratio(above: str, below: str, factor: float) -> dict[str, Any]:
        values, draws = [], []
        for place in range(2):
            top, bottom = counts[place, above], counts[place, below]
            values.append(factor * top.sum() / max(1.0, bottom.sum()))
            sums = np.maximum(1.0, bottom[drawn].sum(axis=1))
            draws.append(factor * top[drawn].sum(axis=1) / sums)
        return _measure(values, draws)

    return {
        "kept rows for 100 expert calls": ratio("none", "calls", 100.0),
        **{
            f"{'kept' if reason == 'none' else reason}, % of steps": ratio(
                reason, "attempted", 100.0
            )
            for reason in reasons
        },
    }


def _measure(
    values: Sequence[float], draws: Sequence[Floats], *, are_halves: bool = False
) -> dict[str, Any]:
    """Both sides and their difference, with intervals from draws of each.

    Halves have another mean than the whole (fewer texts are more distinct): only their spread
    counts.
    """
    found = {}
    for name, value, some in (
        ("ours", values[0], draws[0]),
        ("other", values[1], draws[1]),
        ("difference", values[0] - values[1], draws[0] - draws[1]),
    ):
        shift = float(value - some.mean()) if are_halves else 0.0
        low, high = np.quantile(some, _TAIL) + shift
        found[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return found


class _Texts:
    """All kept instructions of one side, with what its measures need, made once."""

    def __init__(self, side: _Rows, chains: Sequence[Chain], eyes: EmbeddingEngine | None) -> None:
        self._calls = side.calls
        texts = [text for chain in chains for text in side.texts[chain]]
        places = itertools.count()
        self._places = {chain: [next(places) for _ in side.texts[chain]] for chain in chains}
        self._grams = {n: [_grams(text, n) for text in texts] for n in (1, 2, 3)}
        self._cosines = _cosines(text_vectors(texts))
        self._seen = None
        if eyes is not None and texts:
            hidden = eyes.embed(texts).astype(np.float64)
            self._seen = _cosines(hidden)

    def calls(self, chains: Sequence[Chain]) -> int:
        return sum(self._calls[chain] for chain in chains)

    def measure(self, chains: Sequence[Chain], budget: int) -> dict[str, float]:
        """Measures of the texts of the first chains that `budget` expert calls pay for."""
        chosen: list[int] = []
        for chain in chains:
            budget -= self._calls[chain]
            if budget < 0:
                break
            chosen += self._places[chain]
        found = {
            f"distinct-{n}": _distinct([grams[place] for place in chosen])
            for n, grams in self._grams.items()
        }
        some = self._cosines[np.ix_(chosen, chosen)].copy()
        np.fill_diagonal(some, -1.0)
        found["self-similarity"] = float(some.max(axis=1).mean()) if len(chosen) > 1 else 1.0
        if self._seen is not None:
            count = len(chosen)
            total = float(self._seen[np.ix_(chosen, chosen)].sum()) - count
            found["embedding spread"] = 1.0 - total / max(1, count * (count - 1))
        return found


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    parts = words(text)
    return list(zip(*(parts[i:] for i in range(n)), strict=False))


def _distinct(grams: Sequence[Sequence[tuple[str, ...]]]) -> float:
    total = sum(map(len, grams))
    return len(set(itertools.chain.from_iterable(grams))) / max(1, total)


def _cosines(vectors: Floats) -> Floats:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.asarray(unit @ unit.T)


def _few(
    sides: Sequence[_Rows], by_seed: Sequence[Sequence[Chain]], random: np.random.Generator
) -> list[Sequence[Chain]]:
    """Seeds drawn at random until either side has as many texts as can be compared pairwise."""
    chosen: list[Sequence[Chain]] = []
    counts = [0, 0]
    for place in random.permutation(len(by_seed)):
        if max(counts) >= _MOST_TEXTS:
            break
        chosen.append(by_seed[place])
        for side in range(2):
            counts[side] += sum(len(sides[side].texts[chain]) for chain in by_seed[place])
    return chosen


def _diversity(
    sides: Sequence[_Rows],
    by_seed: Sequence[Sequence[Chain]],
    eyes: EmbeddingEngine | None,
    seed: int,
) -> dict[str, Any]:
    """Diversity of kept instructions that equally many expert calls made."""
    random = np.random.default_rng(seed)
    by_seed = _few(sides, by_seed, random)
    chains = [chain for some in by_seed for chain in some]
    texts = [_Texts(side, chains, eyes) for side in sides]

    def both(order: Sequence[Chain]) -> list[dict[str, float]]:
        budget = min(one.calls(order) for one in texts)
        return [one.measure(order, budget) for one in texts]

    whole = both([chains[place] for place in random.permutation(len(chains))])
    halves = []
    for _ in range(_HALVES):
        chosen = random.permutation(len(by_seed))[: -(-len(by_seed) // 2)]
        some = [chain for place in chosen for chain in by_seed[place]]
        halves.append(both([some[place] for place in random.permutation(len(some))]))
    return {
        name: _measure(
            [side[name] for side in whole],
            [np.array([half[place][name] for half in halves]) for place in range(2)],
            are_halves=True,
        )
        for name in whole[0]
    }
