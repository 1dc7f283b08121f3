"""Which seeds train the policy, choose it, report on it, and stay out of fine-tuning.

The whole near-duplicate cluster of a seed falls into one split, by a hash of the cluster: nothing
that nearly equals a training seed is ever held out. Two seeds are in one cluster if their
instructions are near-duplicates (so one instruction with many inputs stays together), or if they
share an input of some length (so one passage with many questions does). The hash knows only the
run seed and the cluster, so adding unrelated seeds moves no seed to another split.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from teams_hpc.config.schema import SeedsConfig
from teams_hpc.rewriting import identity
from teams_hpc.rewriting.near_duplicates import cluster, words
from teams_hpc.rewriting.seeds import Seed

SPLITS = ("policy_train", "policy_select", "policy_report", "sft_held_out")

# A shorter input ("5, 8, 2") may be the same by chance and gives nothing away.
_TELLING_INPUT_WORDS = 8


def split_seeds(
    seeds: Sequence[Seed], config: SeedsConfig, run_seed: int, scratch: Path | None = None
) -> dict[str, str]:
    """Put each seed into one of `SPLITS`, near-duplicates together.

    Shares hold on average over clusters, so a small set deviates. Only where hashing leaves a
    split that has a share without any seed, it is given one cluster of the fullest split: a run
    with a handful of seeds still has all its splits, provided there are as many clusters.

    Args:
        seeds: Distinct seeds; their order doesn't matter.
        config: The shares, and the similarity that makes near-duplicates.
        run_seed: The run's seed.
        scratch: Folder for scratch files; None: the one for temporary files.

    Returns:
        Split name by seed id.
    """
    shares = {split: float(getattr(config, f"{split}_share")) for split in SPLITS}
    members = _clusters(seeds, config.near_duplicate_threshold, scratch)
    chosen = {key: _draw(identity.keyed_uniform(run_seed, "split", key), shares) for key in members}
    _fill_empty_splits(chosen, shares)
    return {seed: chosen[key] for key, ids in members.items() for seed in ids}


def _clusters(
    seeds: Sequence[Seed], threshold: float, scratch: Path | None
) -> dict[str, list[str]]:
    """Seed ids of each cluster, by the smallest id among them."""
    by_instruction = cluster([seed.instruction for seed in seeds], threshold, scratch)
    telling = [
        index for index, seed in enumerate(seeds) if len(words(seed.input)) >= _TELLING_INPUT_WORDS
    ]
    by_input = cluster([seeds[index].input for index in telling], threshold, scratch)
    root = list(by_instruction)
    for index, other in zip(telling, (telling[first] for first in by_input), strict=True):
        low, high = sorted((_root(root, index), _root(root, other)))
        root[high] = low
    members: dict[int, list[str]] = defaultdict(list)
    for index, seed in enumerate(seeds):
        members[_root(root, index)].append(seed.id)
    return {min(ids): ids for ids in members.values()}


def _root(root: list[int], index: int) -> int:
    while root[index] != index:
        root[index] = root[root[index]]
        index = root[index]
    return index


def _draw(uniform: float, shares: Mapping[str, float]) -> str:
    """The split whose share of [0, 1) holds `uniform`; a split without a share is never drawn."""
    reached = 0.0
    drawn = SPLITS[0]
    for split, share in shares.items():
        if share == 0.0:
            continue
        drawn = split
        reached += share
        if uniform < reached:
            break
    return drawn


def _fill_empty_splits(chosen: dict[str, str], shares: Mapping[str, float]) -> None:
    """Give an empty split with a share the first cluster (by key) of the fullest split."""
    for split, share in shares.items():
        counts = Counter(chosen.values())
        if share == 0.0 or counts[split] or not counts:
            continue
        fullest = max(SPLITS, key=counts.__getitem__)
        if counts[fullest] > 1:
            chosen[min(key for key, held in chosen.items() if held == fullest)] = split
