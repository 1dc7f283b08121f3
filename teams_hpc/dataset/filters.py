"""Which rows become the data set.

Rules on a row alone come first, so that a contaminated or unanswered row never stands for its
duplicates. Then rows with nearly the same instruction and input form a cluster, and a cluster
keeps one row: the held-out row with the smallest record id if it has any, else the training row
with the smallest. What is kept doesn't depend on the order of the rows.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from teams_hpc.config.schema import DatasetConfig
from teams_hpc.dataset.balance import Fate
from teams_hpc.dataset.decontamination import Benchmarks
from teams_hpc.rewriting.near_duplicates import cluster
from teams_hpc.rewriting.splits import SPLITS
from teams_hpc.storage.shards import Finish, Rows, Status

_HELD_OUT_SPLIT = SPLITS.index("sft_held_out")


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

    Memory: the texts of all candidates' instructions and inputs, and what clustering needs for
    them (some 2 KB each): about 0.5 GB for 200,000 rows.
    """

    config: DatasetConfig
    benchmarks: Benchmarks
    _fates: list[Fate | None] = field(default_factory=list)
    _candidates: list[Candidate] = field(default_factory=list)

    def add(self, rows: Rows) -> None:
        """Take the next rows, with at least `sources.FATE_COLUMNS`."""
        for index in range(len(rows["record_id"])):
            fate = self._own_fate(rows, index)
            self._fates.append(fate)
            if fate is None:
                self._candidates.append(
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

    def finish(self) -> list[Fate]:
        """The fate of every row added, in order."""
        settled = iter(settle_duplicates(self._candidates, self.config.near_duplicate_threshold))
        return [next(settled) if fate is None else fate for fate in self._fates]


def settle_duplicates(candidates: Sequence[Candidate], threshold: float) -> list[Fate]:
    """Keep one row of each cluster of near-duplicates.

    A training row beside a held-out one is `near_held_out`, also if they are equal. Of the others
    that go, those that equal a row with a smaller record id are exact duplicates.
    """
    clusters: dict[int, list[int]] = defaultdict(list)
    groups = cluster([candidate.prompt for candidate in candidates], threshold)
    for index, representative in enumerate(groups):
        clusters[representative].append(index)
    fates: dict[int, Fate] = {}
    for members in clusters.values():
        held_out = [index for index in members if candidates[index].is_held_out]
        training = [index for index in members if not candidates[index].is_held_out]
        if held_out:
            fates |= _keep_smallest(candidates, held_out, Fate.HELD_OUT)
            fates |= dict.fromkeys(training, Fate.NEAR_HELD_OUT)
        else:
            fates |= _keep_smallest(candidates, training, Fate.TRAIN)
    return [fates[index] for index in range(len(candidates))]


def _keep_smallest(
    candidates: Sequence[Candidate], members: Iterable[int], kept: Fate
) -> dict[int, Fate]:
    ordered = sorted(members, key=lambda index: (candidates[index].record_id, index))
    fates: dict[int, Fate] = {}
    seen: set[str] = set()
    for index in ordered:
        prompt = candidates[index].prompt
        fates[index] = Fate.EXACT_DUPLICATE if prompt in seen else Fate.NEAR_DUPLICATE
        seen.add(prompt)
    return {**fates, ordered[0]: kept}


def count_fates(fates: Sequence[Fate]) -> dict[str, int]:
    """Rows read and rows by fate, every fate named."""
    counts = Counter(fates)
    return {"read": len(fates), **{fate.value: counts[fate] for fate in Fate}}
