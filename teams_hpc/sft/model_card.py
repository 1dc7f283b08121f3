"""The README.md of a trained model: what it is, what it was made from, what to mind."""

from collections.abc import Mapping
from typing import Any

from teams_hpc import __version__
from teams_hpc.config import Config, ModelShape
from teams_hpc.storage.run_dir import RunDir, read_manifest


def model_card(run_dir: RunDir, config: Config, result: Mapping[str, Any]) -> str:
    """Text of the card; holds no time, host or path, so equal work gives an equal card."""
    dataset = read_manifest(run_dir, "dataset") or {}
    counts = dataset.get("counts", {})
    base = config.sft.model
    origin = (
        "a Llama built from configuration with random weights"
        if isinstance(base, ModelShape)
        else f"the folder `{base.name}`"
    )
    licence = (
        "It was trained from nothing on this run's data."
        if isinstance(base, ModelShape)
        else "The licence of its base model applies to it, and the terms of the expert model that "
        "wrote its training data may limit its use."
    )
    held_out = result["held_out_loss"]
    return f"""# {config.name}

A causal language model fine-tuned by teams_hpc {__version__} with instruction-tuning data made by
TeaMs-RL (arXiv 2403.08694).

| | |
|---|---|
| base | {origin} |
| training pairs | {counts.get("train", "unknown")} |
| data set (SHA-256) | {dataset.get("sha256", "unknown")} |
| prompt format | {dataset.get("template", "unknown")} |
| optimizer steps | {result["steps"]} of {result["schedule_steps"]} |
| training loss | {result["first_loss"]:.4f} at first, {result["last_loss"]:.4f} at last |
| held-out loss | {held_out["before"]} before, {held_out["after"]} after |
| precision | {result["dtype"]} |

{licence} It has had no safety training.
"""
