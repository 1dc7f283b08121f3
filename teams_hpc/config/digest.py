"""What decides a stage's output, as a flat mapping and as one SHA-256 over it.

Left out on purpose: where a run works and how hard it tries (`site`, `budget`, retries, time-outs,
micro batch, offload, checkpoint intervals, the point within a fixed schedule where training
stops). Files and models count by their content, never by their path.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from teams_hpc.config.schema import Config

Inputs = dict[str, Any]

_ROLES = ("instructor", "reviewer", "expert")

_WHERE_AND_HOW_HARD = frozenset(
    {
        *(
            f"{role}.{key}"
            for role in _ROLES
            for key in (
                "device",
                "base_url",
                "api_key_env",
                "max_concurrency",
                "timeout_s",
                "max_retries",
                "tensor_parallel_size",
                "gpu_memory_utilization",
            )
        ),
        "generate.retry_failed",
        "sft.micro_batch_rows",
        "sft.offload_optimizer",
        "sft.offload_parameters",
        "sft.sub_group_size",
        "sft.checkpoint_interval_steps",
        "sft.keep_checkpoints",
        "sft.eval_interval_steps",
        "sft.max_steps",
        "sft.peak_tflops",
        "evaluate.batch_size",
    }
)

_SELECTION_KEYS = ("policy.num_eval_episodes", "policy.num_bootstrap")

# Dotted prefixes of the keys each stage's own output depends on; what comes from other stages
# enters as the digest of their manifests (see `pipeline.py`).
STAGE_KEYS: dict[str, tuple[str, ...]] = {
    "policy": ("seed", "seeds", "instructor", "reviewer", "policy"),
    "select": _SELECTION_KEYS,
    "generate": ("seed", "seeds", "reviewer", "expert", "generate"),
    "dataset": ("seed", "dataset", "sft.model", "sft.sequence_length"),
    "sft": ("seed", "sft"),
    "evaluate": ("seed", "evaluate"),
}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_content_id(folder: Path) -> str:
    """Identity of a model folder: SHA-256 over names and bytes of its files.

    Only what decides the model's output counts: JSON, safetensors, tokenizer models, chat template.
    """
    whole = hashlib.sha256()
    suffixes = {".json", ".safetensors", ".model", ".jinja", ".txt"}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in suffixes:
            state = path.stat()
            digest = _remembered_digest(path.resolve(), state.st_size, state.st_mtime_ns)
            whole.update(f"{path.name}\0{digest}\n".encode())
    return whole.hexdigest()


def _tree_content_id(folder: Path) -> str:
    """SHA-256 over names and bytes of all files of a folder that is no model."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            whole.update(f"{path.relative_to(folder)}\0{file_digest(path)}\n".encode())
    return whole.hexdigest()


@functools.cache
def _remembered_digest(path: Path, size: int, modified_ns: int) -> str:
    """A model is read once in a process, unless it changes."""
    return file_digest(path)


def _flatten(value: Any, prefix: str = "") -> Inputs:
    if isinstance(value, dict):
        flat: Inputs = {}
        for key, item in value.items():
            flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value}


def _content(value: Any) -> Any:
    """Replace a path by what stands there."""
    if isinstance(value, tuple | list):
        return [_content(item) for item in value]
    if not isinstance(value, Path):
        return value
    if value.is_dir():
        is_model = (value / "config.json").is_file()
        return f"folder:{model_content_id(value) if is_model else _tree_content_id(value)}"
    return f"file:{file_digest(value)}" if value.is_file() else f"missing:{value}"


def stage_inputs(config: Config, stage: str) -> Inputs:
    """The keys, with values, that decide what `stage` makes, without those of other stages."""
    flat = _flatten(config.model_dump())
    chosen = {
        key: _content(value)
        for key, value in flat.items()
        if key not in _WHERE_AND_HOW_HARD
        and any(key == prefix or key.startswith(f"{prefix}.") for prefix in STAGE_KEYS[stage])
    }
    chosen = _without_idle_threads(chosen)
    if stage == "policy":
        unused = {*_SELECTION_KEYS, *_unused_policy_keys(config)}
        return {key: value for key, value in chosen.items() if key not in unused}
    return chosen


def _without_idle_threads(inputs: Inputs) -> Inputs:
    """With null for the threads of engines that aren't `fixed`: any number is as good there."""
    idle = [f"{role}.threads" for role in _ROLES if inputs.get(f"{role}.batching") != "fixed"]
    return {**inputs, **{key: None for key in idle if key in inputs}}


def _unused_policy_keys(config: Config) -> list[str]:
    """Keys that decide nothing here; so runs begun before there were such keys go on."""
    unused = [] if config.policy.variants else ["policy.variants"]
    return unused if config.policy.uses_embedding else [*unused, "policy.embedding_size"]


def inputs_digest(inputs: Inputs) -> str:
    """SHA-256 over the canonical JSON of stage inputs."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_keys(old: Inputs, new: Inputs) -> list[str]:
    """Dotted keys whose values differ between two sets of inputs, if only in what they decide."""
    old, new = _without_idle_threads(old), _without_idle_threads(new)
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
