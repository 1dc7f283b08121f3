"""Loading a local Llama-family folder, and saying clearly why one doesn't load."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from teams_hpc.config.schema import TransformersEngineConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.slots import ATTENTION

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_OPTIONS = {"local_files_only": True, "trust_remote_code": False}
_WHAT_IT_TAKES = "it must hold config.json, a tokenizer and all weights as safetensors"


def find_device(wanted: str) -> torch.device:
    """The device that `auto`, `cpu` or `cuda` means here.

    Raises:
        EngineError: There is no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise EngineError("device is cuda, but torch sees no GPU; set device to auto or cpu")
    return torch.device("cuda" if has_gpu and wanted != "cpu" else "cpu")


@contextmanager
def enough_memory(config: TransformersEngineConfig) -> Iterator[None]:
    """Turn running out of memory, which torch tells in several ways, into one message."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and "can't allocate memory" not in str(error):
            raise
        raise EngineError(
            f"out of memory with {config.model} at batch_size={config.batch_size}; lower "
            "batch_size, or use bfloat16 or a smaller model"
        ) from None


@contextmanager
def _naming_faults(folder: Path) -> Iterator[None]:
    """Turn what loading a folder raises into one message."""
    if not folder.is_dir():
        raise EngineError(f"{folder} is no folder; {_WHAT_IT_TAKES}")
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EngineError(
            f"can't load the model in {folder}: {reason} ({_WHAT_IT_TAKES})"
        ) from None


def load_model(config: TransformersEngineConfig, device: torch.device) -> tuple[Any, Any]:
    """Tokenizer and model, ready for inference; code that a folder brings along is never run.

    Raises:
        EngineError: The folder holds no whole model.
    """
    with _naming_faults(config.model), enough_memory(config):
        tokenizer = AutoTokenizer.from_pretrained(config.model, **_OPTIONS)
        model, found = AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=_DTYPES[config.dtype],
            use_safetensors=True,
            attn_implementation=ATTENTION,
            output_loading_info=True,
            **_OPTIONS,
        )
        model = model.to(device).eval()
    # transformers gives tensors that are not there random values.
    missing = sorted(found["missing_keys"])
    if missing:
        raise EngineError(
            f"{config.model} lacks {len(missing)} weights, among them {missing[0]}; "
            f"{_WHAT_IT_TAKES}"
        )
    return tokenizer, model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        EngineError: The folder holds none that loads.
    """
    with _naming_faults(folder):
        return AutoTokenizer.from_pretrained(folder, **_OPTIONS)


def stop_ids(tokenizer: Any, generation_config: Any, folder: Path) -> frozenset[int]:
    """Tokens that end a reply: those of the tokenizer and of the generation config.

    Raises:
        EngineError: There is none.
    """
    found: set[int] = set()
    for ids in (tokenizer.eos_token_id, generation_config.eos_token_id):
        if ids is not None:
            found.update(ids if isinstance(ids, list) else [ids])
    if not found:
        raise EngineError(f"{folder} names no end-of-text token; add it to its config")
    return frozenset(found)


def folder_stop_ids(tokenizer: Any, folder: Path) -> frozenset[int]:
    """`stop_ids` of a model that isn't loaded here.

    Raises:
        EngineError: The folder names none.
    """
    with _naming_faults(folder):
        if (folder / "generation_config.json").is_file():
            settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
        else:
            config = AutoConfig.from_pretrained(folder, **_OPTIONS)
            settings = GenerationConfig.from_model_config(config)
    return stop_ids(tokenizer, settings, folder)


def pad_id(tokenizer: Any, model: Any, stops: frozenset[int]) -> int:
    """A token to pad with: any would do, since padding is masked, but it must have an embedding."""
    own: int | None = tokenizer.pad_token_id
    has_embedding = own is not None and own < model.get_input_embeddings().num_embeddings
    return own if own is not None and has_embedding else min(stops)


def longest_sequence(model: Any) -> int:
    """Positions a sequence may have; within a sliding window, where that is narrower.

    Raises:
        EngineError: Some layers aren't attention, so that their state has no positions.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise EngineError(f"{config.model_type} is no Llama-family model: it has {sorted(kinds)}")
    limits = [int(config.max_position_embeddings)]
    window: int | None = getattr(config, "sliding_window", None)
    if window is not None and kinds != {"full_attention"}:
        limits.append(window)
    return min(limits)
