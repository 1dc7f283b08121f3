"""The model as others load it: safetensors, configuration, tokenizer, and a card."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from teams_hpc.config import Config
from teams_hpc.config.digest import file_digest, model_content_id
from teams_hpc.sft.checkpointing import RunState
from teams_hpc.sft.folders import files_below, replacing_folder
from teams_hpc.storage.run_dir import RunDir, read_manifest


def write_model(
    folder: Path, model: Any, weights: Mapping[str, Any] | None, tokenizer: Path, card: str
) -> None:
    """Write a Hugging Face model folder, atomically; on one process alone.

    Args:
        folder: Its name.
        model: The model; gives the configuration, and the weights unless they are given.
        weights: Whole weights by name.
        tokenizer: Folder whose files are put beside them.
        card: Text of its README.md.

    Raises:
        WorkError: The disk is full or failing.
    """
    _repair_generation_config(model.generation_config)
    trained_with = model.config.use_cache
    model.config.use_cache = True  # generating without a cache would be slow
    try:
        with replacing_folder(folder) as temporary:
            model.save_pretrained(temporary, state_dict=weights)
            for path in tokenizer.iterdir():
                shutil.copyfile(path, temporary / path.name)
            (temporary / "README.md").write_text(card, encoding="utf-8")
    finally:
        model.config.use_cache = trained_with


def _repair_generation_config(generation: GenerationConfig) -> None:
    """Some published models ask for a temperature without sampling; that is refused when saved."""
    if not generation.do_sample and (generation.temperature or generation.top_p):
        generation.do_sample = True


def model_files(run_dir: RunDir) -> dict[str, str]:
    """SHA-256 of every file of the models of this stage, by name relative to its folder."""
    folders = (run_dir.model, run_dir.base_model)
    return {
        path.relative_to(run_dir.sft).as_posix(): file_digest(path)
        for folder in folders
        if folder.is_dir()
        for path in (folder / name for name in files_below(folder))
    }


def base_card(config: Config) -> str:
    """README.md of a new model that has not been trained."""
    return _card(
        f"{config.name}, before fine-tuning",
        [
            "A new Llama with random weights, kept to compare the fine-tuned model with. "
            "Made by teams_hpc; it is of no other use.",
        ],
    )


def model_card(run_dir: RunDir, config: Config, state: RunState, digest: str) -> str:
    """README.md of the fine-tuned model: what it was made from, how, and under which licence."""
    sft = config.sft
    lines = [
        "An instruction-tuned model made by teams_hpc after TeaMs-RL (arXiv 2403.08694): a policy "
        "trained by reinforcement learning guided an expert model in rewriting seed instructions "
        "and answering them; this model was fine-tuned on the result.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {_base_model(config)} |",
        f"| data | {_data(run_dir)} |",
        f"| expert | {_expert(config)} |",
        f"| optimizer steps | {state.step}, of {sft.global_batch_rows} rows of "
        f"{sft.sequence_length} tokens |",
        f"| tokens | {state.tokens:,} |",
        f"| peak learning rate | {sft.learning_rate:g} |",
        f"| weights | {sft.dtype} |",
        f"| held-out loss | {_loss(state.held_out_before)} before, "
        f"{_loss(state.held_out_loss)} after (nats a response token) |",
        f"| run | `{config.name}`, seed {config.seed} |",
        f"| inputs | SHA-256 `{digest}` |",
        "",
        "## Licence",
        "",
        _licence(config),
        "",
        "The data was written by the expert model; the terms under which you use that model may "
        "limit what its output may be used for, training of other models included.",
        "",
        "## Limits",
        "",
        "Nobody has reviewed what this model says. The run's report shows what was measured.",
    ]
    return _card(config.name, lines)


def _card(title: str, lines: list[str]) -> str:
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", ""]
    return "\n".join([*front, f"# {title}", "", *lines, ""])


def _base_model(config: Config) -> str:
    model = config.sft.model
    if isinstance(model, Path):
        return f"{model.name}, content SHA-256 `{model_content_id(model)}`"
    return (
        f"a new Llama: {model.num_hidden_layers} layers of width {model.hidden_size}, random "
        "weights"
    )


def _licence(config: Config) -> str:
    if isinstance(config.sft.model, Path):
        return (
            f"The licence of the base model, {config.sft.model.name}, applies to this model too: "
            "read it before you use or pass on these weights."
        )
    return "The weights were trained from scratch; no base model's licence applies."


def _expert(config: Config) -> str:
    expert = config.expert
    if expert.kind == "template":
        return "a grammar, no model"
    return expert.model.name if isinstance(expert.model, Path) else expert.model


def _data(run_dir: RunDir) -> str:
    counts = (read_manifest(run_dir, "dataset") or {}).get("counts", {})
    return (
        f"{counts.get('train', '?')} instruction-response pairs, "
        f"{counts.get('held_out', '?')} more held out"
    )


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
