"""Grouping in bounded memory: the same groups as with everything in memory, whatever the blocks."""

import random
import tracemalloc
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import rensa
from hypothesis import given, settings
from hypothesis import strategies as st

from teams_hpc.rewriting import similar_sets
from teams_hpc.rewriting.near_duplicates import jaccard, shingles
from teams_hpc.rewriting.similar_sets import SimilarSets
from teams_hpc.storage import scratch
from teams_hpc.storage.scratch import ScratchFile


def reference_groups(sets: list[frozenset[str]], threshold: float) -> list[int]:
    """All signatures and all pairs in memory: linked if a band agrees and the sets are similar."""
    rows = similar_sets._band_rows(threshold)
    matrix = rensa.RMinHash.digest_matrix_from_token_sets([list(one) for one in sets], 256, 543)
    bands = np.array(matrix.to_rows(), np.uint32)[:, : 256 // rows * rows]
    bands = bands.reshape(len(sets), -1, rows)
    root = list(range(len(sets)))
    for one, other in combinations(range(len(sets)), 2):
        is_candidate = (bands[one] == bands[other]).all(axis=1).any()
        if is_candidate and jaccard(sets[one], sets[other]) >= threshold:
            low, high = sorted((root[one], root[other]))
            root = [low if name == high else name for name in root]
    return root


def families(source: random.Random, num_families: int, size: int) -> list[frozenset[str]]:
    """Texts in families, most of them near one threshold or another; some equal."""
    vocabulary = [f"w{number}" for number in range(300)]
    texts = []
    for _ in range(num_families):
        original = source.choices(vocabulary, k=source.randrange(1, 40))
        for _ in range(source.randrange(1, size)):
            copy = list(original)
            for _ in range(source.choice((0, 1, 1, 2, 3))):
                copy[source.randrange(len(copy))] = source.choice(vocabulary)
            texts.append(" ".join(copy))
    source.shuffle(texts)
    return [shingles(text) for text in texts]


@settings(max_examples=60, deadline=None)
@given(
    key=st.integers(0, 10**6),
    size=st.sampled_from([3, 8, 40]),
    threshold=st.sampled_from([0.3, 0.5, 0.7, 0.8, 0.95, 1.0]),
    few=st.sampled_from([0, 3, 12]),
    linked=st.sampled_from([1, 5, 64]),
)
def test_groups_are_those_of_the_reference_whatever_the_blocks(
    key: int, size: int, threshold: float, few: int, linked: int
) -> None:
    sets = families(random.Random(key), 6, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similar_sets, "_BLOCK_SETS", 7)
        patch.setattr(similar_sets, "_FEW_SETS", few)
        patch.setattr(similar_sets, "_LINKED_SETS", linked)
        patch.setattr(similar_sets, "_COUNTED_ELEMENTS", 5)
        patch.setattr(scratch, "_KEPT_BYTES", 100)
        index = SimilarSets(threshold)
        for one in sets:
            index.add(one)
        found = index.groups().tolist()
        index.close()
    assert found == reference_groups(sets, threshold)


def test_without_sets_there_are_no_groups() -> None:
    assert SimilarSets(0.8).groups().tolist() == []
    assert SimilarSets(0.0).groups().tolist() == []


def test_memory_grows_by_little_for_each_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The elements of a set are some 6 KB, their hashes 480 bytes."""
    count = 8_000
    monkeypatch.setattr(scratch, "_KEPT_BYTES", 1 << 16)
    monkeypatch.setattr(similar_sets, "_BLOCK_SETS", 256)
    index = SimilarSets(0.8, tmp_path)
    tracemalloc.start()
    for number in range(count):
        index.add({f"element {element:20d} of {number:20d}"[:50] for element in range(60)})
    index.groups()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_file_gives_back_what_was_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_KEPT_BYTES", 10)
    source = random.Random(3)
    file, content = ScratchFile(tmp_path), b""
    for _ in range(40):
        piece = source.randbytes(source.randrange(9))
        file.append(piece)
        content += piece
        start = source.randrange(len(content) + 1)
        size = source.randrange(len(content) - start + 1)
        assert file.read(start, size) == content[start : start + size]
    assert len(file) == len(content) > 100
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(EOFError):
        file.read(len(content) - 1, 2)
    file.close()
