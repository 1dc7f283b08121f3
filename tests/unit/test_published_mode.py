"""The published training settings, and that nothing pushes the policy aside."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from teams_hpc.config import Config, TemplateEngineConfig, load_config
from teams_hpc.config.schema import GenerateConfig, TemplateReviewerConfig
from teams_hpc.generation.evolve import Chain, Steering
from teams_hpc.generation.plan import ChainKey
from teams_hpc.llm.base import Completion
from teams_hpc.llm.ledger import Ledger
from teams_hpc.policy.learner import Learner
from teams_hpc.policy.rollout import evaluate_policy
from teams_hpc.policy.setting import build_world, loaded_engines, make_observer
from teams_hpc.policy.vec_env import RewritingVecEnv
from teams_hpc.rewriting.observation import History, Observer
from teams_hpc.rewriting.operation_policy import MlpPolicy
from teams_hpc.rewriting.operations import OPERATIONS, Operation
from teams_hpc.rewriting.reviewer import Verdict
from teams_hpc.rewriting.seeds import read_seeds

PATH = Path(__file__).parents[2] / "configs" / "paper-llama1-7b.yaml"
SEEDS = read_seeds(None, None).seeds
WANTED = np.array([0.05, 0.1, 0.15, 0.2, 0.2, 0.3])


@pytest.fixture
def config() -> Config:
    return load_config(PATH, [])


def test_the_shipped_configuration_has_the_published_constants(config: Config) -> None:
    policy = config.policy
    found = (policy.gamma, policy.gae_lambda, policy.target_kl, policy.cg_damping)
    assert found == (0.995, 0.97, 0.01, 0.1)
    assert (policy.cg_max_steps, policy.line_search_max_iter, policy.hidden_size) == (10, 10, 64)
    assert (policy.episode_length, policy.num_envs, policy.iterations) == (6, 1, 200)
    assert (policy.observation, policy.reward, policy.compare_with) == (
        "one_hot",
        "binary",
        "parent",
    )
    assert (policy.num_members, policy.variants) == (1, ())
    assert config.seed == 543
    assert config.reviewer.verdict == "generated"
    expert = config.expert
    assert (expert.kind, expert.temperature, expert.top_p, expert.max_tokens) == (
        "http",
        0.7,
        0.95,
        2048,
    )
    assert expert.model == "gpt-4-1106-preview"  # type: ignore[union-attr]


def test_each_deviation_stands_beside_the_published_value() -> None:
    text = PATH.read_text().lower()
    for said in ("gaussian head", "l-bfgs", "+0.3 on breadth", "forced at steps 1 and 4",
                 "acceptance ratio", "never reset", "rules 2 to 4"):  # fmt: skip
        assert said in text, said


def test_it_trains_with_the_grammar_in_place_of_the_models(config: Config) -> None:
    """As it is but for the engines: one episode of six steps is a batch, rewards are 0 or 1."""
    torch.set_num_threads(1)
    judge = TemplateReviewerConfig(verdict=config.reviewer.verdict)
    engines = {"instructor": TemplateEngineConfig(), "reviewer": judge}
    with loaded_engines(config.model_copy(update=engines)) as loaded:
        observer = make_observer(config.policy, loaded[0])
        world = build_world(config, loaded, Ledger(), observer)
    learner = Learner(RewritingVecEnv(world, SEEDS), config.policy, (543, "policy", 0))
    before = learner.export(observer.metadata())
    for code in range(-1, 6):
        history = History.start() if code < 0 else History.start().after(code)
        seen = observer.observe("Sing.", "", history)
        # Nothing is preferred at first: sb3 begins with a head a hundredth of the usual size.
        assert np.abs(before.probabilities(seen, history) - 1 / 6).max() < 0.01
    for iteration in range(1, 6):
        metrics = learner.iterate(iteration)
        assert sum(map(sum, metrics["operations_by_step"])) == 6
        assert all(value in (0.0, 1.0) for value in metrics["reward_by_step"])
    assert world.ledger.total("reviewer").completion_tokens > 0


def fixed_policy() -> MlpPolicy:
    """Always the probabilities `WANTED`."""
    shapes = {"hidden_0": (4, 6), "hidden_1": (4, 4), "head": (6, 4)}
    weights = {f"{name}.weight": np.zeros(shape) for name, shape in shapes.items()}
    weights |= {f"{name}.bias": np.zeros(shape[0]) for name, shape in shapes.items()}
    weights["head.bias"] = np.log(WANTED)
    return MlpPolicy(weights=weights, metadata={"observation": "one_hot", "member": "0"})


def assert_as_wanted(counts: "Counter[int]") -> None:
    """Within four standard errors of what the policy says."""
    total = sum(counts.values())
    for code, share in enumerate(WANTED):
        error = (share * (1 - share) / total) ** 0.5
        assert abs(counts[code] / total - share) < 4 * error, OPERATIONS[code]


def test_in_training_operations_are_taken_as_often_as_the_policy_says() -> None:
    config = Config(name="t")
    with loaded_engines(config) as engines:
        world = build_world(config, engines, Ledger())
        played = evaluate_policy(world, fixed_policy(), SEEDS, 1)
    assert_as_wanted(Counter(dict(enumerate(np.sum(played.operations_by_step, axis=0).tolist()))))


def test_in_generation_no_operation_is_forced_or_forbidden_at_any_step() -> None:
    """Published: breadth at steps 1 and 4 and nowhere else, and +0.7 on add_constraints."""
    steering = Steering(
        run_seed=1,
        settings=GenerateConfig(num_steps=6),
        policy=fixed_policy(),
        member=0,
        observer=Observer(kind="one_hot", episode_length=6),
        expert="m",
    )
    counts = [Counter[int]() for _ in range(6)]
    for trajectory in range(3):
        for seed in SEEDS:
            chain = Chain(
                ChainKey(seed=seed, split="policy_train", trajectory=trajectory), steering
            )
            while chain.wants != "nothing":
                if chain.wants == "verdict":
                    chain.take_verdict(Verdict(p_not_equal=0.9))
                    continue
                text = f"Something new for {chain.request().seed}, quite unlike what was before."
                chain.take_completion(
                    Completion(
                        id="", text=text, finish_reason="stop", prompt_tokens=1, completion_tokens=1
                    )
                )
            for row in chain.rows:
                counts[row["step"]][row["operation"]] += 1
    for of_step in counts:
        assert_as_wanted(of_step)
    assert min(of_step[OPERATIONS.index(Operation.BREADTH)] for of_step in counts) > 100
