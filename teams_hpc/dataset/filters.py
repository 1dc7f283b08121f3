"""Which rows become the data set.

Rules on a row alone come first, so that a contaminated or unanswered row never stands for its
duplicates. Then rows with nearly the same instruction and input form a cluster, and a cluster
keeps one row: the held-out row with the smallest record id if it has any, else the training row
with the smallest. What is kept doesn't depend on the order of the rows.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from teams_hpc.config.schema import DatasetConfig
from teams_hpc.dataset.balance import Fate
from teams_hpc.dataset.decontamination import Benchmarks
from teams_hpc.rewriting.near_duplicates import shingles
from teams_hpc.rewriting.similar_sets import SimilarSets
from teams_hpc.rewriting.splits import SPLITS
from teams_hpc.storage.shards import Finish, Rows, Status

_HELD_OUT_SPLIT = SPLITS.index("sft_held_out")
_PROMPT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row that is good in itself.

    Attributes:
        record_id: Its identity.
        prompt: Instruction and input, as one text.
        is_held_out: Grown from a seed that stays out of fine-tuning.
    """

    record_id: str
    prompt: str
    is_held_out: bool


@dataclass(slots=True)
class FateSorter:
    """Decides every row's fate: `add` all rows in order, then `finish`.

    Memory: about 200 bytes a candidate; their texts stay out of it.

    Args:
        config: The thresholds and switches.
        benchmarks: What must not be in the data set.
        scratch: Folder for scratch files; None: the one for temporary files.
    """

    config: DatasetConfig
    benchmarks: Benchmarks
    scratch: Path | None = None
    _fates: list[Fate | None] = field(default_factory=list)
    _duplicates: "DuplicateSorter" = field(init=False)

    def __post_init__(self) -> None:
        self._duplicates = DuplicateSorter(self.config.near_duplicate_threshold, self.scratch)

    def add(self, rows: Rows) -> None:
        """Take the next rows, with at least `sources.FATE_COLUMNS`."""
        for index in range(len(rows["record_id"])):
            fate = self._own_fate(rows, index)
            self._fates.append(fate)
            if fate is None:
                self._duplicates.add(
                    Candidate(
                        rows["record_id"][index],
                        f"{rows['instruction'][index]}\0{rows['input'][index]}",
                        rows["split"][index] == _HELD_OUT_SPLIT,
                    )
                )

    def _own_fate(self, rows: Rows, index: int) -> Fate | None:
        """The first rule on the row alone that holds; None for a candidate."""
        if rows["status"][index] != Status.KEPT:
            return Fate.NOT_KEPT
        finish, response = rows["answer_finish"][index], rows["response"][index]
        if finish in (Finish.NONE, Finish.ERROR) or not response.strip():
            return Fate.UNANSWERED
        if finish == Finish.LENGTH and self.config.drop_truncated:
            return Fate.TRUNCATED
        texts = rows["instruction"][index], rows["input"][index], response
        return Fate.CONTAMINATED if self.benchmarks.contaminates(*texts) else None

    def finish(self, on_part: Callable[[float], None] = lambda share: None) -> list[Fate]:
        """The fate of every row added, in order.

        Args:
            on_part: Told now and then which share of the comparisons is done.
        """
        settled = iter(self._duplicates.settle(on_part))
        return [next(settled) if fate is None else fate for fate in self._fates]


class DuplicateSorter:
    """Keeps one row of each cluster of near-duplicates.

    A training row beside a held-out one is `near_held_out`, also if they are equal. Of the others
    that go, those that equal a row with a smaller record id are exact duplicates.
    """

    def __init__(self, threshold: float, scratch: Path | None = None) -> None:
        self._sets = SimilarSets(threshold, scratch)
        self._ids = bytearray()
        self._id_ends = array("q", [0])
        self._prompts = bytearray()
        self._held_out = bytearray()

    def add(self, candidate: Candidate) -> None:
        """Take the next row."""
        self._sets.add(shingles(candidate.prompt))
        self._ids += candidate.record_id.encode()
        self._id_ends.append(len(self._ids))
        prompt = candidate.prompt.encode("utf-8", "surrogatepass")
        self._prompts += hashlib.blake2b(prompt, digest_size=_PROMPT_BYTES).digest()
        self._held_out.append(candidate.is_held_out)

    def settle(self, on_part: Callable[[float], None] = lambda share: None) -> list[Fate]:
        """The fate of each row, in order; call it once."""
        roots = self._sets.groups(lambda done, total: on_part(done / total))
        self._sets.close()
        fates = [Fate.HELD_OUT if is_held else Fate.TRAIN for is_held in self._held_out]
        for members in _clusters(roots):
            held_out = [index for index in members if self._held_out[index]]
            for index in members:
                fates[index] = Fate.NEAR_HELD_OUT
            self._keep_smallest(fates, held_out or members)
        return fates

    def _keep_smallest(self, fates: list[Fate], members: Iterable[int]) -> None:
        ordered = sorted(members, key=lambda index: (self._id(index), index))
        seen: set[bytes] = set()
        for index in ordered:
            prompt = bytes(self._prompts[index * _PROMPT_BYTES : (index + 1) * _PROMPT_BYTES])
            fates[index] = Fate.EXACT_DUPLICATE if prompt in seen else Fate.NEAR_DUPLICATE
            seen.add(prompt)
        first = ordered[0]
        fates[first] = Fate.HELD_OUT if self._held_out[first] else Fate.TRAIN

    def _id(self, index: int) -> bytes:
        return bytes(self._ids[self._id_ends[index] : self._id_ends[index + 1]])


def _clusters(roots: npt.NDArray[np.int64]) -> Iterator[list[int]]:
    """The indices of each cluster of more than one, ascending."""
    order = np.argsort(roots, kind="stable")
    ordered = roots[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
    ends = np.append(starts[1:], len(ordered))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if end - start > 1:
            yield cast("list[int]", order[start:end].tolist())


def settle_duplicates(candidates: Sequence[Candidate], threshold: float) -> list[Fate]:
    """The fate of each of some rows; see `DuplicateSorter`."""
    sorter = DuplicateSorter(threshold)
    for candidate in candidates:
        sorter.add(candidate)
    return sorter.settle()


def count_fates(fates: Sequence[Fate]) -> dict[str, int]:
    """Rows read and rows by fate, every fate named."""
    counts = Counter(fates)
    return {"read": len(fates), **{fate.value: counts[fate] for fate in Fate}}
