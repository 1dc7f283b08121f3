"""Splits of the seeds: nothing leaks, nothing moves, shares hold."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teams_hpc.config.schema import SeedsConfig
from teams_hpc.rewriting.near_duplicates import jaccard, shingles
from teams_hpc.rewriting.seeds import Seed, read_seeds
from teams_hpc.rewriting.splits import SPLITS, split_seeds

CONFIG = SeedsConfig()
SHIPPED = read_seeds(None, None).seeds


def distinct_seeds(count: int, tag: str) -> list[Seed]:
    """Seeds without a shingle in common."""
    return [Seed(f"name{tag}{n} the{tag}{n} colour{tag}{n} of{tag}{n}") for n in range(count)]


def test_no_near_duplicate_straddles_two_splits() -> None:
    variants = [
        Seed(variant, seed.input)
        for seed in SHIPPED
        for variant in (
            f"Please, {seed.instruction[0].lower()}{seed.instruction[1:]}",
            seed.instruction.upper(),
        )
    ]
    seeds = [*SHIPPED, *variants]
    split_of = split_seeds(seeds, CONFIG, run_seed=543)
    assert len(split_of) == len(seeds)
    sets = [(shingles(seed.instruction), split_of[seed.id]) for seed in seeds]
    num_near = 0
    for position, (first, first_split) in enumerate(sets):
        for second, second_split in sets[position + 1 :]:
            if jaccard(first, second) >= CONFIG.near_duplicate_threshold:
                num_near += 1
                assert first_split == second_split
    assert num_near > len(SHIPPED)


def test_one_instruction_with_many_inputs_stays_together() -> None:
    seeds = [Seed("Correct the spelling.", f"text number {n}") for n in range(50)]
    assert len(set(split_seeds(seeds + distinct_seeds(50, "x"), CONFIG, 1).values())) == 4
    split_of = split_seeds(seeds + distinct_seeds(50, "x"), CONFIG, 1)
    assert len({split_of[seed.id] for seed in seeds}) == 1


def test_one_long_input_under_many_instructions_stays_together() -> None:
    passage = "The ferry ran aground at dawn and waited for the tide to rise."
    on_passage = [Seed(seed.instruction, passage) for seed in distinct_seeds(40, "p")]
    on_number = [Seed(seed.instruction, "5, 8, 2") for seed in distinct_seeds(40, "n")]
    split_of = split_seeds(on_passage + on_number, CONFIG, run_seed=1)
    assert len({split_of[seed.id] for seed in on_passage}) == 1
    assert len({split_of[seed.id] for seed in on_number}) == 4


@settings(max_examples=20, deadline=None)
@given(run_seed=st.integers(0, 2**63 - 1), order=st.randoms(use_true_random=False))
def test_neither_order_nor_unrelated_seeds_move_a_seed(run_seed: int, order: object) -> None:
    before = split_seeds(SHIPPED, CONFIG, run_seed)
    more = [*distinct_seeds(100, "y"), *SHIPPED]
    order.shuffle(more)  # type: ignore[attr-defined]
    after = split_seeds(more, CONFIG, run_seed)
    assert {seed.id: after[seed.id] for seed in SHIPPED} == before


def test_shares_hold_and_the_run_seed_matters() -> None:
    seeds = distinct_seeds(4000, "z")
    split_of = split_seeds(seeds, CONFIG, run_seed=7)
    counts = Counter(split_of.values())
    for split in SPLITS:
        share = getattr(CONFIG, f"{split}_share")
        # Four standard deviations of a binomial count.
        margin = 4.0 * (4000 * share * (1 - share)) ** 0.5
        assert abs(counts[split] - 4000 * share) < margin, split
    other = split_seeds(seeds, CONFIG, run_seed=8)
    num_moved = sum(split_of[seed.id] != other[seed.id] for seed in seeds)
    assert 0.4 < num_moved / 4000 < 0.75


def test_a_split_without_a_share_stays_empty() -> None:
    config = SeedsConfig(
        policy_train_share=0.5,
        policy_select_share=0.0,
        policy_report_share=0.5,
        sft_held_out_share=0.0,
    )
    split_of = split_seeds(distinct_seeds(300, "w"), config, run_seed=3)
    assert set(split_of.values()) == {"policy_train", "policy_report"}


@pytest.mark.parametrize("count", [4, 5, 8])
def test_a_handful_of_seeds_still_fills_every_split(count: int) -> None:
    for run_seed in range(30):
        split_of = split_seeds(distinct_seeds(count, "v"), CONFIG, run_seed)
        assert set(split_of.values()) == set(SPLITS)


def test_fewer_clusters_than_splits_still_place_every_seed() -> None:
    assert split_seeds([], CONFIG, run_seed=1) == {}
    seeds = distinct_seeds(2, "u")
    assert set(split_seeds(seeds, CONFIG, run_seed=1)) == {seed.id for seed in seeds}
