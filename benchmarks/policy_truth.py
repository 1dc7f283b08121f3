"""How near TRPO comes to the best policy there is, in the world where that can be computed.

    python benchmarks/policy_truth.py [--members 5] [--iterations 150] [--target-kl 0.01]

The template world is a small Markov decision process (tests/template_truth.py solves it). Told are
the optimum, the best constant, uniform and round-robin policies, and what members reach that were
trained on `policy_train`: played with sampled actions on `policy_report`, seeds they never saw, as
a share of the optimum for those seeds. Intervals are 95 %, by bootstrap over seeds; for all members
together over seeds and members. Prints a table and writes JSON to benchmarks/results/.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import write_record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from template_truth import Means, Truth, play

from teams_hpc.config import Config
from teams_hpc.config.policy import PolicyConfig
from teams_hpc.llm.ledger import Ledger
from teams_hpc.policy.learner import Learner
from teams_hpc.policy.rollout import evaluate_policy
from teams_hpc.policy.setting import (
    build_world,
    loaded_engines,
    make_observer,
    seeds_by_split,
)
from teams_hpc.policy.statistics import mean_interval
from teams_hpc.policy.vec_env import RewritingVecEnv
from teams_hpc.rewriting.operation_policy import (
    OperationPolicy,
    RoundRobinPolicy,
    UniformPolicy,
)

_NUM_BOOTSTRAP = 5000


def of_members(by_seed: Sequence[np.ndarray], best: float, seed: int) -> dict[str, float]:
    """Mean of all members as a share of the best, with an interval over members and seeds."""
    table = np.stack(by_seed) / best
    members, seeds = table.shape
    random = np.random.default_rng(seed)
    means = [
        table[random.integers(members, size=members)][:, random.integers(seeds, size=seeds)].mean()
        for _ in range(_NUM_BOOTSTRAP)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return {"value": float(table.mean()), "low": float(low), "high": float(high)}


def measure(config: Config, rewrites: int) -> dict[str, Any]:
    """Truth, baselines and members, all on the report seeds."""
    splits = seeds_by_split(config)
    reported = splits["policy_report"]
    means = Means.measure([seed for some in splits.values() for seed in some], rewrites)
    truth = Truth.of(reported, means)
    best, choice = truth.solve()
    with loaded_engines(config) as engines:
        world = build_world(config, engines, Ledger(), make_observer(config.policy, engines[0]))
        played = play(world, reported, choice, 20).mean(axis=1)
        result: dict[str, Any] = {
            "num_report_seeds": len(reported),
            "num_episodes": config.policy.num_eval_episodes,
            "optimum": best,
            "largest_standard_error_of_a_mean_reward": max(means.error.values()),
            "optimum_played": {
                "value": float(played.mean()),
                "standard_error": float(played.std(ddof=1) / len(played) ** 0.5),
            },
            "computed_share": {name: value / best for name, value in truth.simple().items()},
        }
        policies: dict[str, OperationPolicy] = {
            "uniform": UniformPolicy(),
            "round_robin": RoundRobinPolicy(),
        }
        for index in range(config.policy.num_members):
            key = (config.seed, "policy", index)
            learner = Learner(RewritingVecEnv(world, splits["policy_train"]), config.policy, key)
            for iteration in range(1, config.policy.iterations + 1):
                learner.iterate(iteration)
            policies[f"member_{index}"] = learner.export(world.observer.metadata())
            print(f"member {index} trained", file=sys.stderr)
        found = {
            name: evaluate_policy(world, policy, reported, config.seed).by_seed()
            for name, policy in policies.items()
        }
    result["share_of_optimum"] = {
        name: mean_interval(by_seed / best, _NUM_BOOTSTRAP, config.seed).as_dict()
        for name, by_seed in found.items()
    }
    members = [by_seed for name, by_seed in found.items() if name.startswith("member")]
    result["share_of_optimum"]["all_members"] = of_members(members, best, config.seed)
    result["target"] = "simple policies at most 0.75, members at least 0.9 of the optimum"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--target-kl", type=float, default=PolicyConfig().target_kl)
    parser.add_argument("--episodes", type=int, default=8, help="of each report seed")
    parser.add_argument("--rewrites", type=int, default=2000, help="for each mean reward")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = Config(
        name="truth",
        policy=PolicyConfig(
            num_members=arguments.members,
            iterations=arguments.iterations,
            target_kl=arguments.target_kl,
            num_eval_episodes=arguments.episodes,
        ),
    )
    result = measure(config, arguments.rewrites)
    print(f"optimum {result['optimum']:.4f} a step; shares of it:")
    for name, share in result["computed_share"].items():
        print(f"  {name:<14} {share:.3f} (computed)")
    for name, found in result["share_of_optimum"].items():
        print(f"  {name:<14} {found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})")
    print(
        f"written: {write_record('policy-truth', __doc__.splitlines()[0], vars(arguments), result)}"
    )


if __name__ == "__main__":
    main()
