"""Where every row of generation went: the counts of the data set's manifest, and their balance."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Fate(StrEnum):
    """What became of a generated row. Tested in this order; the first that holds counts.

    The first four depend on the row alone, the next three on the rows beside it.
    """

    NOT_KEPT = "not_kept"
    UNANSWERED = "unanswered"
    TRUNCATED = "truncated"
    CONTAMINATED = "contaminated"
    EXACT_DUPLICATE = "exact_duplicates"
    NEAR_DUPLICATE = "near_duplicates"
    NEAR_HELD_OUT = "near_held_out"
    TRAIN = "train"
    HELD_OUT = "held_out"


GROUPS = (Fate.TRAIN, Fate.HELD_OUT)
"""The fates that put a row into the data set; the position is its `use` in `dataset.h5`."""


def check_against_generation(counts: Mapping[str, int], generated: Mapping[str, Any]) -> list[str]:
    """Faults between the counts of a data set and those of the generation that it was made of.

    Rows read = steps attempted; rows not kept = eliminated + failed.
    """
    faults = []
    if counts["read"] != generated["attempted"]:
        faults.append(
            f"dataset: {counts['read']} rows read, but generation counts "
            f"{generated['attempted']} attempted"
        )
    eliminated, failed = sum(generated["eliminated"].values()), generated["failed"]
    if counts[Fate.NOT_KEPT] != eliminated + failed:
        faults.append(
            f"dataset: {counts[Fate.NOT_KEPT]} rows not kept, but generation counts {eliminated} "
            f"eliminated + {failed} failed = {eliminated + failed}"
        )
    return faults


def check_balance(manifest: Mapping[str, Any]) -> list[str]:
    """Faults in the manifest's equations; empty if every row is accounted for.

    Rows: read = the sum over all fates. Sequences, for either group: rows of the group = packed +
    left out because the prompt alone fills a row.
    """
    counts = manifest["counts"]
    faults = []
    parts = {fate.value: counts[fate.value] for fate in Fate}
    if counts["read"] != sum(parts.values()):
        listed = " + ".join(f"{number} {name}" for name, number in parts.items())
        faults.append(f"dataset: {counts['read']} rows read, but {listed} = {sum(parts.values())}")
    for group in GROUPS:
        packing = manifest["packing"][group.value]
        total = packing["sequences"] + packing["prompt_too_long"]
        if counts[group.value] != total:
            faults.append(
                f"dataset: {counts[group.value]} {group.value} rows, but {packing['sequences']} "
                f"packed + {packing['prompt_too_long']} with too long a prompt = {total}"
            )
    return faults
