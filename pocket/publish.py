"""The folder that the package ships: the trained model, its tokenizer, and a card with figures."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pocket.data import EXAMPLES_SCHEMA
from teams_hpc.config import Config
from teams_hpc.llm.template_engine import GRAMMAR_SCHEMA
from teams_hpc.rewriting.operations import PROMPT_SCHEMA
from teams_hpc.sft.folders import replacing_folder
from teams_hpc.storage.run_dir import RunDir, read_manifest

SHIPPED = Path(__file__).resolve().parent.parent / "teams_hpc" / "data" / "pocket-llama"

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: en
---

# The pocket Llama of teams_hpc

A Llama of {millions:.1f} million parameters ({layers} layers of width {width}; {megabytes:.1f} MB
in bfloat16) that knows one thing: the prompts of teams_hpc. It rewrites an instruction by one of
the six operations, judges whether two instructions are equal, and answers in two or three
sentences. With it as instructor, reviewer and expert the whole pipeline runs with a real language
model on a laptop, in `make quickstart` and in tests.

## What it is not

It knows nothing about the world. Its answers are empty phrases around the words of the
instruction, and a model fine-tuned on them learns nothing of use. It was taught by the template
grammar (`teams_hpc/llm/grammar`), so its idea of when an operation bears fruit, and of when two
instructions are equal, is the grammar's. Figures of a run with it say that the method's machinery
works and learns, and nothing about language models that people use. Beyond these prompts, and in
any language but English, its output is noise. Texts of more than some 300 tokens are longer than
all it was trained on.

## How it was made

`make pocket-model`, in the repository: {examples:,} examples over a topic space of nouns, names,
numbers and invented words, from frames and from words in no order at all; one fine-tuning by
teams_hpc's own stage `sft` from random weights: {steps:,} steps, {tokens:,} tokens, two processes
of one CPU thread each. None of the seeds that the package ships was trained on, and some words
were held back for the figures below. Replies: mostly what the grammar would reply; answers are
shorter.

The tokenizer is a byte-level BPE of {vocabulary:,} tokens. Every fixed part of the suite's
prompts is one token of its own, so that a prompt costs its instruction and a few tokens more; a
changed prompt would cost hundreds, and mean nothing to this model. Hence it belongs to prompt
schema {prompts}, grammar schema {grammar}, examples schema {schema}: when the first two change,
make it again.

## How good it is

Measured by `python -m pocket.measure` (temperature 0.4, float32); the grammar is the truth.
"Unseen": held-out words, behind up to five earlier additions. "Seeds": the seeds shipped.
"Chains": six steps over its own texts, from seeds, operations at random.

{figures}

Accepted: rules 1 and 4, with its own verdict. Recognised: the grammar's reader finds the
operation's mark in the rewrite; for breadth, a new text without marks. Domain: of those whose
domain the grammar knows. Fruitful and pointless: what the operation would do in the grammar's
world.
"""


def publish(run_dir: RunDir, config: Config, measured: dict[str, Any], folder: Path) -> None:
    """Put the trained model of a run into `folder`, with a card."""
    card = model_card(run_dir, config, measured)
    with replacing_folder(folder) as temporary:
        for path in run_dir.model.iterdir():
            if path.name != "README.md":
                shutil.copyfile(path, temporary / path.name)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            path.chmod(0o755 if path.is_dir() else 0o644)


def model_card(run_dir: RunDir, config: Config, measured: dict[str, Any]) -> str:
    """The README.md of the shipped folder."""
    made, data = read_manifest(run_dir, "sft"), read_manifest(run_dir, "dataset")
    shape = json.loads((run_dir.model / "config.json").read_text(encoding="utf-8"))
    if made is None or data is None:
        raise AssertionError("a card is written of a model that is done")
    return _CARD.format(
        millions=_num_parameters(run_dir.model / "model.safetensors") / 1e6,
        layers=shape["num_hidden_layers"],
        width=shape["hidden_size"],
        megabytes=(run_dir.model / "model.safetensors").stat().st_size / 1e6,
        examples=data["counts"]["train"],
        steps=made["steps"],
        tokens=made["tokens"],
        vocabulary=shape["vocab_size"],
        prompts=PROMPT_SCHEMA,
        grammar=GRAMMAR_SCHEMA,
        schema=EXAMPLES_SCHEMA,
        figures=_figures(measured),
    )


def _num_parameters(path: Path) -> int:
    """Of the file: an output layer that is tied to the embeddings counts once."""
    return sum(tensor.numel() for tensor in load_file(path).values())


def _figures(measured: dict[str, Any]) -> str:
    verdicts = measured["verdicts_unseen"]
    lines = [
        "| verdicts | |",
        "|---|---|",
        f"| AUC on unseen topics, {verdicts['pairs']} pairs of all sorts | {verdicts['auc']:.3f} |",
        f"| accuracy there at one half | {_percent(verdicts['accuracy'])} |",
        f"| accuracy on the reviewer's sanity set | {_percent(measured['sanity_accuracy'])} |",
        "",
        "| rewrites | unseen | seeds | chains |",
        "|---|---|---|---|",
    ]
    names = {
        "fruitful": "fruitful ones asked for",
        "accepted": "... accepted",
        "accepted_and_recognised": "... accepted and recognised",
        "keeps_parent": "... keep their parent word for word",
        "breadth_keeps_domain": "... by breadth, of their parent's domain",
        "adds_10_to_20_words": "... add 10 to 20 words",
        "pointless": "pointless ones asked for",
        "pointless_called_equal": "... called Equal by its own verdict",
        "pointless_equal_by_grammar": "... equal by the grammar's",
    }
    groups = [measured[key] for key in ("rewrites_unseen", "rewrites_seeds", "chains_seeds")]
    for key, name in names.items():
        lines.append(f"| {name} | {' | '.join(_cell(group[key]) for group in groups)} |")
    lines += ["", "| answers | unseen | seeds |", "|---|---|---|"]
    for key, name in (
        ("pass_rules_2_and_3", "pass rules 2 and 3"),
        ("shares_a_long_word", "share a word of five letters with the instruction"),
    ):
        both = (measured["answers_unseen"][key], measured["answers_seeds"][key])
        lines.append(f"| {name} | {' | '.join(map(_percent, both))} |")
    return "\n".join(lines)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "none asked for"
    return str(value) if isinstance(value, int) else _percent(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
