"""Building or loading the model to be trained, and writing the one that was."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from teams_hpc.config import Config, ModelShape
from teams_hpc.errors import WorkError
from teams_hpc.rewriting.identity import keyed_seed
from teams_hpc.storage.atomic import fsync_folder
from teams_hpc.storage.run_dir import RunDir

_MULTIPLE = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(run_dir: RunDir) -> Any:
    """The tokenizer the data set was packed with."""
    return AutoTokenizer.from_pretrained(run_dir.tokenizer, local_files_only=True)


def _padded(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE


def build_model(config: Config, shape: ModelShape, tokenizer: Any, attention: str) -> Any:
    """A new Llama; its weights are a function of `seed` alone, on every rank alike."""
    settings = LlamaConfig(
        **shape.model_dump(exclude={"vocab_size"}),
        vocab_size=_padded(len(tokenizer)),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=attention,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(config.seed, "model"))
        model = LlamaForCausalLM(settings)
    return model


def load_model(config: Config, folder: Path, tokenizer: Any, attention: str) -> Any:
    """A Llama from a folder; under `HfDeepSpeedConfig` each rank keeps its shard alone.

    Raises:
        WorkError: It does not load, or its positions are too few.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[config.sft.dtype],
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise WorkError(f"sft.model: can't load {folder}: {error}") from None
    longest = model.config.max_position_embeddings
    if config.sft.sequence_length > longest:
        raise WorkError(
            f"sft.sequence_length={config.sft.sequence_length} is more than the {longest} "
            f"positions of {folder}"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=_MULTIPLE)
    model.config.use_cache = False
    return model


def publish_folder(temporary: Path, folder: Path) -> None:
    """Give a folder its name, durably; what had the name before goes."""
    for path in temporary.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    fsync_folder(folder.parent)


def save_model(model: Any, tokenizer: Any, weights: Any, folder: Path, card: str) -> None:
    """Write a Hugging Face folder: safetensors, configuration, tokenizer and model card.

    Args:
        model: Whose configuration it is.
        tokenizer: Goes along.
        weights: State dict to write, or None for the model's own.
        folder: Appears whole or not at all.
        card: Text of its README.md.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.config.use_cache = True
    model.save_pretrained(temporary, state_dict=weights, safe_serialization=True)
    model.config.use_cache = False
    tokenizer.save_pretrained(temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    publish_folder(temporary, folder)
