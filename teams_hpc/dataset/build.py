"""The stage `dataset`: from generated rows to a training set that is ready to train on.

Five passes: read the shards; compare rows and settle every one's fate; write the rows that stay
to `dataset.h5`; tokenise them; pack them into `packed.h5`. A pass is made again from the start if
it was interrupted, because together they take minutes; the manifest comes last.

Memory is bounded: texts and tokens pass through in blocks, and what is compared or packed later
waits in scratch files in the stage's folder. What grows with the rows is some 400 bytes for each.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from teams_hpc.config import Config
from teams_hpc.config.digest import file_digest, model_content_id
from teams_hpc.dataset.balance import GROUPS, Fate, check_against_generation, check_balance
from teams_hpc.dataset.decontamination import Benchmarks
from teams_hpc.dataset.filters import FateSorter, count_fates
from teams_hpc.dataset.packed_file import (
    SequenceCollector,
    read_examples,
    tokenise,
    write_packed,
)
from teams_hpc.dataset.sources import REMEDY, Shards
from teams_hpc.dataset.templates import PromptFormat, Row, choose_format
from teams_hpc.dataset.tokenizer import PreparedTokenizer, prepare_tokenizer
from teams_hpc.errors import CorruptFileError, WorkError
from teams_hpc.runtime.metrics import Progress
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import read_json, remove_leftovers
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest
from teams_hpc.storage.shards import ROW_COLUMNS, Column, Rows, Table, TableWriter

DATASET_COLUMNS = (*ROW_COLUMNS, Column("use", "uint8"))
_NUM_PASSES = 5
_ROWS_AT_A_TIME = 1024
_log = logging.getLogger(__name__)


def build_dataset(run_dir: RunDir, config: Config, index: int, stop: StopFlag) -> None:
    """Filter, merge, tokenise and pack what generation made.

    Raises:
        CorruptFileError: A shard is missing or doesn't match its checksums, or the rows are not
            those that generation's manifest counts.
        WorkError: No row is left to train on, a benchmark file can't be read, or the model has no
            usable tokenizer.
        StopRequested: Asked to stop between pieces; nothing half-written stays.
    """
    if read_manifest(run_dir, "dataset") is not None:
        return
    remove_leftovers(run_dir.dataset)
    watch = _Watch(Progress(run_dir.progress("dataset"), unit="passes"), stop)
    shards = Shards.of(run_dir)
    fates = _settle_fates(run_dir, shards, config, watch)
    counts = count_fates(fates)
    if faults := check_against_generation(counts, shards.counts):
        raise CorruptFileError(f"{'; '.join(faults)}; {REMEDY}")
    _refuse_empty(counts)
    data_digest = _write_dataset(run_dir, shards, fates, counts, watch)
    prepared = prepare_tokenizer(
        config.sft.model, _training_rows(run_dir.dataset_rows), run_dir.tokenizer
    )
    prompt_format = choose_format(prepared.tokenizer)
    packing = _pack(run_dir, config.sft.sequence_length, prepared, prompt_format, watch)
    manifest = {
        "counts": counts,
        "packing": packing,
        "template": prompt_format.name,
        "sequence_length": config.sft.sequence_length,
        "tokenizer": _describe_tokenizer(run_dir, prepared),
        "exactness": shards.exactness,
        "sha256": data_digest,
        "files": _file_digests(run_dir),
    }
    faults = check_balance(manifest)
    if faults:
        raise AssertionError("; ".join(faults))
    write_manifest(run_dir, "dataset", manifest)
    watch.finish(f"{counts[Fate.TRAIN]} rows to train on, {counts[Fate.HELD_OUT]} held out")


class _Watch:
    """Reports progress and looks for a stop request, between pieces of a pass."""

    def __init__(self, progress: Progress, stop: StopFlag) -> None:
        self._progress = progress
        self._stop = stop

    def check(self, passes_done: int, done: int, total: int, doing: str) -> None:
        share = done / total if total else 1.0
        self._progress.update(passes_done + share, _NUM_PASSES, f"{doing}: {done} of {total} rows")
        self._stop.raise_if_set(f"{passes_done} of {_NUM_PASSES} passes")

    def finish(self, message: str) -> None:
        self._progress.update(_NUM_PASSES, _NUM_PASSES, message)


def _settle_fates(run_dir: RunDir, shards: Shards, config: Config, watch: _Watch) -> list[Fate]:
    settings = config.dataset
    benchmarks = Benchmarks.read(settings.decontaminate, settings.decontamination_ngram)
    sorter = FateSorter(settings, benchmarks, run_dir.dataset)
    done, total = 0, shards.num_rows
    for rows in shards.verified():
        sorter.add(rows)
        done += len(rows["record_id"])
        watch.check(0, done, total, "reading")
    return sorter.finish(lambda share: watch.check(1, int(share * total), total, "comparing"))


def _refuse_empty(counts: dict[str, int]) -> None:
    lost = ", ".join(
        f"{number} {name}" for name, number in counts.items() if number and name != "read"
    )
    if not counts[Fate.TRAIN]:
        raise WorkError(
            f"no row is left to train on: of {counts['read']} rows {lost or 'none was made'}; "
            "see the eliminations in generate/manifest.json, use more seeds (seeds.limit) or more "
            "steps (generate.num_steps)"
        )
    if not counts[Fate.HELD_OUT]:
        _log.warning("no row is held out: held-out loss and privacy can't be measured (%s)", lost)


def _write_dataset(
    run_dir: RunDir,
    shards: Shards,
    fates: Sequence[Fate],
    counts: dict[str, int],
    watch: _Watch,
) -> str:
    """Write the rows that stay; returns the SHA-256 over their columns."""
    with TableWriter(run_dir.dataset_rows, DATASET_COLUMNS, "dataset") as writer:
        for rows in _rows_that_stay(shards, fates, watch):
            writer.append(rows)
        digest = read_json(run_dir.inputs("dataset"))["digest"]
        return writer.close({"digest": digest, "counts": counts})


def _rows_that_stay(shards: Shards, fates: Sequence[Fate], watch: _Watch) -> Iterator[Rows]:
    done = 0
    for rows in shards.blocks([column.name for column in ROW_COLUMNS]):
        own = fates[done : done + len(rows["record_id"])]
        stay = [position for position, fate in enumerate(own) if fate in GROUPS]
        kept = {name: [values[position] for position in stay] for name, values in rows.items()}
        kept["use"] = [GROUPS.index(own[position]) for position in stay]
        yield kept
        done += len(own)
        watch.check(2, done, len(fates), "writing")


def _training_rows(dataset: Path) -> Iterator[Row]:
    with Table.open(dataset) as table:
        for start in range(0, table.num_rows, _ROWS_AT_A_TIME):
            rows, uses = read_examples(table, start, start + _ROWS_AT_A_TIME)
            yield from (
                row for row, use in zip(rows, uses, strict=True) if GROUPS[use] is Fate.TRAIN
            )


def _pack(
    run_dir: RunDir,
    row_length: int,
    prepared: PreparedTokenizer,
    prompt_format: PromptFormat,
    watch: _Watch,
) -> dict[str, dict[str, Any]]:
    """Tokenise and pack both groups; returns the counts of each."""
    collectors = tokenise(
        run_dir.dataset_rows,
        prompt_format,
        row_length,
        run_dir.dataset,
        lambda done, total: watch.check(3, done, total, "tokenising"),
    )
    _refuse_unpackable(collectors[Fate.TRAIN], row_length)
    attrs = {
        "vocab_size": prepared.vocab_size,
        "sequence_length": row_length,
        "template": prompt_format.name,
    }
    return write_packed(run_dir.packed_rows, collectors, prepared.pad_token_id, attrs)


def _refuse_unpackable(train: SequenceCollector, row_length: int) -> None:
    if not len(train):
        raise WorkError(
            f"sft.sequence_length: {row_length} tokens are too few, no prompt of the "
            f"{train.prompt_too_long} training rows leaves room for a response; raise it"
        )


def _describe_tokenizer(run_dir: RunDir, prepared: PreparedTokenizer) -> dict[str, Any]:
    return {
        "content_id": model_content_id(run_dir.tokenizer),
        "is_trained": prepared.is_trained,
        "vocab_size": prepared.vocab_size,
        "eos_token_id": int(prepared.tokenizer.eos_token_id),
        "pad_token_id": prepared.pad_token_id,
        "pad_is_eos": prepared.pad_is_eos,
    }


def _file_digests(run_dir: RunDir) -> dict[str, str]:
    paths = [run_dir.dataset_rows, run_dir.packed_rows, *sorted(run_dir.tokenizer.iterdir())]
    return {str(path.relative_to(run_dir.dataset)): file_digest(path) for path in paths}
