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
from teams_hpc.config import load_config
from teams_hpc.llm.base import Engine, ScoreRequest, Task, complete_all
from teams_hpc.llm.chat_text import ChatText
from teams_hpc.llm.grammar.world import is_fruitful
from teams_hpc.llm.local_model import load_tokenizer
from teams_hpc.rewriting.operations import OPERATIONS, answer_request, rewrite_request
from teams_hpc.rewriting.reviewer import (
    OPTIONS,
    Pair,
    verdict_messages,
)

ROOT = Path(__file__).parents[2]
SMALL_RUN = f"""
name: small
extends: {ROOT / "configs" / "quickstart.yaml"}
seeds: {{limit: 40}}
policy: {{num_members: 1, iterations: 2, num_envs: 8, num_bootstrap: 100, num_eval_episodes: 1}}
generate: {{num_steps: 2, unit_size: 16}}
sft:
  model: {{vocab_size: 400, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
          num_attention_heads: 2, num_key_value_heads: 2}}
  schedule_steps: 4
  global_batch_rows: 2
  micro_batch_rows: 1
  warmup_steps: 1
  checkpoint_interval_steps: 2
  eval_interval_steps: 2
evaluate: {{num_bootstrap: 100, control_steps: 5}}
"""
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
    return load(SHIPPED, threads=1)


@pytest.fixture(scope="module")
def chat() -> ChatText:
    tokenizer = load_tokenizer(SHIPPED)
    return ChatText(
        tokenizer=tokenizer,
        stop_ids=frozenset([tokenizer.eos_token_id]),
        longest=1024,
        model=SHIPPED,
    )


def test_it_is_small_and_says_what_it_is() -> None:
    size = sum(path.stat().st_size for path in SHIPPED.iterdir())
    assert size < 10_000_000
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    assert "What it is not" in card
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    for role in (config.instructor, config.reviewer, config.expert):
        assert role.model == SHIPPED  # type: ignore[union-attr]


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
    assert measure_verdicts(engine, unseen_pairs(400))["auc"] >= 0.9


def test_rewrites_on_unseen_topics_are_accepted_and_show_their_operation(engine: Engine) -> None:
    work = [
        (operation, text)
        for operation, text in itertools.product(OPERATIONS, unseen_texts(204))
        if is_fruitful(operation, text.instruction)
    ]
    found = summarise(ask_rewrites(engine, work, "unseen"))
    assert found["fruitful"] == len(work) > 400
    assert found["accepted_and_recognised"] >= 0.95


def test_fruitful_operations_gain_more_than_pointless_ones(engine: Engine) -> None:
    """On the shipped seeds, where a policy learns."""
    work = list(itertools.product(OPERATIONS, seed_texts()[::4]))
    found = summarise(ask_rewrites(engine, work))
    assert found["accepted"] > 1 - found["pointless_called_equal"] + 0.2


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


@pytest.mark.slow
def test_a_whole_run_has_it_in_every_role(tmp_path: Path) -> None:
    """The quickstart's configuration, smaller."""
    config, root = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(SMALL_RUN)
    for words in (("run", str(config), f"run_dir={root}"), ("verify", str(root))):
        found = subprocess.run(
            (sys.executable, "-m", "teams_hpc", *words),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert found.returncode == 0, found.stdout + found.stderr
    generate = json.loads((root / "generate" / "manifest.json").read_text())
    assert generate["exactness"] == "exact"
    assert generate["counts"]["kept"] > 20
    page = (root / "report" / "report.html").read_text(encoding="utf-8")
    assert page.count("model (transformers)") == 3


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
