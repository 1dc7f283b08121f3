"""Work units: fixed pieces of the chains, from configuration and seeds alone."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from teams_hpc.config import Config
from teams_hpc.errors import InputChangedError
from teams_hpc.rewriting.seeds import Seed, read_seeds
from teams_hpc.rewriting.splits import SPLITS, split_seeds
from teams_hpc.storage.atomic import publishing, read_json
from teams_hpc.storage.run_dir import RunDir

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainKey:
    """One chain: a seed, its split, and which of its trajectories."""

    seed: Seed
    split: str
    trajectory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Chains in order (seeds in file order, each with its trajectories), cut into units.

    Attributes:
        seeds: Distinct seeds in file order.
        splits: For each, its place in `SPLITS`.
        num_trajectories: Chains of a seed.
        num_steps: Steps of a chain.
        unit_size: Chains of a unit.
    """

    seeds: tuple[Seed, ...]
    splits: bytes
    num_trajectories: int
    num_steps: int
    unit_size: int

    @property
    def num_chains(self) -> int:
        return len(self.seeds) * self.num_trajectories

    @property
    def num_units(self) -> int:
        return -(-self.num_chains // self.unit_size)

    @property
    def num_rows(self) -> int:
        """Steps to attempt, all chains together."""
        return self.num_chains * self.num_steps

    def num_rows_of(self, unit: int) -> int:
        """Steps to attempt in one unit; the last unit may be smaller."""
        first = unit * self.unit_size
        return min(self.unit_size, self.num_chains - first) * self.num_steps

    def chains_of(self, unit: int) -> Sequence[ChainKey]:
        """The chains of one unit."""
        first = unit * self.unit_size
        places = range(first, min(first + self.unit_size, self.num_chains))
        return [
            ChainKey(
                seed=self.seeds[place // self.num_trajectories],
                split=SPLITS[self.splits[place // self.num_trajectories]],
                trajectory=place % self.num_trajectories,
            )
            for place in places
        ]


def _counts(config: Config, seeds: Sequence[Seed]) -> dict[str, object]:
    """The part of `plan.json` that is compared whenever work goes on."""
    settings = config.generate
    num_chains = len(seeds) * settings.num_trajectories
    ids = hashlib.sha256("\n".join(seed.id for seed in seeds).encode())
    return {
        "schema": SCHEMA,
        "num_seeds": len(seeds),
        "num_trajectories": settings.num_trajectories,
        "num_steps": settings.num_steps,
        "unit_size": settings.unit_size,
        "num_chains": num_chains,
        "num_units": -(-num_chains // settings.unit_size),
        "num_rows": num_chains * settings.num_steps,
        "seeds_sha256": ids.hexdigest(),
    }


def settle_plan(run_dir: RunDir, config: Config) -> Plan:
    """The plan, written by the first worker that comes and read by all others.

    It holds one digit for each seed, its split: so only one worker has to find near-duplicates.

    Raises:
        SeedError: The seeds can't be read.
        InputChangedError: The plan there is another one.
    """
    seeds = read_seeds(config.seeds.path, config.seeds.limit).seeds
    counts = _counts(config, seeds)
    if not run_dir.plan.exists():
        by_id = split_seeds(seeds, config.seeds, config.seed, run_dir.generate)
        splits = "".join(str(SPLITS.index(by_id[seed.id])) for seed in seeds)
        digest = hashlib.sha256(splits.encode()).hexdigest()
        content = {**counts, "splits_sha256": digest, "splits": splits}
        with publishing(run_dir.plan) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    found = read_json(run_dir.plan)
    changed = [key for key, value in counts.items() if found.get(key) != value]
    splits = str(found.get("splits", ""))
    if hashlib.sha256(splits.encode()).hexdigest() != found.get("splits_sha256"):
        changed.append("splits")
    if changed:
        raise InputChangedError(
            f"{run_dir.plan} is another plan than seeds and configuration give ({changed[0]} is "
            f"{found.get(changed[0])}, now {counts.get(changed[0], 'damaged')}); take the old "
            "values back, or run again with --rerun-from generate"
        )
    return Plan(
        seeds=tuple(seeds),
        splits=bytes(int(digit) for digit in splits),
        num_trajectories=config.generate.num_trajectories,
        num_steps=config.generate.num_steps,
        unit_size=config.generate.unit_size,
    )
