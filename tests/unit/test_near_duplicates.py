"""Near-duplicate groups: against brute force, in any order, at the edges."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teams_hpc.rewriting.near_duplicates import cluster, jaccard, shingles

VOCABULARY = [f"word{number}" for number in range(400)]


def groups(texts: Sequence[str], threshold: float) -> set[frozenset[str]]:
    """The partition as sets of texts."""
    members: dict[int, set[str]] = {}
    for text, representative in zip(texts, cluster(texts, threshold), strict=True):
        members.setdefault(representative, set()).add(text)
    return {frozenset(group) for group in members.values()}


def brute_force_groups(texts: Sequence[str], threshold: float) -> set[frozenset[str]]:
    """Connected components over all pairs."""
    group_of = {text: {text} for text in texts}
    sets = {text: shingles(text) for text in texts}
    for first in texts:
        for second in texts:
            if group_of[first] is group_of[second]:
                continue
            if jaccard(sets[first], sets[second]) >= threshold:
                group_of[first] |= group_of[second]
                for text in group_of[second]:
                    group_of[text] = group_of[first]
    return {frozenset(group) for group in group_of.values()}


def families(num_families: int, seed: int) -> list[str]:
    """Texts in families: each an original and copies with more and more words exchanged."""
    source = random.Random(seed)
    texts = []
    for _ in range(num_families):
        original = source.choices(VOCABULARY, k=source.randrange(4, 60))
        for num_changes in (0, 1, 2, 4):
            copy = list(original)
            for _ in range(num_changes):
                copy[source.randrange(len(copy))] = source.choice(VOCABULARY)
            texts.append(" ".join(copy))
    return sorted(set(texts))


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_groups_are_those_of_brute_force(threshold: float) -> None:
    texts = families(90, seed=5)
    expected = brute_force_groups(texts, threshold)
    assert any(len(group) > 1 for group in expected) or threshold == 1.0
    assert groups(texts, threshold) == expected


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from("abcde"), min_size=0, max_size=9).map(" ".join), max_size=25
    ),
    threshold=st.sampled_from([0.4, 0.7]),
    order=st.randoms(use_true_random=False),
)
def test_order_changes_neither_groups_nor_representatives(
    texts: list[str], threshold: float, order: random.Random
) -> None:
    shuffled = list(texts)
    order.shuffle(shuffled)
    chosen = {
        text: texts[first] for text, first in zip(texts, cluster(texts, threshold), strict=True)
    }
    again = {
        text: shuffled[first]
        for text, first in zip(shuffled, cluster(shuffled, threshold), strict=True)
    }
    assert chosen == again
    assert groups(texts, threshold) == brute_force_groups(list(dict.fromkeys(texts)), threshold)


def test_unrelated_texts_change_no_group() -> None:
    texts = families(40, seed=6)
    unrelated = [f"nothing{n} shared{n} with{n} any{n} other{n} text{n}" for n in range(200)]
    together = groups(unrelated + texts, 0.7)
    assert {group for group in together if not group & set(unrelated)} == groups(texts, 0.7)


def test_a_chain_of_neighbours_is_one_group() -> None:
    words = [f"w{n}" for n in range(60)]
    texts = [" ".join(words[start : start + 30]) for start in range(0, 30, 3)]
    assert jaccard(shingles(texts[0]), shingles(texts[-1])) < 0.1
    assert cluster(texts, 0.7) == [0] * len(texts)


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        ("Explain tides.", "explain   TIDES", True),
        ("Straße zum Wald", "STRASSE ZUM WALD", True),
        ("What is 3 + 4 in binary?", "What is 3 - 4 in binary?", False),
        ("Explain tides", "Explain clouds", False),
        ("请解释光合作用的过程", "请解释光合作用的过程。", True),
        ("请解释光合作用的过程", "请列出五种常见的水果", False),
        ("?!", "...", False),
        ("", " \n", True),
    ],
)
def test_what_counts_as_the_same_text(first: str, second: str, is_same: bool) -> None:
    assert (len(set(cluster([first, second], 0.7))) == 1) is is_same


def test_bounds_of_the_threshold() -> None:
    assert cluster([], 0.5) == []
    assert len(set(cluster(["red apples", "blue whales", "?"], 0.0))) == 1
    for threshold in (-0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            cluster(["one"], threshold)
