"""Checks of what a configuration points at, before anything is started or torch is loaded."""

import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from teams_hpc.config.schema import (
    Config,
    HttpEngineConfig,
    LocalEngineConfig,
    SftConfig,
    VllmEngineConfig,
)
from teams_hpc.errors import ConfigError

_ROLES = ("instructor", "reviewer", "expert")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def _model_folder_fault(key: str, folder: Path) -> str | None:
    if not folder.is_dir():
        return f"{key}: no model folder {folder}; download it there or set {key}=PATH"
    if not (folder / "config.json").is_file():
        return f"{key}: {folder} has no config.json; it must be a Hugging Face model folder"
    if not _is_json_object(folder / "config.json"):
        return f"{key}: {folder}/config.json is damaged: no JSON object; download it again"
    if not any(folder.glob("*.safetensors")):
        return f"{key}: {folder} has no *.safetensors; convert the weights to safetensors"
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return f"{key}: {folder} has no tokenizer ({' or '.join(_TOKENIZERS)}); put it there"
    return None


def _is_json_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def named_models(config: Config) -> Iterator[tuple[str, Path]]:
    """Dotted key and folder of each model that a run loads."""
    for role in _ROLES:
        engine = getattr(config, role)
        if isinstance(engine, LocalEngineConfig):
            yield f"{role}.model", engine.model
    if isinstance(config.sft.model, Path):
        yield "sft.model", config.sft.model


def named_data(config: Config) -> Iterator[tuple[str, Path]]:
    """Dotted key and path of each other file or folder that a run reads."""
    if config.seeds.path is not None:
        yield "seeds.path", config.seeds.path
    for number, path in enumerate(config.dataset.decontaminate):
        yield f"dataset.decontaminate.{number}", path
    if config.evaluate.lm_eval_path is not None:
        yield "evaluate.lm_eval_path", config.evaluate.lm_eval_path


def model_faults(config: Config) -> Iterator[str]:
    """Model folders that aren't there, or hold no model that can be loaded."""
    for key, folder in named_models(config):
        if fault := _model_folder_fault(key, folder):
            yield fault


def _key_faults(config: Config) -> Iterator[str]:
    for role in _ROLES:
        engine = getattr(config, role)
        if (
            isinstance(engine, HttpEngineConfig)
            and engine.api_key_env
            and not os.environ.get(engine.api_key_env)
        ):
            yield (
                f"{role}.api_key_env: the environment variable {engine.api_key_env} is not set; "
                "export it, or set the key to null for a server without one"
            )


def _flash_attention_fault(sft: SftConfig) -> str | None:
    if sft.attention != "flash_attention_2" or importlib.util.find_spec("flash_attn"):
        return None
    return (
        "sft.attention: flash_attention_2 needs the package flash-attn, which is not installed; "
        "install the extra 'flash', or set sft.attention=sdpa"
    )


def _liger_fault(sft: SftConfig) -> str | None:
    if not sft.liger or importlib.util.find_spec("liger_kernel"):
        return None
    return (
        "sft.liger: needs the package liger-kernel, which is not installed; install the extra "
        "'liger', or set sft.liger=false"
    )


def _positions_fault(sft: SftConfig, folder: Path) -> str | None:
    """Whether the rows are longer than the model reads; a new model's are checked by the schema."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        longest = int(content["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # another kind of model: its loading says more
    if sft.sequence_length <= longest:
        return None
    return (
        f"sft.sequence_length: {sft.sequence_length} is more than the {longest} positions of the "
        f"model in {folder}; set it to {longest} or less"
    )


def _file_faults(config: Config) -> Iterator[str]:
    if config.seeds.path is not None and not config.seeds.path.is_file():
        yield f"seeds.path: no file {config.seeds.path}"
    for path in config.dataset.decontaminate:
        if not path.is_file():
            yield f"dataset.decontaminate: no file {path}"
    if isinstance(config.sft.model, Path):
        fault = _positions_fault(config.sft, config.sft.model)
        if fault:
            yield fault
    if config.evaluate.lm_eval_path is not None and not config.evaluate.lm_eval_path.is_dir():
        yield f"evaluate.lm_eval_path: no folder {config.evaluate.lm_eval_path}"


def _executor_faults(config: Config) -> Iterator[str]:
    if config.site.executor == "slurm" and "SLURM_JOB_ID" not in os.environ:
        yield (
            "site.executor: is slurm, but this is not inside an allocation; use "
            "`teams-hpc submit`, start it with sbatch or salloc, or set site.executor=local"
        )


def _gpu_faults(config: Config) -> Iterator[str]:
    """Liger's kernels need GPUs; a model that vLLM splits, as many on its process's node."""
    available = config.site.gpus_per_node
    if config.sft.liger and not available:
        yield (
            "sft.liger: its kernels run on CUDA alone, but site.gpus_per_node is 0; set "
            "site.gpus_per_node, or sft.liger=false"
        )
    for role in _ROLES:
        engine = getattr(config, role)
        wanted = engine.tensor_parallel_size if isinstance(engine, VllmEngineConfig) else 0
        if wanted > max(1, available):
            yield (
                f"{role}.tensor_parallel_size: {wanted} GPUs, but a node has {available} here; "
                "lower it, or set site.gpus_per_node"
            )


def _place_faults(config: Config) -> Iterator[str]:
    existing = config.resolved_run_dir
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        yield f"run_dir: {existing} is a file, not a folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        yield f"run_dir: {existing} can't be written to; set run_dir=PATH to a folder of yours"


def _package_faults(config: Config) -> Iterator[str]:
    for fault in (_flash_attention_fault(config.sft), _liger_fault(config.sft)):
        if fault:
            yield fault
    for role in _ROLES:
        is_vllm = isinstance(getattr(config, role), VllmEngineConfig)
        if is_vllm and not importlib.util.find_spec("vllm"):
            yield (
                f"{role}.kind: vllm needs the package vllm, which is not installed; install the "
                "extra 'vllm', or use transformers or http"
            )
    if config.evaluate.lm_eval_tasks and not importlib.util.find_spec("lm_eval"):
        yield "evaluate.lm_eval_tasks: needs the package lm-eval; install the extra 'eval'"


def input_faults(config: Config, *, elsewhere: bool = False) -> list[str]:
    """Everything `config` names that isn't there, one line each; empty if all is well.

    Args:
        config: What is to be run.
        elsewhere: It runs in jobs of its own, and its packages may be in a container.
    """
    checks = (_file_faults, model_faults, _key_faults, _gpu_faults, _place_faults)
    faults = [fault for check in checks for fault in check(config)]
    if not elsewhere:
        faults += _executor_faults(config)
    if not (elsewhere and config.site.container):
        faults += _package_faults(config)
    return faults


def refuse_faults(faults: Sequence[str]) -> None:
    """Refuse to start if there are any faults.

    Raises:
        ConfigError: With the first ten at once.
    """
    if faults:
        raise ConfigError("\n".join(["can't start:", *(f"  {fault}" for fault in faults[:10])]))
