"""What TRPO learns in the template world, against the truth."""

import pytest
import torch
from template_truth import NAMES, Means, Truth, always, play

from teams_hpc.config import Config
from teams_hpc.config.policy import PolicyConfig
from teams_hpc.llm.grammar.world import KINDS
from teams_hpc.llm.ledger import Ledger
from teams_hpc.policy.environment import World
from teams_hpc.policy.learner import Learner
from teams_hpc.policy.rollout import evaluate_policy
from teams_hpc.policy.setting import build_world, loaded_engines, make_observer, seeds_by_split
from teams_hpc.policy.statistics import mean_interval
from teams_hpc.policy.vec_env import RewritingVecEnv
from teams_hpc.rewriting.seeds import Seed


@pytest.fixture(scope="module")
def truth() -> Truth:
    seeds = [seed for some in seeds_by_split(Config(name="t")).values() for seed in some]
    return Truth.of(seeds, Means.measure(seeds, 200))


def make_world(settings: PolicyConfig) -> tuple[World, dict[str, list[Seed]]]:
    config = Config(name="t", policy=settings)
    with loaded_engines(config) as engines:
        observer = make_observer(config.policy, engines[0])
        return build_world(config, engines, Ledger(), observer), seeds_by_split(config)


def test_what_a_step_earns_is_known_well(truth: Truth) -> None:
    assert truth.means.floor == pytest.approx(0.04)
    assert len(truth.means.mean) == 4 * len(KINDS)
    for key, mean in truth.means.mean.items():
        assert 0.93 < mean <= 0.97, key
        assert truth.means.error[key] < 0.002, key


def test_no_policy_that_does_not_look_comes_near_the_best(truth: Truth) -> None:
    best, _ = truth.solve()
    assert 0.93 < best < 0.97
    simple = truth.simple()
    assert simple["round_robin"] <= simple["best_order"]
    for name, value in simple.items():
        assert value <= 0.75 * best, name


def test_backward_induction_beats_every_policy_of_the_state(truth: Truth) -> None:
    """The best policy's own value is the optimum, and one that differs in a state has less."""
    best, choice = truth.solve()
    assert truth.value(choice) == pytest.approx(best, abs=1e-12)
    last = truth.length - 1
    worse = truth.value(lambda step, state: {"breadth": 1.0} if step == 0 else choice(step, state))
    spoilt_end = truth.value(
        lambda step, state: {"breadth": 1.0} if step == last else choice(step, state)
    )
    assert worse < best - 0.1
    assert spoilt_end < best


def test_the_real_world_pays_what_the_process_says(truth: Truth) -> None:
    """Played by the engines and rules that training uses, each policy earns its computed value."""
    world, splits = make_world(PolicyConfig())
    seeds = [seed for some in splits.values() for seed in some]
    _, best = truth.solve()
    uniform = dict.fromkeys(NAMES, 1 / 6)
    for choice in (best, always(NAMES), always(("deepening",)), lambda step, state: uniform):
        rewards = play(world, seeds, choice, 4).mean(axis=1)
        error = rewards.std(ddof=1) / len(rewards) ** 0.5
        # Rewards of one seed are alike, so that is a little less than five standard errors.
        assert abs(rewards.mean() - truth.value(choice)) < 5 * error + 0.001


def trained(world: World, seeds: list[Seed], settings: PolicyConfig, member: int) -> Learner:
    learner = Learner(RewritingVecEnv(world, seeds), settings, (543, "truth", member))
    for iteration in range(1, settings.iterations + 1):
        learner.iterate(iteration)
    return learner


@pytest.mark.slow
def test_trpo_comes_near_the_best_on_seeds_it_never_saw(truth: Truth) -> None:
    """Reduced: benchmarks/policy_truth.py trains five members for longer."""
    torch.set_num_threads(1)
    settings = PolicyConfig(iterations=50, target_kl=0.03, num_eval_episodes=4)
    world, splits = make_world(settings)
    best, _ = Truth.of(splits["policy_report"], truth.means).solve()
    learner = trained(world, splits["policy_train"], settings, member=0)
    policy = learner.export(world.observer.metadata())
    by_seed = evaluate_policy(world, policy, splits["policy_report"], 543).by_seed()
    assert mean_interval(by_seed / best, 1000, 0).low > 0.85
    assert by_seed.mean() / best >= 0.9
