"""Sets of strings, millions of them, grouped by Jaccard similarity in bounded memory.

MinHash signatures (Broder 1997) are made block by block. What stays of a set are the 64-bit hashes
of its elements and one 64-bit key for each band of its signature, both in scratch files. Then band
by band: keys are sorted, sets with equal keys form a bucket, and the pairs of a bucket that are not
in one group yet are compared on all their elements, many at a time.

Memory: about 100 bytes a set, and some MiB for blocks. Two elements with the same 64-bit hash count
as one: among a million elements that happens once in 10^7 runs.
"""

import hashlib
from array import array
from collections.abc import Callable, Collection, Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import rensa

from teams_hpc.storage.scratch import ScratchFile

_NUM_PERMUTATIONS = 256
_MINHASH_SEED = 543
_MOST_MISSED = 1e-3
_BLOCK_SETS = 2048
_FEW_SETS = 12
_LINKED_SETS = 1024
_COUNTED_ELEMENTS = 4096

Indices = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


class SimilarSets:
    """Collects sets with `add`, then groups them once with `groups`.

    Args:
        threshold: Jaccard index in [0, 1] from which two sets are linked; see
            `near_duplicates.cluster`.
        scratch: Folder of the scratch files; None: the one for temporary files.
    """

    def __init__(self, threshold: float, scratch: Path | None = None) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold {threshold} is not between 0 and 1")
        self._threshold = threshold
        self._band_rows = _band_rows(threshold)
        self._num_bands = _NUM_PERMUTATIONS // self._band_rows
        self._pending: list[list[str]] = []
        self._ends = array("q", [0])
        self._digests = bytearray()
        self._hashes = ScratchFile(scratch)
        self._keys = ScratchFile(scratch)

    def __len__(self) -> int:
        return len(self._ends) - 1 + len(self._pending)

    def add(self, elements: Collection[str]) -> None:
        """Take the next set; it isn't empty."""
        self._pending.append(list(elements))
        if len(self._pending) == _BLOCK_SETS:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        hashed = rensa.RMinHash.hash_token_sets(self._pending)
        self._pending = []
        sizes = np.array([len(values) for values in hashed])
        flat = np.fromiter(chain.from_iterable(hashed), np.uint64, int(sizes.sum()))
        ends = np.cumsum(sizes)
        matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
            flat, [0, *ends.tolist()], _NUM_PERMUTATIONS, _MINHASH_SEED
        )
        self._keys.append(self._band_keys(np.array(matrix.to_rows(), np.uint64)).tobytes())
        for values in np.split(flat, ends[:-1]):
            values.sort()
            self._digests += hashlib.blake2b(values.tobytes(), digest_size=16).digest()
        self._hashes.append(flat.tobytes())
        self._ends.extend((ends + self._ends[-1]).tolist())

    def _band_keys(self, signatures: Hashes) -> Hashes:
        """One key for each band and set, shape (bands, sets): equal if the band is.

        Different bands may get one key, once in 2^64: the sets are compared in full anyway.
        """
        keys = np.zeros((self._num_bands, len(signatures)), np.uint64)
        for row in range(self._band_rows):
            part = signatures[:, row :: self._band_rows][:, : self._num_bands].T
            keys = _mix(keys ^ part)
        return keys

    def groups(self, on_band: Callable[[int, int], None] = lambda done, total: None) -> Indices:
        """The smallest index in each set's group, by index.

        Args:
            on_band: Told how many bands are done, and of how many.
        """
        self._flush()
        if self._threshold == 0.0:
            return np.zeros(len(self), np.int64)
        forest = _Forest(len(self))
        distinct = self._join_equal(forest)
        for band in range(self._num_bands):
            on_band(band, self._num_bands)
            keys = self._keys_of(band)[distinct]
            for bucket in _mixed_buckets(keys, forest.roots()[distinct]):
                self._link(forest, distinct[bucket])
        return forest.roots()

    def close(self) -> None:
        """Free the scratch files."""
        self._hashes.close()
        self._keys.close()

    def _join_equal(self, forest: "_Forest") -> Indices:
        """Put equal sets together; returns the first of each."""
        digests = np.frombuffer(bytes(self._digests), np.dtype((np.uint64, 2)))
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        ordered = digests[order]
        is_new = np.ones(len(self), np.bool_)
        is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        firsts = order[is_new]  # lexsort keeps the order of equals
        forest.parent[order] = firsts[np.cumsum(is_new) - 1]
        return np.sort(firsts)

    def _keys_of(self, band: int) -> Hashes:
        """The keys of one band, of all sets."""
        pieces = []
        for start in range(0, len(self), _BLOCK_SETS):
            count = min(_BLOCK_SETS, len(self) - start)
            at = start * self._num_bands + band * count
            pieces.append(self._keys.read(8 * at, 8 * count))
        return np.frombuffer(b"".join(pieces), np.uint64)

    def _link(self, forest: "_Forest", bucket: Indices) -> None:
        """Join the sets of a bucket that are similar."""
        if len(bucket) <= _FEW_SETS:
            _link_few(forest, self._load(bucket), self._threshold)
            return
        for first in range(0, len(bucket), _LINKED_SETS):
            left = self._load(bucket[first : first + _LINKED_SETS])
            for second in range(first, len(bucket), _LINKED_SETS):
                right = self._load(bucket[second : second + _LINKED_SETS])
                _link_blocks(forest, left, right, self._threshold)

    def _load(self, indices: Indices) -> "_Block":
        sets = []
        for index in indices.tolist():
            start, end = self._ends[index], self._ends[index + 1]
            content = self._hashes.read(8 * start, 8 * (end - start))
            sets.append(np.frombuffer(content, np.uint64))
        return _Block(indices, sets)


class _Forest:
    """Union-find; the root of a tree is its smallest index."""

    def __init__(self, size: int) -> None:
        self.parent = np.arange(size, dtype=np.int64)

    def roots(self) -> Indices:
        """Root of every item; shortens all ways to one step."""
        while True:
            above = self.parent[self.parent]
            if np.array_equal(above, self.parent):
                return above
            self.parent = above

    def find(self, item: int) -> int:
        while (above := int(self.parent[item])) != item:
            self.parent[item] = self.parent[above]
            item = above
        return item

    def join(self, first: int, second: int) -> int:
        """Make one tree of two, given their roots; returns its root."""
        low, high = min(first, second), max(first, second)
        self.parent[high] = low
        return low


class _Block:
    """Some sets with their hashes, each in ascending order."""

    def __init__(self, indices: Indices, sets: list[Hashes]) -> None:
        self.indices = indices
        self.sets = sets
        self.sizes = np.array([len(values) for values in sets])

    def __len__(self) -> int:
        return len(self.sets)

    def part(self, positions: Indices) -> "_Block":
        return _Block(self.indices[positions], [self.sets[at] for at in positions.tolist()])

    def incidence(self, elements: Hashes) -> npt.NDArray[np.float32]:
        """Which set has which of some ascending elements, as zeros and ones."""
        flat = np.concatenate(self.sets)
        rows = np.repeat(np.arange(len(self)), self.sizes)
        columns = np.minimum(np.searchsorted(elements, flat), len(elements) - 1)
        is_there = elements[columns] == flat
        matrix = np.zeros((len(self), len(elements)), np.float32)
        matrix[rows[is_there], columns[is_there]] = 1.0
        return matrix


def _link_few(forest: _Forest, block: _Block, threshold: float) -> None:
    """Join what is similar among a few sets, pair by pair."""
    sets = [frozenset(values.tolist()) for values in block.sets]
    indices = block.indices.tolist()
    for (one, mine), (other, others) in combinations(zip(indices, sets, strict=True), 2):
        roots = forest.find(one), forest.find(other)
        if roots[0] != roots[1]:
            shared = len(mine & others)
            if shared / (len(mine) + len(others) - shared) >= threshold:
                forest.join(*roots)


def _link_blocks(forest: _Forest, left: _Block, right: _Block, threshold: float) -> None:
    """Join what is similar between two blocks, which may be one."""
    roots = np.array([forest.find(index) for index in right.indices.tolist()])
    if left.indices[0] == right.indices[0]:
        # The pairs within the largest group need no look.
        names, counts = np.unique(roots, return_counts=True)
        left = left.part(np.flatnonzero(roots != names[counts.argmax()]))
    if not len(left):
        return
    similar = _similar(left, right, threshold)
    for index, row in zip(left.indices.tolist(), similar, strict=True):
        own = forest.find(index)
        for root in np.unique(roots[row & (roots != own)]).tolist():
            joined = forest.join(own, root)
            roots[(roots == own) | (roots == root)] = joined
            own = joined


def _similar(left: _Block, right: _Block, threshold: float) -> npt.NDArray[np.bool_]:
    """Which set of one block is similar to which of the other, shape (left, right).

    Elements in common are counted by a product of matrices, exact below 2^24.
    """
    shared = np.zeros((len(left), len(right)), np.float32)
    both = np.intersect1d(np.concatenate(left.sets), np.concatenate(right.sets))
    for start in range(0, len(both), _COUNTED_ELEMENTS):
        elements = both[start : start + _COUNTED_ELEMENTS]
        shared += left.incidence(elements) @ right.incidence(elements).T
    exact = shared.astype(np.int64)
    either = left.sizes[:, None] + right.sizes[None, :] - exact
    return cast("npt.NDArray[np.bool_]", exact / either >= threshold)


def _mixed_buckets(keys: Hashes, roots: Indices) -> Iterator[Indices]:
    """Positions, ascending, that have one key and belong to more than one group."""
    order = np.argsort(keys, kind="stable")
    ordered, roots = keys[order], roots[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.append(starts[1:], len(order))
    if not len(order):
        return
    is_mixed = np.minimum.reduceat(roots, starts) != np.maximum.reduceat(roots, starts)
    for start, end in zip(starts[is_mixed].tolist(), ends[is_mixed].tolist(), strict=True):
        yield order[start:end]


def _mix(values: Hashes) -> Hashes:
    """Spread each value over its 64 bits (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _band_rows(threshold: float) -> int:
    """The longest band that still misses a pair at the threshold only with `_MOST_MISSED`."""
    rows = 1
    while rows < _NUM_PERMUTATIONS:
        longer = rows + 1
        missed = (1.0 - threshold**longer) ** (_NUM_PERMUTATIONS // longer)
        if missed > _MOST_MISSED:
            break
        rows = longer
    return rows
