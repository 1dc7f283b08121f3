"""Environment steps per second: all episodes in one batch, or one prompt at a time.

    python benchmarks/policy_environment.py [--engines template,llama] [--repeats 5]

One step is one rewrite by the instructor and one verdict by the reviewer. Three ways are timed over
the same episodes with the same operations:

- batched: `policy.num_envs` episodes together, verdicts by likelihood (what training does);
- one at a time: the same calls, a prompt after the other;
- published way: one at a time with generated verdicts, as the published loop does it.

`template` is the grammar, which gains nothing from a batch; `llama` is a small random Llama on the
CPU through the transformers engine, where batching counts. Prints a table and writes JSON to
benchmarks/results/.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from teams_hpc.config.policy import PolicyConfig
from teams_hpc.config.schema import (
    ModelShape,
    TemplateEngineConfig,
    TransformersEngineConfig,
)
from teams_hpc.llm.base import Completion, Engine, Request, Score, ScoreRequest
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.load import load_engine
from teams_hpc.policy.environment import Episode, World
from teams_hpc.rewriting.observation import Observer
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.reviewer import Reviewer
from teams_hpc.rewriting.seeds import read_seeds

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Way:
    """How the steps are made."""

    name: str
    verdict: Literal["likelihood", "generated"]
    is_batched: bool


WAYS = (
    Way("batched", "likelihood", True),
    Way("one at a time", "likelihood", False),
    Way("published way", "generated", False),
)


class Finishing:
    """A random model hardly ever ends a reply; taken as ended, its rewrites reach the reviewer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.content_id = engine.content_id
        self.exactness = engine.exactness
        self.is_model = engine.is_model

    @property
    def num_pending(self) -> int:
        return self._engine.num_pending

    def add(self, request: Request) -> None:
        self._engine.add(request)

    def step(self) -> list[Completion]:
        return [
            replace(done, finish_reason="stop") if done.finish_reason == "length" else done
            for done in self._engine.step()
        ]

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return self._engine.score(requests)

    def close(self) -> None:
        self._engine.close()


def random_llama(folder: Path, threads: int) -> TransformersEngineConfig:
    """Save a random Llama of some 1 M parameters with a tokenizer trained on the seeds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from teams_hpc.dataset.templates import Row
    from teams_hpc.dataset.tokenizer import prepare_tokenizer

    shape = ModelShape(hidden_size=128, intermediate_size=352, num_hidden_layers=4)
    rows = [Row(seed.instruction, seed.input, seed.output) for seed in read_seeds(None, None).seeds]
    tokenizer = prepare_tokenizer(shape, rows, folder).tokenizer
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    LlamaForCausalLM(LlamaConfig(**shape.model_dump(), **ends)).save_pretrained(folder)
    return TransformersEngineConfig(
        model=folder, dtype="float32", device="cpu", max_tokens=32, threads=threads
    )


def engines(names: Sequence[str], folder: Path, threads: int) -> Iterator[tuple[str, Engine]]:
    """The engines asked for that are there."""
    if "template" in names:
        yield "template", load_engine(TemplateEngineConfig())
    if "llama" not in names:
        return
    if importlib.util.find_spec("teams_hpc.llm.transformers_engine") is None:
        print("llama: left out, there is no transformers engine here", file=sys.stderr)
        return
    yield "llama", Finishing(load_engine(random_llama(folder, threads)))


def steps_per_second(engine: Engine, way: Way, num_episodes: int, length: int, key: int) -> float:
    """Play `num_episodes` episodes of `length` steps and time the steps.

    Raises:
        RuntimeError: Too few rewrites reached the reviewer, so steps without a verdict were timed.
    """
    ledger = Ledger()
    world = World(
        settings=PolicyConfig(num_envs=num_episodes, episode_length=length),
        instructor=engine,
        reviewer=Reviewer(engine, way.verdict, ledger),
        ledger=ledger,
        observer=Observer(kind="features", episode_length=length),
    )
    seeds = read_seeds(None, None).seeds
    episodes = [
        Episode.begin(("benchmark", key, number), seeds[number % len(seeds)])
        for number in range(num_episodes)
    ]
    batch = num_episodes if way.is_batched else 1
    start = time.perf_counter()
    for step in range(length):
        for first in range(0, num_episodes, batch):
            chosen = episodes[first : first + batch]
            operations = [
                (number + step) % len(OPERATIONS) for number in range(first, first + len(chosen))
            ]
            world.step(chosen, operations)
    seconds = time.perf_counter() - start
    judged, num_steps = ledger.total("reviewer").calls, num_episodes * length
    if judged < 0.9 * num_steps:
        raise RuntimeError(f"only {judged} of {num_steps} rewrites were judged")
    return num_steps / seconds


def measure(engine: Engine, num_envs: int, length: int, repeats: int) -> list[dict[str, Any]]:
    """Median and spread of each way; ways take turns, so that a busy machine hits all alike."""
    rates: dict[Way, list[float]] = {way: [] for way in WAYS}
    for way in WAYS:
        steps_per_second(engine, way, 2, 1, -1)
    for repeat in range(repeats):
        for way in WAYS:
            rates[way].append(steps_per_second(engine, way, num_envs, length, repeat))
    return [
        {
            "way": way.name,
            "median": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
            "repeats": repeats,
        }
        for way, found in rates.items()
    ]


def machine() -> dict[str, Any]:
    """What it ran on; no names of hosts or people."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """The commit, marked if the working tree differs from it."""
    found = subprocess.run(
        ("git", "describe", "--always", "--dirty", "--abbrev=12"),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def print_table(name: str, rows: Sequence[dict[str, Any]]) -> None:
    slowest = rows[-1]["median"]
    print(f"\n{name}: environment steps per second, median of {rows[0]['repeats']}")
    for row in rows:
        spread = f"{row['lowest']:.1f} to {row['highest']:.1f}"
        times = row["median"] / slowest
        print(
            f"  {row['way']:<14} {row['median']:>9.1f}   ({spread})   {times:.1f} x published way"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the policy's environment.")
    parser.add_argument("--engines", default="template,llama")
    parser.add_argument("--num-envs", type=int, default=32)
    parser.add_argument("--episode-length", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch CPU threads")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, engine in engines(
            arguments.engines.split(","), Path(folder) / "llama", arguments.threads
        ):
            results[name] = measure(
                engine, arguments.num_envs, arguments.episode_length, arguments.repeats
            )
            engine.close()
            print_table(name, results[name])
    now = datetime.now(UTC)
    path = RESULTS / f"{now:%Y-%m-%d}-policy-environment.json"
    report = {
        "what": "environment steps per second",
        "date": f"{now:%Y-%m-%d}",
        "commit": commit(),
        "command": ["python", "benchmarks/policy_environment.py", *sys.argv[1:]],
        "machine": machine(),
        "settings": vars(arguments),
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
