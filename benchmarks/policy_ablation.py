"""What a policy should see, and whether it learns anything, with a real language model.

    python benchmarks/policy_ablation.py --folder FOLDER [--members 2] [--iterations 40]

Instructor and reviewer are the pocket Llama. Three observations (`policy.variants`): history and
features of the instruction; history and an embedding of it in the instructor's hidden states; the
bare one-hot of the last operation, as published. Each is trained with the same seeds on
`policy_train`, and every member is played on `policy_report`, seeds no member saw, with sampled
actions, under the same luck as the baselines. Told are

- the ablation: mean reward a step of each observation, and paired differences to `features`;
  intervals (95 %) resample members and seeds;
- the selected member, chosen on `policy_select`, against random and round-robin: paired bootstrap
  over seeds, from the manifest of the stage `select`.

FOLDER is a run directory; the same command goes on where it was stopped. Writes JSON to
benchmarks/results/; benchmarks/generation_policies.py uses the same FOLDER.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pocket_run import POCKET, do_stage, open_pocket_run
from records import write_record

from teams_hpc.config import Config
from teams_hpc.llm.ledger import Ledger
from teams_hpc.policy.rollout import Evaluation, evaluate_policy
from teams_hpc.policy.setting import build_world, loaded_engines, make_observer, seeds_by_split
from teams_hpc.rewriting.observation import Observer
from teams_hpc.rewriting.operation_policy import (
    MlpPolicy,
    OperationPolicy,
    RoundRobinPolicy,
    UniformPolicy,
)
from teams_hpc.runtime.metrics import read_metrics
from teams_hpc.storage.atomic import read_json, write_json
from teams_hpc.storage.run_dir import RunDir

VARIANTS = ("features", "embedding", "one_hot")
_NUM_BOOTSTRAP = 5000
Floats = NDArray[np.float64]


def settings_of(arguments: argparse.Namespace) -> list[str]:
    """What the run sets besides its models."""
    variants = ", ".join(f"{{name: {name}, observation: {name}}}" for name in VARIANTS)
    return [
        f"policy.variants=[{variants}]",
        f"policy.num_members={arguments.members}",
        f"policy.iterations={arguments.iterations}",
        f"policy.target_kl={arguments.target_kl}",
        f"policy.num_eval_episodes={arguments.episodes}",
        "policy.num_bootstrap=5000",
    ]


def play_all(run_dir: RunDir, config: Config) -> dict[str, Floats]:
    """Mean reward of each report seed: by variant (members, seeds), by baseline (1, seeds)."""
    seeds = seeds_by_split(config)["policy_report"]
    found: dict[str, list[Floats]] = {}
    baselines = {"uniform": UniformPolicy(), "round_robin": RoundRobinPolicy()}
    with loaded_engines(config) as engines:

        def play(file: str, name: str, policy: OperationPolicy, observer: Observer | None) -> None:
            path = run_dir.root / "ablation" / f"{file}.json"
            if not path.exists():
                print(f"{file} on the report seeds", flush=True)
                path.parent.mkdir(exist_ok=True)
                world = build_world(config, engines, Ledger(), observer)
                write_json(path, evaluate_policy(world, policy, seeds, config.seed).to_json())
            found.setdefault(name, []).append(Evaluation.from_json(read_json(path)).by_seed())

        for index in range(config.policy.num_tasks):
            plan = config.policy.member(index)
            policy = MlpPolicy.load(run_dir.member(index) / "policy.safetensors")
            observer = make_observer(plan.settings, engines[0])
            play(f"member-{index:03d}", plan.variant, policy, observer)
        for name, baseline in baselines.items():
            play(name, name, baseline, None)
    return {name: np.stack(rows) for name, rows in found.items()}


def interval(draws: Floats, value: float) -> dict[str, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"value": value, "low": float(low), "high": float(high)}


def ablation(played: Mapping[str, Floats], seed: int) -> dict[str, Any]:
    """Means and differences, resampling members (a baseline has one) and seeds, alike for all."""
    random = np.random.default_rng(seed)
    num_members, num_seeds = played["features"].shape
    draws: dict[str, list[float]] = {name: [] for name in played}
    for _ in range(_NUM_BOOTSTRAP):
        members = random.integers(num_members, size=num_members)
        seeds = random.integers(num_seeds, size=num_seeds)
        for name, table in played.items():
            some = table[members] if len(table) == num_members else table
            draws[name].append(float(some[:, seeds].mean()))
    sampled = {name: np.array(values) for name, values in draws.items()}
    means = {name: float(table.mean()) for name, table in played.items()}
    return {
        "mean_reward": {name: interval(sampled[name], means[name]) for name in played},
        "by_member": {name: table.mean(axis=1).tolist() for name, table in played.items()},
        "minus_features": {
            name: interval(sampled[name] - sampled["features"], means[name] - means["features"])
            for name in played
            if name != "features"
        },
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    run_dir, config = open_pocket_run(arguments.folder, arguments.model, *settings_of(arguments))
    trained: Any = do_stage(run_dir, config, "policy", config.policy.num_tasks)
    selected: Any = do_stage(run_dir, config, "select")
    played = play_all(run_dir, config)
    curves = {}
    for index in range(config.policy.num_tasks):
        lines = list(read_metrics(run_dir.member(index) / "metrics.jsonl"))
        name = f"{config.policy.member(index).variant}-{config.policy.member(index).number}"
        curves[name] = [round(line["mean_reward"], 4) for line in lines]
    report = selected["report"]
    return {
        "model": selected["engines"]["instructor"]["content_id"],
        "num_report_seeds": report["num_seeds"],
        "num_episodes": report["num_episodes"],
        "ablation": ablation(played, config.seed),
        "selected": {
            "member": selected["chosen"],
            "variant": config.policy.member(selected["chosen"]).variant,
            "mean_reward": {n: p["mean_reward"] for n, p in report["policies"].items()},
            "learned_minus": report["differences"],
            "operations_by_step": report["policies"]["learned"]["operations_by_step"],
            "operations_by_kind": report["policies"]["learned"]["operations_by_kind"],
        },
        "sanity_accuracy": selected["sanity_accuracy"],
        "saturated_share": selected["saturated_share"],
        "training_reward": curves,
        "calls": trained["usage"],
        "target": "the selected policy beats uniform and round-robin, intervals above zero",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=POCKET)
    parser.add_argument("--members", type=int, default=2, help="seeds of each variant")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--target-kl", type=float, default=0.03)
    parser.add_argument("--episodes", type=int, default=4, help="of each seed that is played")
    arguments = parser.parse_args()
    result = measure(arguments)
    for part in ("mean_reward", "minus_features"):
        print(part.replace("_", " "))
        for name, found in result["ablation"][part].items():
            print(f"  {name:<12} {found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})")
    selected = result["selected"]
    print(f"selected: member {selected['member']} ({selected['variant']}), better than")
    for name, found in selected["learned_minus"].items():
        print(f"  {name:<12} by {found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})")
    what = "observations of the policy, and the learned policy against baselines, pocket Llama"
    print(f"written: {write_record('policy-ablation', what, vars(arguments), result)}")


if __name__ == "__main__":
    main()
