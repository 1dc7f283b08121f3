"""TRPO: solves a world whose best policy is known, exactly repeatable, exported as it is."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from teams_hpc.config.policy import PolicyConfig
from teams_hpc.llm.base import Completion, Request, Score, ScoreRequest
from teams_hpc.llm.ledger import Ledger
from teams_hpc.policy.environment import World
from teams_hpc.policy.learner import Learner
from teams_hpc.policy.rollout import evaluate_policy
from teams_hpc.policy.statistics import Interval, mean_interval
from teams_hpc.policy.vec_env import RewritingVecEnv
from teams_hpc.rewriting.observation import History, Observer, observation_size
from teams_hpc.rewriting.operation_policy import UniformPolicy
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.reviewer import Reviewer
from teams_hpc.rewriting.seeds import Seed

WANTED = {"Explain": "deepening", "List": "add_constraints", "Write": "breadth"}
SEEDS = [Seed(f"{verb} something about topic number {n}.") for n in range(9) for verb in WANTED]


class Bandit:
    """A text says which operation made it; the reviewer pays for the one that its parent wants."""

    content_id, exactness, is_model = "bandit", "exact", False

    def __init__(self, pays: Callable[[str, str], float]) -> None:
        self.pays = pays
        self.pending: list[Request] = []

    @property
    def num_pending(self) -> int:
        return len(self.pending)

    def add(self, request: Request) -> None:
        self.pending.append(request)

    def step(self) -> list[Completion]:
        pending, self.pending = self.pending, []
        return [self.rewrite(request) for request in pending]

    def rewrite(self, request: Request) -> Completion:
        verb = request.task.instruction.split()[0]
        return Completion(
            id=request.id,
            text=f"{verb} {request.seed} {request.task.operation}",
            finish_reason="stop",
            prompt_tokens=1,
            completion_tokens=1,
        )

    def score(self, requests: list[ScoreRequest]) -> list[Score]:
        paid = [self.pays(r.task.instruction, r.task.other.split()[-1]) for r in requests]
        return [
            Score(log_probabilities=(float(np.log(1 - p)), float(np.log(p))), prompt_tokens=1)
            for p in paid
        ]

    def close(self) -> None:
        """Nothing to free."""


def by_verb(before: str, operation: str) -> float:
    return 0.9 if WANTED[before.split()[0]] == operation else 0.1


def learner_of(
    settings: PolicyConfig, pays: Callable[[str, str], float] = by_verb, member: int = 0
) -> Learner:
    torch.set_num_threads(1)
    engine, ledger = Bandit(pays), Ledger()
    reviewer = Reviewer(engine, "likelihood", ledger)  # type: ignore[arg-type]
    world = World(
        settings=settings,
        instructor=engine,  # type: ignore[arg-type]
        reviewer=reviewer,
        ledger=ledger,
        observer=Observer(kind=settings.observation, episode_length=settings.episode_length),
    )
    return Learner(RewritingVecEnv(world, SEEDS), settings, (11, "test", member))


def bytes_of(learner: Learner) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in learner.state().items()}


def test_trpo_solves_a_world_whose_best_policy_is_known() -> None:
    """What pays depends on the first word of the text, which the observation tells."""
    settings = PolicyConfig(
        num_envs=32, episode_length=2, target_kl=0.05, hidden_size=16, critic_updates=4
    )
    learner = learner_of(settings)
    metrics = [learner.iterate(number) for number in range(1, 51)]
    assert metrics[0]["mean_reward"] < 0.35
    assert metrics[-1]["mean_reward"] > 0.8
    assert metrics[-1]["entropy"] < 0.5 < metrics[0]["entropy"]
    assert all(0.0 <= line["kl"] <= settings.target_kl for line in metrics)
    assert metrics[-1]["explained_variance"] > metrics[0]["explained_variance"]


def never_better(pays: Callable[[str, str], float], member: int) -> Interval:
    """How much better than uniform a policy is said to be that was trained where nothing helps."""
    settings = PolicyConfig(num_envs=16, episode_length=3, hidden_size=16, target_kl=0.05)
    learner = learner_of(settings, pays, member)
    for number in range(1, 7):
        learner.iterate(number)
    world, policy = learner._environment._world, learner.export({})
    seeds = [Seed(f"Explain unseen matter number {n}.") for n in range(40)]
    learned, uniform = (
        evaluate_policy(world, one, seeds, member).by_seed() for one in (policy, UniformPolicy())
    )
    return mean_interval(learned - uniform, 1000, member)


@pytest.mark.parametrize("member", range(3))
def test_where_all_earn_alike_no_policy_is_better(member: int) -> None:
    found = never_better(lambda before, operation: 0.7, member)
    assert abs(found.value) < 1e-9
    assert not found.is_above_zero


def test_where_rewards_are_noise_hardly_any_policy_is_called_better() -> None:
    """One in forty may be, by the meaning of a 95 % interval; of eight, two would be strange."""
    noise = np.random.default_rng(4)
    found = [
        never_better(lambda before, operation: noise.uniform(0.5, 0.9), member)
        for member in range(8)
    ]
    assert sum(interval.is_above_zero for interval in found) <= 1
    assert max(abs(interval.value) for interval in found) < 0.06


def test_the_exported_policy_is_the_trained_one() -> None:
    learner = learner_of(PolicyConfig(num_envs=16))
    learner.iterate(1)
    exported = learner.export({"observation": "features", "member": "0"})
    random = np.random.default_rng(0)
    shape = (50, observation_size("features"))
    observations = random.uniform(0.0, 1.0, size=shape).astype(np.float32)
    policy = learner._model.policy
    with torch.no_grad():
        expected = policy.get_distribution(torch.as_tensor(observations)).distribution.probs
    for row, probabilities in zip(observations, expected.numpy(), strict=True):
        found = exported.probabilities(row, History.start())
        assert np.abs(found - probabilities).max() < 1e-6


def test_an_iteration_is_a_function_of_state_member_and_number_alone() -> None:
    settings = PolicyConfig(num_envs=8, episode_length=3, hidden_size=8)
    first = learner_of(settings)
    for number in (1, 2):
        first.iterate(number)
    state = first.state()
    expected = first.iterate(3)
    other = learner_of(settings)
    other.iterate(40)
    np.random.seed(1)
    torch.manual_seed(1)
    other.restore(state)
    assert other.iterate(3) == expected
    assert bytes_of(other) == bytes_of(first)
    stranger = learner_of(settings, member=1)
    stranger.restore(state)
    assert stranger.iterate(3) != expected


def test_a_failed_line_search_leaves_the_actor_as_it_was() -> None:
    settings = PolicyConfig(num_envs=8, line_search_max_iter=1, target_kl=1e-36)
    learner = learner_of(settings)
    before = learner.export({}).weights
    metrics = learner.iterate(1)
    assert metrics["line_search_success"] == 0.0
    assert metrics["kl"] == 0.0
    after = learner.export({}).weights
    assert all((before[name] == after[name]).all() for name in before)


def test_where_nothing_can_be_learnt_nothing_changes_and_nothing_breaks() -> None:
    """Equal rewards and one blank observation: all advantages are exactly equal."""
    settings = PolicyConfig(num_envs=4, episode_length=1, observation="one_hot", hidden_size=4)
    learner = learner_of(settings, pays=lambda before, operation: 0.5)
    before = bytes_of(learner)
    metrics = learner.iterate(1)
    assert bytes_of(learner) == before
    assert (metrics["kl"], metrics["value_loss"]) == (None, None)
    assert metrics["mean_reward"] == pytest.approx(0.5)
    assert sum(metrics["operations_by_step"][0]) == 4
    assert len(metrics["operations_by_step"][0]) == len(OPERATIONS)
