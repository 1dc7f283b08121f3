"""How good a pocket model is, on unseen topics and on the shipped seeds; the grammar is truth.

python -m pocket.measure [FOLDER] [--size N] [--output FILE]
"""

import argparse
import itertools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocket.examples import make_pair
from pocket.instructions import Text, make_text
from teams_hpc.config.schema import TransformersEngineConfig
from teams_hpc.evaluation.statistics import auc
from teams_hpc.llm.base import Engine, complete_all
from teams_hpc.llm.grammar.judge import p_not_equal
from teams_hpc.llm.grammar.topics import domain_of
from teams_hpc.llm.grammar.world import is_fruitful, read, rewrite
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.transformers_engine import TransformersEngine
from teams_hpc.rewriting.elimination import Reason, check_answer, check_rewrite, check_verdict
from teams_hpc.rewriting.operations import (
    OPERATIONS,
    Operation,
    answer_request,
    carried_input,
    clean_rewrite,
    keeps_length_rule,
    rewrite_request,
)
from teams_hpc.rewriting.reviewer import Pair, Reviewer, sanity_accuracy
from teams_hpc.rewriting.seeds import read_seeds

_THRESHOLD = 0.5
_MAX_WORDS = 400
_FIRST_SEED = 9 << 44


@dataclass(frozen=True, slots=True)
class Asked:
    """One rewrite that was asked for, and what came.

    Attributes:
        operation: What was asked for.
        parent: Of what.
        reply: The rewrite, cleaned.
        reason: Why rules 1 and 4 drop it, by the model's own verdict; NONE if they don't.
        p_not_equal: That verdict; 0.0 where the text alone was dropped.
    """

    operation: Operation
    parent: Text
    reply: str
    reason: Reason
    p_not_equal: float

    @property
    def is_fruitful(self) -> bool:
        return is_fruitful(str(self.operation), self.parent.instruction)

    @property
    def is_recognised(self) -> bool:
        """Whether the grammar finds the operation in the reply: its marker, or a new bare text."""
        before, after = read(self.parent.instruction), read(self.reply)
        if self.operation is Operation.BREADTH:
            return not after.applied and after.core != before.core
        return str(self.operation) in after.applied - before.applied

    @property
    def keeps_domain(self) -> bool | None:
        """Whether the reply's domain is its parent's; None where the grammar knows none."""
        wanted = domain_of(read(self.parent.instruction).core)
        return None if wanted is None else domain_of(read(self.reply).core) == wanted

    @property
    def is_faithful(self) -> bool:
        """Whether the reply has the parent's wish word for word."""
        return read(self.parent.instruction).bare.rstrip(".?! ") in read(self.reply).bare


def load(folder: Path, **settings: Any) -> Engine:
    """The model as the quickstart loads it."""
    values = {
        "dtype": "float32",
        "device": "cpu",
        "batching": "fixed",
        "max_tokens": 320,
        "temperature": 0.4,
    }
    return TransformersEngine(TransformersEngineConfig(model=folder, **(values | settings)))


def unseen_texts(count: int, most_steps: int = 5) -> Iterator[Text]:
    """Texts on held-out topics, with up to `most_steps` of the grammar's rewrites behind them."""
    for number in range(count):
        rng = random.Random(_FIRST_SEED + number)
        text = make_text(rng, held_out=True)
        for _ in range(rng.randint(0, most_steps)):
            fruitful = [each for each in OPERATIONS if is_fruitful(each, text.instruction)]
            operation = rng.choice(fruitful)
            after = rewrite(operation, text.instruction, rng.getrandbits(62))
            text = Text(after, carried_input(operation, text.input))
        yield text


def seed_texts(count: int | None = None) -> list[Text]:
    """The shipped seeds; none of them was trained on."""
    return [Text(seed.instruction, seed.input) for seed in read_seeds(None, count).seeds]


def ask_rewrites(
    engine: Engine, work: Sequence[tuple[Operation, Text]], tag: str = ""
) -> list[Asked]:
    """Ask for rewrites, and the same engine for their verdicts."""
    requests = [
        rewrite_request(
            operation,
            text.instruction,
            text.input,
            request_id=str(number),
            seed=hash_seed(tag, number),
        )
        for number, (operation, text) in enumerate(work)
    ]
    completions = complete_all(engine, requests)
    replies = [clean_rewrite(completion.text) for completion in completions]
    reasons = [
        check_rewrite(operation, text.instruction, reply, completion, max_words=_MAX_WORDS)
        for (operation, text), reply, completion in zip(work, replies, completions, strict=True)
    ]
    verdicts = judge(
        engine,
        [
            Pair(
                before=text.instruction,
                before_input=text.input,
                after=reply,
                after_input=carried_input(operation, text.input),
            )
            for (operation, text), reply in zip(work, replies, strict=True)
        ],
    )
    return [
        Asked(
            operation,
            text,
            reply,
            check_verdict(p, _THRESHOLD) if reason is Reason.NONE else reason,
            p,
        )
        for (operation, text), reply, reason, p in zip(
            work, replies, reasons, verdicts, strict=True
        )
    ]


def hash_seed(tag: str, number: int) -> int:
    return random.Random(f"{tag}/{number}").getrandbits(62)


def judge(engine: Engine, pairs: Sequence[Pair]) -> list[float]:
    """P(Not Equal) by likelihood."""
    return [
        verdict.p_not_equal for verdict in Reviewer(engine, "likelihood", Ledger()).judge(pairs)
    ]


def measure_verdicts(engine: Engine, pairs: Sequence[Pair]) -> dict[str, float]:
    """Against the grammar's truth."""
    truth = np.array([p_not_equal(pair.before, pair.after) > 0.5 for pair in pairs])
    found = np.array(judge(engine, pairs))
    return {
        "pairs": len(pairs),
        "not_equal": int(truth.sum()),
        "auc": round(auc(found[truth], found[~truth]), 4),
        "accuracy": round(float(((found > 0.5) == truth).mean()), 4),
    }


def unseen_pairs(count: int) -> list[Pair]:
    """Pairs of every sort on held-out topics: rewrites, identical, unrelated, changed, garbage."""
    pairs = []
    for number, text in enumerate(unseen_texts(count, most_steps=4)):
        rng = random.Random(_FIRST_SEED - number)
        operation = rng.choice(OPERATIONS)
        after = rewrite(operation, text.instruction, rng.getrandbits(62))
        after_text = Text(after, carried_input(operation, text.input))
        pairs.append(make_pair(rng, text, after_text, held_out=True))
    return pairs


def summarise(asked: Sequence[Asked]) -> dict[str, Any]:
    """Shares, over all and by operation."""
    fruitful = [each for each in asked if each.is_fruitful]
    pointless = [each for each in asked if not each.is_fruitful]
    by_operation = {
        str(operation): _share(
            [
                each.reason is Reason.NONE and each.is_recognised
                for each in fruitful
                if each.operation is operation
            ]
        )
        for operation in OPERATIONS
    }
    return {
        "fruitful": len(fruitful),
        "accepted": _share([each.reason is Reason.NONE for each in fruitful]),
        "accepted_and_recognised": _share(
            [each.reason is Reason.NONE and each.is_recognised for each in fruitful]
        ),
        "by_operation": by_operation,
        "keeps_parent": _share(
            [each.is_faithful for each in fruitful if each.operation is not Operation.BREADTH]
        ),
        "breadth_keeps_domain": _share(
            [
                each.keeps_domain
                for each in fruitful
                if each.operation is Operation.BREADTH and each.keeps_domain is not None
            ]
        ),
        "adds_10_to_20_words": _share(
            [
                kept
                for each in fruitful
                if (kept := keeps_length_rule(each.operation, each.parent.instruction, each.reply))
                is not None
            ]
        ),
        "pointless": len(pointless),
        "pointless_called_equal": _share([each.p_not_equal < _THRESHOLD for each in pointless]),
        "pointless_equal_by_grammar": _share(
            [p_not_equal(each.parent.instruction, each.reply) < 0.5 for each in pointless]
        ),
    }


def _share(values: Sequence[bool]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


def measure_rewrites(engine: Engine, texts: Sequence[Text], tag: str) -> dict[str, Any]:
    """Every operation once on every text."""
    work = list(itertools.product(OPERATIONS, texts))
    return summarise(ask_rewrites(engine, work, tag))


def measure_chains(engine: Engine, texts: Sequence[Text], steps: int = 6) -> dict[str, Any]:
    """Chains as the policy's: random operations, what the reviewer accepts is the next parent."""
    rng = random.Random(5)
    current, asked, by_step = list(texts), [], []
    for step in range(steps):
        work = [(rng.choice(OPERATIONS), text) for text in current]
        made = ask_rewrites(engine, work, f"chain/{step}")
        current = [
            Text(each.reply, carried_input(each.operation, each.parent.input))
            if each.reason is Reason.NONE
            else each.parent
            for each in made
        ]
        asked += made
        by_step.append(_share([(each.reason is Reason.NONE) == each.is_fruitful for each in made]))
    return summarise(asked) | {"verdict_as_the_grammars_world_by_step": by_step}


def measure_answers(engine: Engine, texts: Sequence[Text]) -> dict[str, Any]:
    """Rules 2 and 3, the length, and whether the answer speaks of the instruction."""
    requests = [
        answer_request(
            text.instruction, text.input, request_id=str(number), seed=hash_seed("a", number)
        )
        for number, text in enumerate(texts)
    ]
    completions = complete_all(engine, requests)
    return {
        "answers": len(texts),
        "pass_rules_2_and_3": _share(
            [
                check_answer(each) is Reason.NONE and each.finish_reason == "stop"
                for each in completions
            ]
        ),
        "tokens": round(float(np.mean([each.completion_tokens for each in completions])), 1),
        "shares_a_long_word": _share(
            [
                bool(_long_words(text.instruction) & _long_words(each.text))
                for text, each in zip(texts, completions, strict=True)
            ]
        ),
    }


def _long_words(text: str) -> set[str]:
    return {
        word
        for word in "".join(c if c.isalpha() else " " for c in text.lower()).split()
        if len(word) > 4
    }


def measure(folder: Path, size: int) -> dict[str, Any]:
    """All of it; `size` texts of each sort."""
    engine = load(folder)
    unseen, seeds = list(unseen_texts(size)), seed_texts(size)
    return {
        "verdicts_unseen": measure_verdicts(engine, unseen_pairs(4 * size)),
        "sanity_accuracy": sanity_accuracy(Reviewer(engine, "likelihood", Ledger())),
        "rewrites_unseen": measure_rewrites(engine, unseen, "unseen"),
        "rewrites_seeds": measure_rewrites(engine, seeds, "seeds"),
        "chains_seeds": measure_chains(engine, seeds),
        "answers_unseen": measure_answers(engine, unseen),
        "answers_seeds": measure_answers(engine, seeds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=200)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.folder, arguments.size), indent=1)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
