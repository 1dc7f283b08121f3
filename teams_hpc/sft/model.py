"""The model that is fine-tuned: a new Llama of a given shape, or one from a folder."""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers import LlamaForCausalLM as Llama
from transformers.integrations import HfDeepSpeedConfig

from teams_hpc.config import Config, ModelShape
from teams_hpc.errors import WorkError
from teams_hpc.rewriting.identity import keyed_seed
from teams_hpc.sft.attention import Attention
from teams_hpc.sft.liger import apply_liger

VOCABULARY_MULTIPLE = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltModel:
    """A model on its way to `deepspeed.initialize`.

    Attributes:
        model: The causal model; its parameters are already divided if it was loaded for ZeRO-3.
        keep_alive: Must live until DeepSpeed has taken the model over.
    """

    model: Any
    keep_alive: object = None


def build_model(
    config: Config,
    tokenizer_folder: Path,
    vocab_size: int,
    attention: Attention,
    zero_config: dict[str, Any],
) -> BuiltModel:
    """Build or load the model, with equal weights in every process.

    Args:
        config: The run's configuration.
        tokenizer_folder: The tokenizer the data was packed with.
        vocab_size: One more than the largest token id in the data.
        attention: The attention to use.
        zero_config: DeepSpeed's configuration; at stage 3 a folder is loaded in parts.

    Raises:
        WorkError: The folder holds no model that fits, or Liger has no kernels for it.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    num_tokens = max(vocab_size, len(tokenizer))
    if isinstance(config.sft.model, ModelShape):
        built = BuiltModel(model=_new_llama(config, config.sft.model, tokenizer, num_tokens))
    else:
        built = _load_folder(config, config.sft.model, attention, zero_config)
        grow_vocabulary(built.model, num_tokens)
    model = built.model
    model.set_attn_implementation(attention)
    if config.sft.liger:
        apply_liger(model)
    model.config.use_cache = False
    # A resumed run could not repeat dropout's random numbers.
    model.config.attention_dropout = 0.0
    if config.sft.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return built


def _new_llama(config: Config, shape: ModelShape, tokenizer: Any, num_tokens: int) -> Any:
    rows = -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    values = shape.model_dump() | {"vocab_size": rows}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values[name] = getattr(tokenizer, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(config.seed, "sft-weights"))
        model = Llama(LlamaConfig(**values))
    return model.to(_DTYPES[config.sft.dtype])


def _load_folder(
    config: Config, folder: Path, attention: Attention, zero_config: dict[str, Any]
) -> BuiltModel:
    sft = config.sft
    try:
        longest = AutoConfig.from_pretrained(folder, local_files_only=True).max_position_embeddings
    except (OSError, ValueError, AttributeError) as error:
        raise WorkError(f"sft.model: {folder} is not a causal model's folder: {error}") from None
    if sft.sequence_length > longest:
        raise WorkError(
            f"sft.sequence_length: {sft.sequence_length} is more than the {longest} positions of "
            f"the model in {folder}; set it to {longest} or less"
        )
    # from_pretrained asks this object, by a weak reference, whether to divide parameters.
    alive = HfDeepSpeedConfig(zero_config) if sft.zero_stage == 3 else None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=_DTYPES[sft.dtype],
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise WorkError(f"sft.model: can't load the model in {folder}: {error}") from None
    return BuiltModel(model=model, keep_alive=alive)


def grow_vocabulary(model: Any, num_tokens: int) -> None:
    """Give the model at least `num_tokens` embeddings, if it has fewer.

    Rows are added up to a multiple of 64, each the mean of those that were there: a new token
    then starts as an average one.
    """
    old = model.config.vocab_size
    if num_tokens <= old:
        return
    rows = -(-num_tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    _log.info("the tokenizer has %d tokens, the model %d: growing to %d", num_tokens, old, rows)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = bool(model.config.tie_word_embeddings)
    embeddings.weight = _grown(embeddings.weight, rows)
    embeddings.num_embeddings = rows
    head.weight = embeddings.weight if is_tied else _grown(head.weight, rows)
    head.out_features = rows
    model.config.vocab_size = model.vocab_size = model.model.vocab_size = rows


def _grown(weight: torch.nn.Parameter, rows: int) -> torch.nn.Parameter:
    with gathered(weight), torch.no_grad():
        mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
        added = mean.expand(rows - weight.shape[0], -1)
        return torch.nn.Parameter(torch.cat([weight.detach().cpu(), added.cpu()]))


def gathered(weight: torch.nn.Parameter) -> AbstractContextManager[object]:
    """Make a parameter that ZeRO-3 divided whole, for reading, on every rank."""
    if not hasattr(weight, "ds_id"):
        return nullcontext()
    import deepspeed  # slow, and long there where a parameter has been divided

    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
        [weight], modifier_rank=None
    )
    return context
