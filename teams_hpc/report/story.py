"""The sections of the report about generation and example chains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from teams_hpc.report.page import Html, figure, join, section, table, tag, text
from teams_hpc.report.plots import bars, histograms
from teams_hpc.rewriting.elimination import REASONS
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.seeds import Seed
from teams_hpc.storage.run_dir import RunDir
from teams_hpc.storage.shards import Status, Table

Manifest = Mapping[str, Any]
Row = dict[str, Any]

RULES = {
    "equal": "rule 1: the reviewer says Equal",
    "refusal": "rule 2: a refusal",
    "empty_answer": "rule 3: only stop words and punctuation",
    "copied_prompt": "rule 4: words of the rewriting prompt",
    "unusable": "empty, unchanged, cut off or over length",
    "off_length": "not 10 to 20 words added",
    "engine_error": "the engine gave up",
}
_CHAIN_COLUMNS = (
    "seed_id",
    "trajectory",
    "step",
    "operation",
    "instruction",
    "input",
    "response",
    "verdict_score",
    "status",
    "reason",
)


def generation_section(generate: Manifest) -> Html:
    """What became of every attempted step."""
    if not generate:
        return Html("")
    counts = generate["counts"]
    eliminated = {RULES[name]: float(n) for name, n in counts["eliminated"].items() if n}
    values = {"kept": float(counts["kept"]), **eliminated, "failed": float(counts["failed"])}
    compliance = [
        (name, found["kept_rule"], found["judged"], found["kept_rule"] / max(1, found["judged"]))
        for name, found in generate["length_rule"].items()
    ]
    return section(
        "Generation",
        figure(
            bars(values, x_label="attempted steps"),
            f"{counts['attempted']:,} attempted = {counts['kept']:,} kept + "
            f"{sum(counts['eliminated'].values()):,} eliminated + {counts['failed']:,} failed.",
        ),
        tag("h3", "Do rewrites keep to 10 to 20 added words?"),
        table(("operation", "did", "of", "share"), compliance),
    )


def lengths_section(seeds: Sequence[Seed], run_dir: RunDir) -> Html:
    """Words in seeds, in kept instructions, and in responses."""
    if not run_dir.dataset_rows.exists():
        return Html("")
    with Table.open(run_dir.dataset_rows) as rows:
        found = rows.read(0, rows.num_rows, ["instruction", "response"])
    samples = {
        "seeds": [len(seed.instruction.split()) for seed in seeds],
        "instructions": [len(words.split()) for words in found["instruction"]],
        "responses": [len(words.split()) for words in found["response"]],
    }
    return section("Lengths", figure(histograms(samples, x_label="words"), "Words a text."))


def example_chains(shard: Path, seeds: Mapping[str, Seed], num_chains: int) -> Html:
    """A few chains from seed to answers: those of one unit with the most kept steps."""
    if not shard.exists():
        return Html("")
    with Table.open(shard) as rows:
        columns = rows.read(0, rows.num_rows, _CHAIN_COLUMNS)
    chains: dict[tuple[str, int], list[Row]] = {}
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        chains.setdefault((row["seed_id"], row["trajectory"]), []).append(row)
    best = sorted(
        chains.items(), key=lambda item: -sum(row["status"] == Status.KEPT for row in item[1])
    )
    shown = [_chain(seeds[key[0]], rows) for key, rows in best[:num_chains] if key[0] in seeds]
    return section("From seed to answer", *shown)


def _chain(seed: Seed, rows: Sequence[Row]) -> Html:
    first = tag("div", join([tag("span", "seed", "label seed"), _quote(seed.instruction)]), "step")
    shown = [first]
    if seed.input:
        shown.append(tag("p", f"Input: {seed.input}", "answer"))
    return tag("div", join([*shown, *(_step(row) for row in rows)]), "chain")


def _quote(words: str) -> Html:
    return tag("p", words, "quote")


def _step(row: Row) -> Html:
    operation = str(OPERATIONS[row["operation"]]).replace("_", " ")
    reason = str(REASONS[row["reason"]])
    is_kept = row["status"] == Status.KEPT
    label = operation if is_kept else f"{operation}: dropped, {RULES.get(reason, reason)}"
    parts: list[object] = [tag("span", label, "label" if is_kept else "label dropped")]
    if row["verdict_score"] == row["verdict_score"]:
        parts.append(text(f"P(Not Equal) {row['verdict_score']:.2f}"))
    parts.append(_quote(row["instruction"]))
    if is_kept and row["response"]:
        parts.append(tag("p", row["response"], "answer"))
    return tag("div", join(parts), "step")
