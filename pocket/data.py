"""The stage `dataset` of the pocket model's run: its examples, tokenised and packed.

It stands in for the suite's own, which merges what generation made; files and manifest are those
that the stage `sft` reads.
"""

import itertools
import logging
from collections.abc import Iterator
from typing import Any

from pocket.examples import Example, make_examples
from pocket.tokens import fixed_parts, train_tokenizer
from teams_hpc.config import Config, ModelShape
from teams_hpc.config.digest import file_digest, inputs_digest, model_content_id
from teams_hpc.dataset.balance import Fate
from teams_hpc.dataset.packed_file import SequenceCollector, write_packed
from teams_hpc.dataset.templates import Example as Tokens
from teams_hpc.errors import UsageError
from teams_hpc.storage.atomic import read_json, write_json
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest

EXAMPLES_SCHEMA = 4
"""Raise it when other examples come out."""

_NUM_TOKENIZER_CHAINS = 6000
_NUM_HELD_OUT_ROWS = 64
_HELD_OUT_SEED = 1 << 40
_AT_A_TIME = 200
_log = logging.getLogger(__name__)


def build_data(run_dir: RunDir, config: Config) -> None:
    """Make tokenizer and packed rows, unless they are there.

    Raises:
        UsageError: They are there, made for other settings.
    """
    shape, sft = config.sft.model, config.sft
    if not isinstance(shape, ModelShape) or sft.schedule_steps is None:
        raise UsageError("pocket model: sft.model must be a shape, and sft.schedule_steps a number")
    inputs = {
        "examples.schema": EXAMPLES_SCHEMA,
        "seed": config.seed,
        "rows": sft.schedule_steps * sft.global_batch_rows,
        "sequence_length": sft.sequence_length,
        "vocab_size": shape.vocab_size,
    }
    path = run_dir.inputs("dataset")
    if path.exists() and read_json(path)["inputs"] != inputs:
        raise UsageError(f"{run_dir.dataset} was made for other settings; remove {run_dir.root}")
    if read_manifest(run_dir, "dataset") is not None:
        return
    run_dir.dataset.mkdir(parents=True, exist_ok=True)
    write_json(path, {"digest": inputs_digest(inputs), "inputs": inputs})
    tokenizer = train_tokenizer(
        _texts(config.seed), shape.vocab_size, shape.max_position_embeddings
    )
    tokenizer.save_pretrained(run_dir.tokenizer)
    _log.info("the tokenizer is there; making examples")
    collectors = {
        Fate.TRAIN: _collect(tokenizer, _chains(config.seed), sft.sequence_length, inputs["rows"]),
        Fate.HELD_OUT: _collect(
            tokenizer,
            _chains(_HELD_OUT_SEED, held_out=True),
            sft.sequence_length,
            _NUM_HELD_OUT_ROWS,
        ),
    }
    attrs = {
        "vocab_size": len(tokenizer),
        "sequence_length": sft.sequence_length,
        "template": "chat",
    }
    packing = write_packed(run_dir.packed_rows, collectors, tokenizer.pad_token_id, attrs)
    write_manifest(run_dir, "dataset", _manifest(run_dir, packing))


def _manifest(run_dir: RunDir, packing: dict[str, Any]) -> dict[str, Any]:
    paths = [run_dir.packed_rows, *sorted(run_dir.tokenizer.iterdir())]
    return {
        "counts": {group: counts["sequences"] for group, counts in packing.items()},
        "packing": packing,
        "tokenizer": {"content_id": model_content_id(run_dir.tokenizer)},
        "files": {str(path.relative_to(run_dir.dataset)): file_digest(path) for path in paths},
    }


def _chains(seed: int, *, held_out: bool = False) -> Iterator[Example]:
    for number in itertools.count(seed << 20):
        yield from make_examples(number, held_out=held_out)


def _texts(seed: int) -> Iterator[str]:
    """What the merges are learnt from: prompts without their fixed parts, and replies."""
    parts = fixed_parts()
    for number in range(_NUM_TOKENIZER_CHAINS):
        for example in make_examples(seed << 20 | number):
            text = example.prompt
            for part in parts:
                text = text.replace(part, " ")
            yield text
            yield example.reply


def _collect(
    tokenizer: Any, examples: Iterator[Example], row_length: int, num_rows: int
) -> SequenceCollector:
    """As many examples as fill so many rows."""
    collector = SequenceCollector(row_length)
    tokens = number = 0
    while tokens < num_rows * row_length:
        for encoded in encode(tokenizer, list(itertools.islice(examples, _AT_A_TIME))):
            collector.add(encoded, number)
            tokens, number = tokens + len(encoded.tokens), number + 1
    return collector


def encode(tokenizer: Any, examples: list[Example]) -> list[Tokens]:
    """What the tokenizer's chat template gives (a test compares), many at a time."""
    begin, reply, end = (
        tokenizer.convert_tokens_to_ids(token)
        for token in (tokenizer.bos_token, "<|reply|>", tokenizer.eos_token)
    )
    texts = [text for example in examples for text in _split(example)]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    triples = zip(ids, ids, ids, strict=True)
    return [
        Tokens([begin, *prompt, *repeated, reply, *answer, end], len(prompt) + 1 + (not repeated))
        for prompt, repeated, answer in triples
    ]


def _split(example: Example) -> tuple[str, str, str]:
    """Prompt without its repeated end, that end, and reply."""
    start = len(example.prompt) - example.num_repeated
    return example.prompt[:start], example.prompt[start:], example.reply
