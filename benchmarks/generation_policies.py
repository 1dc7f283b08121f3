"""What a learned policy is worth down the line: generation with it and with random operations.

    python benchmarks/generation_policies.py --folder FOLDER [--trajectories 2] [--steps 4]

FOLDER is what benchmarks/policy_ablation.py left: a run whose policy was trained and selected with
the pocket Llama as instructor and reviewer. Here the pocket Llama is the expert too. Two
generations over all seeds, alike but for `generate.policy`: `learned` in FOLDER itself, `uniform`
in FOLDER-uniform. They are compared as `teams-hpc report --against` does it: kept rows for each
hundred expert calls, what became of the steps, and the diversity of kept instructions that equally
many expert calls made, with 95 % intervals over seeds. Seeds that the policy was trained on are
among them, as in every run.

Writes JSON to benchmarks/results/, and FOLDER's report shows the comparison.
"""

import argparse
from pathlib import Path
from typing import Any

from pocket_run import POCKET, do_stage, open_pocket_run
from policy_ablation import settings_of
from records import write_record

from teams_hpc.report.html import compare_with, rewrite_report
from teams_hpc.storage.atomic import read_json


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    words = [
        *settings_of(arguments),
        f"generate.num_trajectories={arguments.trajectories}",
        f"generate.num_steps={arguments.steps}",
    ]
    folder = arguments.folder.resolve()
    runs = []
    for policy, root in (
        ("learned", folder),
        ("uniform", folder.with_name(f"{folder.name}-uniform")),
    ):
        run_dir, config = open_pocket_run(
            root, arguments.model, *words, f"generate.policy={policy}"
        )
        do_stage(run_dir, config, "generate")
        runs.append((run_dir, config))
    (ours, config), (other, _) = runs
    compare_with(ours, config, other)
    print(f"report: {rewrite_report(ours, config).name}")
    found = dict(read_json(ours.comparison))
    found.pop("other")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=POCKET)
    parser.add_argument("--members", type=int, default=2, help="as given to policy_ablation.py")
    parser.add_argument("--iterations", type=int, default=40, help="as given to it")
    parser.add_argument("--target-kl", type=float, default=0.03, help="as given to it")
    parser.add_argument("--episodes", type=int, default=4, help="as given to it")
    parser.add_argument("--trajectories", type=int, default=1, help="chains of each seed")
    parser.add_argument("--steps", type=int, default=4, help="of each chain")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(f"expert calls {result['expert_calls']}, kept rows {result['kept']}")
    for name, found in result["measures"].items():
        ours, other, difference = (found[key] for key in ("ours", "other", "difference"))
        print(
            f"  {name:<34} {ours['value']:8.3f} {other['value']:8.3f}   "
            f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"
        )
    what = "generation with the learned policy against uniform, pocket Llama as expert"
    print(f"written: {write_record('generation-policies', what, vars(arguments), result)}")


if __name__ == "__main__":
    main()
