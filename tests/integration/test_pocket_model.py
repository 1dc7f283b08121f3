"""The small Llama that the package ships: what its card promises, on small samples."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pocket.measure import (
    ask_rewrites,
    judge,
    load,
    measure_answers,
    measure_verdicts,
    seed_texts,
    summarise,
    unseen_pairs,
    unseen_texts,
)
from pocket.publish import SHIPPED
from teams_hpc.llm.base import Engine, ScoreRequest, Task, complete_all
from teams_hpc.llm.chat_text import ChatText
from teams_hpc.llm.grammar.world import is_fruitful
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.local_model import load_tokenizer
from teams_hpc.rewriting.operations import OPERATIONS, answer_request, rewrite_request
from teams_hpc.rewriting.reviewer import (
    OPTIONS,
    Pair,
    Reviewer,
    sanity_accuracy,
    verdict_messages,
)

ROOT = Path(__file__).parents[2]
TINY = (
    "sft.model.vocab_size=600",
    "sft.model.hidden_size=32",
    "sft.model.intermediate_size=64",
    "sft.model.num_hidden_layers=1",
    "sft.model.num_attention_heads=2",
    "sft.model.num_key_value_heads=2",
    "sft.schedule_steps=40",
    "sft.global_batch_rows=4",
    "sft.micro_batch_rows=2",
    "sft.checkpoint_interval_steps=2",
    "sft.eval_interval_steps=8",
    "sft.sequence_length=448",
    "sft.warmup_steps=2",
    "site.num_sft_ranks=1",
)


@pytest.fixture(scope="module")
def engine() -> Engine:
    if not SHIPPED.exists():
        pytest.skip("no pocket Llama was made here: make pocket-model")
    return load(SHIPPED, threads=1)


@pytest.fixture(scope="module")
def chat() -> ChatText:
    if not SHIPPED.exists():
        pytest.skip("no pocket Llama was made here: make pocket-model")
    tokenizer = load_tokenizer(SHIPPED)
    return ChatText(
        tokenizer=tokenizer,
        stop_ids=frozenset([tokenizer.eos_token_id]),
        longest=1024,
        model=SHIPPED,
    )


def test_it_is_small_and_says_what_it_is(chat: ChatText) -> None:
    size = sum(path.stat().st_size for path in SHIPPED.iterdir())
    assert size < 10_000_000
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert "What it is not" in card


def test_prompts_are_compact_so_this_model_was_made_for_them(chat: ChatText) -> None:
    """If this fails a prompt has changed: raise PROMPT_SCHEMA, and `make pocket-model`."""
    text, given = "Explain tides.", "high, low"
    alone, both = (len(chat.tokenizer(words)["input_ids"]) for words in (text, f"{text}{given}"))
    for operation in OPERATIONS:
        for input_text, length in (("", alone), (given, both)):
            request = rewrite_request(operation, text, input_text, request_id="", seed=0)
            assert len(chat.encode(request.messages)) <= length + 6
    pair = verdict_messages(Pair(before=text, after=text))
    assert len(chat.encode(pair)) <= 2 * alone + 6


def test_fixed_parts_of_prompts_survive_the_tokenizer(chat: ChatText) -> None:
    for operation in OPERATIONS:
        request = rewrite_request(operation, "Sing.\n>>> x", "a b", request_id="", seed=0)
        content = request.messages[0].content
        ids = chat.tokenizer(content, add_special_tokens=False)["input_ids"]
        assert chat.tokenizer.decode(ids, skip_special_tokens=True) == content
    messages = verdict_messages(Pair(before="Sing.", after="Dance."))
    request = ScoreRequest(
        messages=messages, task=Task(kind="judge", instruction=""), options=OPTIONS
    )
    prompt, options = chat.encode_options(request)
    assert prompt == chat.encode(messages)
    assert [chat.tokenizer.decode(ids[:-1]) for ids in options] == list(OPTIONS)


def test_verdicts_on_unseen_topics(engine: Engine) -> None:
    assert measure_verdicts(engine, unseen_pairs(200))["auc"] >= 0.9
    assert sanity_accuracy(Reviewer(engine, "likelihood", Ledger())) >= 0.9


@pytest.mark.parametrize("which", ["unseen", "seeds"])
def test_fruitful_rewrites_are_accepted_and_show_their_operation(
    engine: Engine, which: str
) -> None:
    texts = list(unseen_texts(40)) if which == "unseen" else seed_texts()[::5]
    work = [
        (operation, text)
        for operation, text in itertools.product(OPERATIONS, texts)
        if is_fruitful(operation, text.instruction)
    ]
    found = summarise(ask_rewrites(engine, work, which))
    assert found["fruitful"] == len(work) > 60
    assert found["accepted_and_recognised"] >= 0.95


def test_pointless_operations_give_what_the_reviewer_calls_equal(engine: Engine) -> None:
    work = [
        (operation, text)
        for operation, text in itertools.product(OPERATIONS, seed_texts()[::8])
        if not is_fruitful(operation, text.instruction)
    ]
    assert summarise(ask_rewrites(engine, work))["pointless_called_equal"] >= 0.8


def test_answers_pass_the_rules_and_speak_of_the_instruction(engine: Engine) -> None:
    found = measure_answers(engine, [*unseen_texts(30), *seed_texts(30)])
    assert found["pass_rules_2_and_3"] >= 0.98
    assert found["shares_a_long_word"] >= 0.6


def test_replies_and_verdicts_do_not_depend_on_the_batch(engine: Engine) -> None:
    """Prompts share beginnings, which are computed once."""
    texts = seed_texts(6)
    requests = [
        answer_request(text.instruction, text.input, request_id=str(number), seed=number)
        for number, text in enumerate(texts)
    ]
    together = [each.text for each in complete_all(engine, requests)]
    assert together == [complete_all(engine, [request])[0].text for request in requests]
    pairs = [Pair(before=text.instruction, after=f"{text.instruction} Sing.") for text in texts]
    alone = [judge(engine, [pair])[0] for pair in pairs]
    assert judge(engine, pairs) == pytest.approx(alone, abs=1e-5)


def start(run_dir: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        (sys.executable, "-m", "pocket.make", "--train-only", f"run_dir={run_dir}", *TINY, *words),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait(process: subprocess.Popen[str], expected: int) -> None:
    output, _ = process.communicate(timeout=200)
    assert process.returncode == expected, output


def steps_done(run_dir: Path) -> int:
    progress = run_dir / "metrics" / "sft.progress.json"
    found: dict[str, Any] = json.loads(progress.read_text()) if progress.exists() else {}
    return int(found.get("done", 0))


@pytest.mark.slow
def test_making_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = start(stopped)
    deadline = time.monotonic() + 200
    while steps_done(stopped) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    wait(process, 144)
    assert not (stopped / "sft" / "model").exists()
    wait(start(stopped), 0)
    wait(start(whole), 0)
    models = [
        load_file(folder / "sft" / "model" / "model.safetensors") for folder in (stopped, whole)
    ]
    assert models[0].keys() == models[1].keys()
    assert all(bool((models[0][name] == models[1][name]).all()) for name in models[0])
