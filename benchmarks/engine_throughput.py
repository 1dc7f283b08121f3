"""Tokens per second of the `transformers` engine, and rewrites per second against distilabel.

    python benchmarks/engine_throughput.py [--repeats 5] [--prompts 96] [--layers 4] [--hidden 128]

The model is a small random Llama in float32 on the CPU; all sample with the same settings. They
take turns in one process, so that a busy machine hits all alike; seconds of CPU are given too.

- fixed: every reply has `--tokens` tokens (the model can't end one);
- mixed: a reply ends at a random length, on average half of `--tokens`, at most twice that;
- evolve: prompts as distilabel's EvolInstruct makes them from our seeds, replies of `--tokens`.

The ways are the engine, `model.generate` in static batches of the prompts as they come (which is
the bound of what batching alone gives), `model.generate` for one prompt at a time (of every fourth
prompt: the rate is what counts) and, in `evolve`, EvolInstruct with its own TransformersLLM.

The peer is optional and is left out where it can't be imported. It goes into an environment of its
own, which borrows the packages of ours (here .venv):

    python3.11 -m venv peer
    echo "import site; site.addsitedir('$PWD/.venv/lib/python3.11/site-packages')" \\
      > peer/lib/python3.11/site-packages/ours.pth
    peer/bin/pip install distilabel==1.5.3
    peer/bin/python benchmarks/engine_throughput.py

Prints tables and writes JSON to benchmarks/results/.
"""

import argparse
import importlib.util
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import RESULTS, commit, machine
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from teams_hpc.config.schema import ModelShape, TransformersEngineConfig
from teams_hpc.dataset.templates import Row
from teams_hpc.dataset.tokenizer import prepare_tokenizer
from teams_hpc.llm.base import Engine, Message, Request, Task, complete_all
from teams_hpc.llm.load import load_engine
from teams_hpc.rewriting.operations import OPERATIONS, rewrite_request
from teams_hpc.rewriting.seeds import read_seeds

SAMPLING = {"temperature": 0.7, "top_p": 0.95}
ONE_IN = 4
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TASK = Task(kind="answer", instruction="")

Way = Callable[[], int]
"""Does the work once and returns how many calls or tokens that was."""


def make_model(folder: Path, arguments: argparse.Namespace, mean_length: int | None) -> Path:
    """Save a random Llama whose replies end after `mean_length` tokens on average, or never.

    Its end token has no embedding, so it can't be drawn. Other tokens that end a reply are as
    likely as any in a random model.
    """
    shape = ModelShape(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers,
    )
    rows = [Row(seed.instruction, seed.input, seed.output) for seed in read_seeds(None, None).seeds]
    tokenizer = prepare_tokenizer(shape, rows, folder).tokenizer
    size = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**(shape.model_dump() | {"vocab_size": size, "initializer_range": 0.01}))
    model = LlamaForCausalLM(config)
    ends = [] if mean_length is None else range(size - size // mean_length, size)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    return folder


class Plain:
    """The same model without our engine."""

    def __init__(self, folder: Path, num_tokens: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.num_tokens = num_tokens
        self.stops = torch.tensor(self.model.generation_config.eos_token_id)

    def text(self, chat: Sequence[Message]) -> str:
        turns = [{"role": message.role, "content": message.content} for message in chat]
        text: str = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        return text

    @torch.inference_mode()
    def complete(self, chats: Sequence[Sequence[Message]]) -> int:
        """Complete one batch; returns the number of tokens drawn for replies, padding left out."""
        texts = [self.text(chat) for chat in chats]
        ids = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        found = self.model.generate(
            **ids, do_sample=True, top_k=0, max_new_tokens=self.num_tokens, **SAMPLING
        )
        replies = found[:, ids["input_ids"].shape[1] :]
        self.tokenizer.batch_decode(replies, skip_special_tokens=True)
        is_stop = torch.isin(replies, self.stops)
        return int((is_stop.cumsum(1) - is_stop.int() == 0).sum())

    def batches(self, chats: Sequence[Sequence[Message]], size: int) -> int:
        return sum(
            self.complete(chats[first : first + size]) for first in range(0, len(chats), size)
        )


def engine_tokens(engine: Engine, chats: Sequence[Sequence[Message]]) -> int:
    """Complete all chats; returns the number of tokens drawn.

    Raises:
        RuntimeError: A call failed.
    """
    requests = [
        Request(id=f"{number:04d}", messages=tuple(chat), task=TASK, seed=time.monotonic_ns())
        for number, chat in enumerate(chats)
    ]
    done = complete_all(engine, requests)
    if any(completion.finish_reason == "error" for completion in done):
        raise RuntimeError("a call failed")
    return sum(completion.completion_tokens for completion in done)


def take_turns(ways: dict[str, Way], repeats: int) -> list[dict[str, Any]]:
    """Rates of each way, its median and spread, and how many times the last way's it is."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    cpu_rates: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(repeats):
        for name, way in ways.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            count = way()
            cpu = time.process_time() - cpu_start
            rates[name].append(count / (time.perf_counter() - start))
            cpu_rates[name].append(count / cpu)
    reference = rates[list(ways)[-1]]
    return [
        {
            "way": name,
            "median": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
            "median_by_cpu_second": statistics.median(cpu_rates[name]),
            "times_the_last": statistics.median(
                one / other for one, other in zip(found, reference, strict=True)
            ),
            "repeats": repeats,
        }
        for name, found in rates.items()
    ]


def load(folder: Path, arguments: argparse.Namespace, num_tokens: int) -> tuple[Engine, Plain]:
    """The engine and plain transformers on one model."""
    engine = load_engine(
        TransformersEngineConfig(
            model=folder,
            dtype="float32",
            device="cpu",
            batch_size=arguments.batch_size,
            max_tokens=num_tokens,
            threads=arguments.threads,
            **SAMPLING,
        )
    )
    return engine, Plain(folder, num_tokens)


def measure_tokens(
    folder: Path, arguments: argparse.Namespace, num_tokens: int
) -> list[dict[str, Any]]:
    """Tokens per second on rewriting prompts."""
    engine, plain = load(folder, arguments, num_tokens)
    seeds = read_seeds(None, None).seeds
    chats = [
        rewrite_request(
            OPERATIONS[number % len(OPERATIONS)],
            seeds[number % len(seeds)].instruction,
            seeds[number % len(seeds)].input,
            request_id="",
            seed=0,
        ).messages
        for number in range(arguments.prompts)
    ]
    return take_turns(
        {
            "engine": lambda: engine_tokens(engine, chats),
            "static batches": lambda: plain.batches(chats, arguments.batch_size),
            "one at a time": lambda: plain.batches(chats[::ONE_IN], 1),
        },
        arguments.repeats,
    )


def evolving(folder: Path, num_tokens: int) -> Any:
    """distilabel's EvolInstruct, ready, or None where it isn't installed."""
    if importlib.util.find_spec("distilabel") is None:
        print("evolve: left out, distilabel isn't here; the head of this script says how to get it")
        return None
    from distilabel.models.llms import TransformersLLM
    from distilabel.steps.tasks import EvolInstruct

    llm = TransformersLLM(
        model=str(folder),
        torch_dtype="float32",
        device="cpu",
        generation_kwargs={
            "max_new_tokens": num_tokens,
            "repetition_penalty": 1.0,
            "do_sample": True,
            **SAMPLING,
        },
    )
    task = EvolInstruct(llm=llm, num_evolutions=1)
    task.load()
    logging.getLogger("distilabel").setLevel(logging.ERROR)
    return task


def evolve_once(task: Any, instructions: Sequence[str], drawn: list[str]) -> list[str]:
    """One round of rewrites by distilabel; returns the prompts that it asked.

    Args:
        task: From `evolving`.
        instructions: What is rewritten.
        drawn: Where the task notes its prompts.

    Raises:
        RuntimeError: A row is missing.
    """
    np.random.seed(0)
    drawn.clear()
    (rows,) = task.process([{"instruction": one} for one in instructions])
    if not all(row["evolved_instruction"] for row in rows):
        raise RuntimeError("distilabel left a rewrite out")
    return drawn.copy()


def measure_evolving(
    folder: Path, arguments: argparse.Namespace, num_tokens: int
) -> list[dict[str, Any]]:
    """Calls per second on the prompts that the peer makes; nothing where the peer is missing.

    Raises:
        RuntimeError: The peer asked others.
    """
    task = evolving(folder, num_tokens)
    if task is None:
        return []
    engine, plain = load(folder, arguments, num_tokens)
    instructions = [seed.instruction for seed in read_seeds(None, None).seeds][: arguments.prompts]
    drawn: list[str] = []
    draw = task._apply_random_mutation

    def noting(instruction: str) -> str:
        drawn.append(draw(instruction))
        return drawn[-1]

    object.__setattr__(task, "_apply_random_mutation", noting)
    prompts = evolve_once(task, instructions, drawn)
    chats = [[Message(role="user", content=prompt)] for prompt in prompts]

    def evolve() -> int:
        if evolve_once(task, instructions, drawn) != prompts:
            raise RuntimeError("distilabel asked other prompts than before")
        return len(prompts)

    return take_turns(
        {
            "engine": lambda: engine_tokens(engine, chats) // num_tokens,
            "plain batches": lambda: plain.batches(chats, arguments.batch_size) // num_tokens,
            "distilabel": evolve,
        },
        arguments.repeats,
    )


def show(name: str, what: str, rows: Sequence[dict[str, Any]]) -> None:
    if not rows:
        return
    print(f"\n{name}: {what} per second, median of {rows[0]['repeats']}")
    for row in rows:
        spread = f"{row['lowest']:.1f} to {row['highest']:.1f}"
        print(
            f"  {row['way']:<15} {row['median']:>8.1f}   ({spread})   "
            f"{row['median_by_cpu_second']:.1f} by CPU second   "
            f"{row['times_the_last']:.1f} x {rows[-1]['way']}"
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the transformers engine.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="torch CPU threads")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)  # of the ways that aren't engines
    measured_at, ran_on = commit(), machine()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        endless = make_model(Path(folder) / "endless", arguments, None)
        ending = make_model(Path(folder) / "ending", arguments, arguments.tokens // 2)
        results["fixed"] = measure_tokens(endless, arguments, arguments.tokens)
        show("fixed", "tokens", results["fixed"])
        results["mixed"] = measure_tokens(ending, arguments, 2 * arguments.tokens)
        show("mixed", "tokens", results["mixed"])
        results["evolve"] = measure_evolving(endless, arguments, arguments.tokens)
        show("evolve", "calls", results["evolve"])
    now = datetime.now(UTC)
    path = RESULTS / f"{now:%Y-%m-%d}-engine-throughput.json"
    report = {
        "what": "tokens per second (fixed, mixed) and calls per second (evolve)",
        "date": f"{now:%Y-%m-%d}",
        "commit": measured_at,
        "command": ["python", "benchmarks/engine_throughput.py", *sys.argv[1:]],
        "machine": {
            **ran_on,
            "load_average_at_the_end": machine()["load_average"],
            **{name: version(name) for name in ("torch", "transformers")},
        },
        "peer": f"distilabel {version('distilabel')}" if results["evolve"] else "not installed",
        "settings": vars(arguments) | SAMPLING,
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
