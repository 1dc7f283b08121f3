"""The stage `evaluate`: what the fine-tuned model and its data set are worth."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from teams_hpc.config import Config
from teams_hpc.config.digest import file_digest
from teams_hpc.errors import WorkError
from teams_hpc.evaluation.benchmarks import run_benchmarks
from teams_hpc.evaluation.control import overfit_control
from teams_hpc.evaluation.diversity import describe, operation_counts
from teams_hpc.evaluation.losses import ExampleLosses, example_losses, load_model
from teams_hpc.evaluation.membership import Attack, attack, control_auc, judge_controls
from teams_hpc.llm.ledger import WIZARDLM_CALLS, Ledger
from teams_hpc.rewriting.identity import keyed_seed
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.seeds import read_seeds
from teams_hpc.runtime.metrics import Progress
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import read_json, write_json
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest
from teams_hpc.storage.shards import Table

_log = logging.getLogger(__name__)
Section = dict[str, Any]


def evaluate(run_dir: RunDir, config: Config, index: int, stop: StopFlag) -> None:
    """Measure held-out loss, privacy, diversity, queries and benchmarks.

    Each part is a JSON file of its own; those already there are kept when it runs again.

    Raises:
        WorkError: A model does not load, or a benchmark can't run.
        StopRequested: Asked to stop between parts.
    """
    parts: Mapping[str, Callable[[RunDir, Config], Section]] = {
        "queries": _queries,
        "diversity": _diversity,
        "membership": _losses_and_membership,
        "benchmarks": _benchmarks,
    }
    progress = Progress(run_dir.progress("evaluate"), unit="parts")
    results: dict[str, Section] = {}
    for number, (name, measure) in enumerate(parts.items()):
        progress.update(number, len(parts), name)
        stop.raise_if_set(f"{number} of {len(parts)} parts")
        path = run_dir.evaluate / f"{name}.json"
        if not path.exists():
            write_json(path, measure(run_dir, config))
        results[name] = read_json(path)
    results["held_out"] = results["membership"].pop("held_out")
    for side in ("tuned", "base"):
        results["membership"][side].pop("roc")
    files = {f"{name}.json": file_digest(run_dir.evaluate / f"{name}.json") for name in parts}
    write_manifest(run_dir, "evaluate", {"files": files, **results})
    progress.update(len(parts), len(parts), _summary(results))


def _summary(results: Mapping[str, Section]) -> str:
    auc = results["membership"]["tuned"]["auc"]
    return f"membership AUC {auc['value']:.2f}" if auc else "membership not measurable"


def _queries(run_dir: RunDir, config: Config) -> Section:
    manifest = read_manifest(run_dir, "generate")
    if manifest is None:
        raise WorkError("evaluate needs generate, which is not done")
    calls = Ledger.from_json(manifest["usage"]).total("expert")
    kept = manifest["counts"]["kept"]
    return {
        "expert_calls": calls.calls,
        "expert_calls_in_doubt": calls.in_doubt,
        "expert_tokens": calls.prompt_tokens + calls.completion_tokens,
        "kept_rows": kept,
        "calls_per_kept_row": calls.calls / kept if kept else None,
        "wizardlm_calls": WIZARDLM_CALLS,
        "share_of_wizardlm": calls.calls / WIZARDLM_CALLS,
    }


def _diversity(run_dir: RunDir, config: Config) -> Section:
    with Table.open(run_dir.dataset_rows) as table:
        rows = table.read(0, table.num_rows, ["instruction", "response", "operation"])
    seeds = read_seeds(config.seeds.path, config.seeds.limit).seeds
    return {
        "seeds": describe([seed.instruction for seed in seeds]),
        "instructions": describe(rows["instruction"]),
        "responses": describe(rows["response"]),
        "operations": operation_counts(rows["operation"], [str(name) for name in OPERATIONS]),
    }


def _model_folders(run_dir: RunDir, config: Config) -> dict[str, Path]:
    base = config.sft.model if isinstance(config.sft.model, Path) else run_dir.base_model
    return {"base": base, "tuned": run_dir.model}


def _losses_and_membership(run_dir: RunDir, config: Config) -> Section:
    with Table.open(run_dir.dataset_rows) as table:
        seed_ids = table.read(0, table.num_rows, ["seed_id"])["seed_id"]
    packed, batch_size = run_dir.packed_rows, config.evaluate.batch_size
    held_out: Section = {}
    attacks: dict[str, Attack] = {}
    for name, folder in _model_folders(run_dir, config).items():
        model = load_model(folder)
        losses: dict[str, ExampleLosses] = {
            group: example_losses(model, packed, group, batch_size)
            for group in ("train", "held_out")
        }
        held_out[name] = {group: found.mean for group, found in losses.items()}
        attacks[name] = attack(
            losses["train"],
            losses["held_out"],
            seed_ids,
            num_bootstrap=config.evaluate.num_bootstrap,
            seed=keyed_seed(config.seed, "membership", name),
        )
        del model
    control = overfit_control(
        packed,
        num_rows=config.evaluate.control_rows,
        num_steps=config.evaluate.control_steps,
        seed=keyed_seed(config.seed, "control"),
    )
    reached = control_auc(control.members, control.non_members)
    return {
        "held_out": held_out,
        **{name: found.as_dict() for name, found in attacks.items()},
        "control": {
            "auc": reached,
            "num_steps": control.num_steps,
            "num_members": len(control.members),
            "num_non_members": len(control.non_members),
        },
        "faults": judge_controls(attacks["base"], reached),
    }


def _benchmarks(run_dir: RunDir, config: Config) -> Section:
    return run_benchmarks(config, _model_folders(run_dir, config))
