"""Which row of a cluster stays: independent of order, held-out rows before training rows."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teams_hpc.config.schema import DatasetConfig
from teams_hpc.dataset.balance import Fate, check_balance
from teams_hpc.dataset.decontamination import Benchmarks
from teams_hpc.dataset.filters import Candidate, FateSorter, count_fates, settle_duplicates
from teams_hpc.rewriting.splits import SPLITS
from teams_hpc.storage.shards import Finish, Rows, Status

TEXTS = (
    "Name the capital of the large country to the north of the river",
    "Name the capital of the large country to the north of the river!",
    "Explain in a few words why the sky turns red at the end of the day",
    "EXPLAIN in a few words why the sky turns red at the end of the day",
    "Sort these seven numbers",
)
CANDIDATES = st.lists(
    st.tuples(st.sampled_from(TEXTS), st.booleans()), min_size=1, max_size=14
).map(
    lambda parts: [
        Candidate(f"{number:032x}", f"{text}\0", held) for number, (text, held) in enumerate(parts)
    ]
)


def group(candidate: Candidate) -> str:
    return candidate.prompt.casefold().strip("!\0")


@given(CANDIDATES, st.randoms(use_true_random=False))
def test_one_row_of_a_cluster_stays_in_any_order(
    candidates: list[Candidate], random: Random
) -> None:
    fates = dict(zip(candidates, settle_duplicates(candidates, 0.8), strict=True))
    shuffled = sorted(candidates, key=lambda candidate: random.random())
    again = dict(zip(shuffled, settle_duplicates(shuffled, 0.8), strict=True))
    assert again == fates

    clusters: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        clusters.setdefault(group(candidate), []).append(candidate)
    for members in clusters.values():
        held_out = [member for member in members if member.is_held_out]
        stays = min(held_out or members, key=lambda member: member.record_id)
        counts = Counter(fates[member] for member in members)
        assert fates[stays] is (Fate.HELD_OUT if held_out else Fate.TRAIN)
        assert counts[Fate.HELD_OUT] + counts[Fate.TRAIN] == 1
        near = counts[Fate.NEAR_HELD_OUT]
        assert near == (len(members) - len(held_out) if held_out else 0)
        rivals = held_out or members
        assert counts[Fate.EXACT_DUPLICATE] == len(rivals) - len({m.prompt for m in rivals})


def test_one_instruction_with_other_inputs_stays() -> None:
    inputs = ("Guten Morgen zusammen", "Buenas noches amigos", "")
    candidates = [Candidate(text, f"Translate to English.\0{text}", False) for text in inputs]
    assert settle_duplicates(candidates, 0.8) == [Fate.TRAIN] * 3


def rows(**columns: list[object]) -> Rows:
    count = len(next(iter(columns.values())))
    defaults: Rows = {
        "record_id": [f"{number:032x}" for number in range(count)],
        "split": [0] * count,
        "instruction": [f"Do thing number {number}" for number in range(count)],
        "input": [""] * count,
        "response": ["Done."] * count,
        "status": [Status.KEPT] * count,
        "answer_finish": [Finish.STOP] * count,
    }
    return {**defaults, **columns}


@pytest.mark.parametrize("drop_truncated", [True, False])
def test_rules_on_a_row_alone_come_first_and_in_order(drop_truncated: bool) -> None:
    sorter = FateSorter(DatasetConfig(drop_truncated=drop_truncated), Benchmarks.read([], 8))
    same = ["The very same instruction for all of these rows"]
    sorter.add(
        rows(
            status=[Status.FAILED, Status.ELIMINATED, *[Status.KEPT] * 4],
            answer_finish=[
                Finish.NONE,
                Finish.LENGTH,
                Finish.NONE,
                Finish.STOP,
                Finish.LENGTH,
                Finish.STOP,
            ],
            response=["", "a", "", " ", "cut of", "whole"],
            instruction=same * 6,
        )
    )
    sorter.add(rows(record_id=["f" * 32], split=[SPLITS.index("sft_held_out")]))
    cut, last = (
        (Fate.TRUNCATED, Fate.TRAIN) if drop_truncated else (Fate.TRAIN, Fate.EXACT_DUPLICATE)
    )
    fates = sorter.finish()
    assert fates == [
        Fate.NOT_KEPT,
        Fate.NOT_KEPT,
        Fate.UNANSWERED,
        Fate.UNANSWERED,
        cut,
        last,
        Fate.HELD_OUT,
    ]
    counts = count_fates(fates)
    packing = {"sequences": 1, "prompt_too_long": 0}
    manifest = {"counts": counts, "packing": {"train": packing, "held_out": packing}}
    assert check_balance(manifest) == []
    counts["unanswered"] -= 1
    assert check_balance(manifest) == [
        f"dataset: 7 rows read, but 2 not_kept + 1 unanswered + {counts['truncated']} truncated + "
        f"0 contaminated + {counts['exact_duplicates']} exact_duplicates + 0 near_duplicates + "
        "0 near_held_out + 1 train + 1 held_out = 6"
    ]
