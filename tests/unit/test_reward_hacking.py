"""Instructors that cheat earn nothing, judged by the grammar with the rules of reward around it.

"Nothing" is exactly 0 where a rule applies, and otherwise the reviewer's floor for equal texts,
which a rewrite in vain has too. One case has to be read with care: going back and forth between two
texts. Its first move brings a text that was not there before, which nobody can tell from an honest
rewrite; so it earns what that one text is worth, once, and no way of going round adds to it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from teams_hpc.config.policy import PolicyConfig
from teams_hpc.config.schema import TemplateEngineConfig
from teams_hpc.llm.base import Completion, FinishReason, Request
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.template_engine import TemplateEngine
from teams_hpc.policy.environment import Episode, World
from teams_hpc.policy.learner import Learner
from teams_hpc.policy.vec_env import RewritingVecEnv
from teams_hpc.rewriting.observation import Observer
from teams_hpc.rewriting.operations import OPERATIONS, Operation
from teams_hpc.rewriting.reviewer import Reviewer
from teams_hpc.rewriting.seeds import read_seeds

SEEDS = read_seeds(None, 30).seeds
FLOOR = 0.04 + 1e-9
OTHER = "Describe how the tides shape a harbour town in winter and who depends on them."
THIRD = "Which tools does a clockmaker need, and what is each of them good for?"

Reply = tuple[str, FinishReason]
Cheat = Callable[[Request], Reply]


@dataclass
class Instructor:
    """Rewrites by a function."""

    rewrite: Cheat
    pending: list[Request] = field(default_factory=list)

    content_id, exactness, is_model = "cheat", "exact", False

    @property
    def num_pending(self) -> int:
        return len(self.pending)

    def add(self, request: Request) -> None:
        self.pending.append(request)

    def step(self) -> list[Completion]:
        pending, self.pending = self.pending, []
        return [self.complete(request) for request in pending]

    def complete(self, request: Request) -> Completion:
        text, finish = self.rewrite(request)
        return Completion(
            id=request.id, text=text, finish_reason=finish, prompt_tokens=1, completion_tokens=1
        )


def world_of(rewrite: Cheat, settings: PolicyConfig | None = None) -> World:
    ledger = Ledger()
    return World(
        settings=settings or PolicyConfig(),
        instructor=Instructor(rewrite),  # type: ignore[arg-type]
        reviewer=Reviewer(TemplateEngine(TemplateEngineConfig()), "likelihood", ledger),
        ledger=ledger,
        observer=Observer(kind="features", episode_length=6),
    )


def rewards_of(rewrite: Cheat, settings: PolicyConfig | None = None) -> list[list[float]]:
    """Rewards of six steps by seed."""
    world = world_of(rewrite, settings)
    episodes = [Episode.begin((1, number), seed) for number, seed in enumerate(SEEDS)]
    steps = [
        [outcome.reward for outcome in world.step(episodes, [step % 6] * len(episodes))]
        for step in range(6)
    ]
    return [list(rewards) for rewards in zip(*steps, strict=True)]


def letters(request: Request) -> Reply:
    draw = random.Random(request.seed)
    words = ("".join(draw.choices("bcdfghjklmnpqrstvwxz", k=draw.randint(2, 9))) for _ in range(12))
    return " ".join(words), "stop"


def over_and_over(request: Request) -> Reply:
    return " ".join(["the deep deep sea"] * 12), "stop"


def shuffled(request: Request) -> Reply:
    words = request.task.instruction.split()
    random.Random(request.seed).shuffle(words)
    return " ".join(words), "stop"


def same(change: Callable[[str], str]) -> Cheat:
    return lambda request: (change(request.task.instruction), "stop")


CHEATS: dict[str, Cheat] = {
    "empty": lambda request: ("", "stop"),
    "marks": lambda request: ("?!... --- ###", "stop"),
    "letters": letters,
    "over and over": over_and_over,
    "shuffled": shuffled,
    "echo": same(lambda text: text),
    "echo in capitals": same(str.upper),
    "echo in quotes": same(lambda text: f'"{text}"'),
    "echo with other marks": same(lambda text: text.replace(".", "!").replace(",", ";")),
    "echo with a courtesy": same(lambda text: f"Please {text[0].lower()}{text[1:]}"),
    "half": same(lambda text: " ".join(text.split()[: max(1, len(text.split()) // 2)])),
    "cut off": lambda request: (f"{request.task.instruction} And then tell of", "length"),
    "prompt": lambda request: (f"Here is the rewritten prompt: {OTHER}", "stop"),
    "too long": lambda request: (f"{OTHER} " * 40, "stop"),
}


@pytest.mark.parametrize("name", CHEATS)
def test_garbage_echo_and_truncation_earn_nothing(name: str) -> None:
    rewards = rewards_of(CHEATS[name])
    assert max(map(max, rewards)) <= FLOOR
    if name in ("empty", "marks", "echo", "echo in capitals", "echo in quotes", "cut off"):
        assert not any(map(any, rewards))


def to_and_fro(*texts: str) -> Cheat:
    """From the seed to each of the texts in turn, and round again."""

    def rewrite(request: Request) -> Reply:
        present = request.task.instruction
        place = texts.index(present) + 1 if present in texts else 0
        return texts[place % len(texts)], "stop"

    return rewrite


def back_to_the_seed(request: Request) -> Reply:
    """The seed can be told by what was added to it."""
    added = " Give three reasons, and name what the neighbours would say about each of them."
    text = request.task.instruction
    return text.removesuffix(added) if text.endswith(added) else text + added, "stop"


@pytest.mark.parametrize("reward", ["probability", "binary"])
@pytest.mark.parametrize(
    ("rewrite", "new_texts"),
    [
        (back_to_the_seed, 1),
        (to_and_fro(OTHER), 1),
        (to_and_fro(OTHER, THIRD), 2),
        (to_and_fro(OTHER, THIRD, OTHER.upper(), THIRD.replace("?", "!")), 2),
    ],
    ids=["to the seed and back", "to one text", "between two texts", "the same two disguised"],
)
def test_going_round_earns_what_each_new_text_is_worth_once(
    rewrite: Cheat, new_texts: int, reward: str
) -> None:
    """Like an instructor that stops for good once it has no new text any more."""
    for rewards in rewards_of(rewrite, PolicyConfig(reward=reward)):  # type: ignore[arg-type]
        assert sum(value > FLOOR for value in rewards) == new_texts
        assert sum(rewards) <= new_texts + 6 * FLOOR


def honest_by_deepening(request: Request) -> Reply:
    """Five operations cheat, each in its way; one really adds something."""
    draw = random.Random(request.seed)
    cheats = {
        Operation.ADD_CONSTRAINTS: back_to_the_seed,
        Operation.CONCRETIZING: letters,
        Operation.INCREASE_REASONING_STEPS: CHEATS["echo with a courtesy"],
        Operation.COMPLICATE_INPUT: CHEATS["cut off"],
        Operation.BREADTH: to_and_fro(OTHER, THIRD),
    }
    operation = Operation(request.task.operation)
    if operation in cheats:
        return cheats[operation](request)
    words = ("rivers", "glaciers", "markets", "choirs", "engines", "orchards", "ferries", "maps")
    first, second, third = draw.sample(words, 3)
    return f"{request.task.instruction} Also weigh {first} against {second} and {third}.", "stop"


def test_trpo_finds_the_one_operation_that_does_not_cheat() -> None:
    torch.set_num_threads(1)
    settings = PolicyConfig(num_envs=16, target_kl=0.05, hidden_size=16, critic_updates=4)
    world = world_of(honest_by_deepening, settings)
    learner = Learner(RewritingVecEnv(world, SEEDS), settings, (3, "hacking", 0))
    metrics = [learner.iterate(number) for number in range(1, 31)]
    last = metrics[-1]["operations_by_step"]
    deepening = OPERATIONS.index(Operation.DEEPENING)
    assert sum(step[deepening] for step in last) > 0.6 * sum(map(sum, last))
    assert metrics[-1]["mean_reward"] > metrics[0]["mean_reward"] + 0.2
