"""Environment steps per second: all episodes in one batch, or as the published loop does it.

    python benchmarks/policy_environment.py [--engines template,pocket] [--repeats 5]

One step is one rewrite by the instructor and one verdict by the reviewer. Timed over the same
episodes with the same operations:

- batched: `--num-envs` episodes together, verdicts by likelihood (what training does);
- one at a time: the same calls, a prompt after the other;
- published way: one prompt at a time by transformers' own `generate`, with generated verdicts, as
  the published loop does it;
- published way, our engine: the same by this suite's engine, which also guesses ahead then.

`template` is the grammar, which gains nothing from a batch; `pocket` the Llama that comes with
the package; `llama` a random one. Models run on the CPU, by default in float32 on one thread: then
the CPU seconds of this process, which are told too, don't depend on what else the machine does.

Of whole iterations of policy training with the same models it tells how much is not the world's:
policy network, advantages, TRPO and critic. Prints tables and writes JSON to benchmarks/results/.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from records import write_record

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
from teams_hpc.policy.learner import Learner
from teams_hpc.policy.vec_env import RewritingVecEnv
from teams_hpc.rewriting.observation import Observer
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.reviewer import Reviewer
from teams_hpc.rewriting.seeds import read_seeds

POCKET = Path(__file__).parents[1] / "teams_hpc" / "data" / "pocket-llama"
_FEWEST_JUDGED = 0.8
_STEPS_A_WAY_ONE_BY_ONE = 8


@dataclass(frozen=True)
class Way:
    """How the steps are made."""

    name: str
    verdict: Literal["likelihood", "generated"]
    is_batched: bool
    by_generate: bool = False


WAYS = (
    Way("batched", "likelihood", True),
    Way("one at a time", "likelihood", False),
    Way("published way", "generated", False, by_generate=True),
    Way("published way, our engine", "generated", False),
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
            done._replace(finish_reason="stop") if done.finish_reason == "length" else done
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


@dataclass
class Generate:
    """A model through transformers' own `generate`, one prompt after the other."""

    config: TransformersEngineConfig
    content_id: str = "generate"
    exactness: str = "statistical"
    is_model: bool = True
    _pending: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(self.config.model)
        self._model = AutoModelForCausalLM.from_pretrained(
            self.config.model, dtype=getattr(torch, self.config.dtype)
        )
        self._model.eval()

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def add(self, request: Request) -> None:
        self._pending.append(request)

    def step(self) -> list[Completion]:
        pending, self._pending = self._pending, []
        return [self._complete(request) for request in pending]

    def _complete(self, request: Request) -> Completion:
        import torch

        turns = [{"role": one.role, "content": one.content} for one in request.messages]
        text = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        inputs = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                max_new_tokens=self.config.max_tokens,
                pad_token_id=self._tokenizer.pad_token_id,
            )
        reply = output[0, length:]
        return Completion(
            id=request.id,
            text=self._tokenizer.decode(reply, skip_special_tokens=True),
            finish_reason="length" if len(reply) == self.config.max_tokens else "stop",
            prompt_tokens=length,
            completion_tokens=len(reply),
        )

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True)
class Candidate:
    """An engine, and the same model by `generate` where it is one."""

    engine: Engine
    by_generate: Generate | None = None

    def of(self, way: Way) -> Engine | None:
        found: Any = self.by_generate if way.by_generate else self.engine
        return found  # type: ignore[no-any-return]


def candidates(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Candidate]]:
    """The engines asked for."""
    for name in arguments.engines.split(","):
        if name == "template":
            yield name, Candidate(load_engine(TemplateEngineConfig()))
            continue
        if name == "llama":
            config = random_llama(folder, arguments.threads)
            yield name, Candidate(Finishing(load_engine(config)))
            continue
        config = TransformersEngineConfig(
            model=arguments.model,
            dtype=arguments.dtype,
            device="cpu",
            batching="fixed",
            batch_size=arguments.batch_size,
            max_tokens=160,
            threads=arguments.threads,
        )
        yield name, Candidate(load_engine(config), Generate(config))


@dataclass(frozen=True)
class Rate:
    """Steps per second of the clock and of this process's CPU."""

    wall: float
    cpu: float


def steps_per_second(engine: Engine, way: Way, num_episodes: int, length: int, key: int) -> Rate:
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
        Episode.begin(("benchmark", key, number), seeds[(number + key * 37) % len(seeds)])
        for number in range(num_episodes)
    ]
    batch = num_episodes if way.is_batched else 1
    start, cpu = time.perf_counter(), time.process_time()
    for step in range(length):
        for first in range(0, num_episodes, batch):
            chosen = episodes[first : first + batch]
            operations = [
                (number + step) % len(OPERATIONS) for number in range(first, first + len(chosen))
            ]
            world.step(chosen, operations)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    judged, num_steps = ledger.total("reviewer").calls, num_episodes * length
    if judged < _FEWEST_JUDGED * num_steps:
        raise RuntimeError(f"only {judged} of {num_steps} rewrites were judged")
    return Rate(num_steps / seconds, num_steps / cpu)


def measure(candidate: Candidate, num_envs: int, length: int, repeats: int) -> dict[str, Any]:
    """Median and spread of each way; ways take turns, so that a busy machine hits all alike.

    One at a time a few of the episodes tell the rate as well.
    """
    ways = [way for way in WAYS if candidate.of(way) is not None]
    rates: dict[Way, list[Rate]] = {way: [] for way in ways}
    for repeat in range(-1, repeats):
        for way in ways:
            engine = candidate.of(way)
            assert engine is not None
            count = num_envs if way.is_batched else min(num_envs, _STEPS_A_WAY_ONE_BY_ONE)
            if repeat < 0:
                steps_per_second(engine, way, 6, 1, 99)
            else:
                rates[way].append(steps_per_second(engine, way, count, length, repeat))
    batched = rates[ways[0]]
    return {
        "repeats": repeats,
        "ways": [
            {
                "way": way.name,
                **spread([rate.wall for rate in found]),
                "per_cpu_second": spread([rate.cpu for rate in found]),
                "batched_is_times_faster": spread(
                    [ours.wall / theirs.wall for ours, theirs in zip(batched, found, strict=True)]
                ),
            }
            for way, found in rates.items()
        ],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def policy_share(engine: Engine, num_envs: int, iterations: int) -> dict[str, Any]:
    """CPU seconds of iterations of training, and how much of them is not the world's."""
    import torch

    inside = 0.0

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal inside
            start = time.process_time()
            try:
                return work(*arguments, **options)
            finally:
                inside += time.process_time() - start

        return run

    class TimedWorld(World):
        step = timed(World.step)
        observation = timed(World.observation)

    torch.set_num_threads(1)
    settings, ledger = PolicyConfig(num_envs=num_envs), Ledger()
    world = TimedWorld(
        settings=settings,
        instructor=engine,
        reviewer=Reviewer(engine, "likelihood", ledger),
        ledger=ledger,
        observer=Observer(kind="features", episode_length=settings.episode_length),
    )
    seeds = read_seeds(None, None).seeds
    learner = Learner(RewritingVecEnv(world, seeds), settings, (543, "benchmark"))
    found = []
    for number in range(iterations + 1):
        inside, start = 0.0, time.process_time()
        learner.iterate(number)
        whole = time.process_time() - start
        found.append((whole, whole - inside))
    found = found[1:]  # the first one also imports and warms up
    return {
        "steps_of_an_iteration": num_envs * settings.episode_length,
        "iterations": iterations,
        "iteration_cpu_s": spread([whole for whole, _ in found]),
        "policy_cpu_s": spread([own for _, own in found]),
        "share": spread([own / whole for whole, own in found]),
    }


def print_table(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}: environment steps per second, median of {found['repeats']}")
    for row in found["ways"]:
        shown = f"{row['lowest']:.1f} to {row['highest']:.1f}"
        cpu, times = row["per_cpu_second"]["median"], row["batched_is_times_faster"]
        print(
            f"  {row['way']:<26} {row['median']:>9.1f}   ({shown})   {cpu:.1f} per CPU second, "
            f"batched is {times['median']:.1f} x ({times['lowest']:.1f} to {times['highest']:.1f})"
        )
    share = found["policy"]["share"]
    print(
        f"  policy and TRPO: {100 * share['median']:.2f} % of an iteration "
        f"({100 * share['lowest']:.2f} to {100 * share['highest']:.2f})"
    )


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", default="template,pocket")
    parser.add_argument("--model", type=Path, default=POCKET, help="of the engine `pocket`")
    parser.add_argument("--num-envs", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--episode-length", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=5, help="whole ones, for TRPO's share")
    parser.add_argument("--threads", type=int, default=1, help="torch CPU threads")
    parser.add_argument("--dtype", default="float32", help="of the engine `pocket`")
    parser.add_argument("--label", default="", help="added to the name of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)  # of the ways that aren't engines
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, candidate in candidates(arguments, Path(folder) / "llama"):
            results[name] = {
                "content_id": candidate.engine.content_id,
                **measure(
                    candidate, arguments.num_envs, arguments.episode_length, arguments.repeats
                ),
                "policy": policy_share(candidate.engine, arguments.num_envs, arguments.iterations),
            }
            candidate.engine.close()
            print_table(name, results[name])
    results["target"] = "10 times either published way; policy and TRPO below 0.02 of an iteration"
    name = f"policy-environment{arguments.label and '-' + arguments.label}"
    path = write_record(name, "environment steps per second", vars(arguments), results)
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
