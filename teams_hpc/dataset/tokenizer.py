"""The tokenizer of the fine-tuned model: the model's own, or one trained on the data set."""

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from teams_hpc.config import ModelShape
from teams_hpc.dataset.templates import Row, alpaca_prompt
from teams_hpc.errors import WorkError
from teams_hpc.storage.atomic import fsync_folder, naming_disk_faults

_BOS, _EOS, _PAD = "<s>", "</s>", "<pad>"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTokenizer:
    """A tokenizer that is ready to pack with, saved beside the data set.

    Attributes:
        tokenizer: The Hugging Face tokenizer; it has an `eos` and a `pad` token.
        is_trained: Trained on this data set rather than taken from a model.
        pad_is_eos: It had no padding token of its own. Padding carries no loss, so `eos` will do.
    """

    tokenizer: Any
    is_trained: bool
    pad_is_eos: bool

    @property
    def pad_token_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return int(max(self.tokenizer.get_vocab().values())) + 1


def prepare_tokenizer(
    model: Path | ModelShape, rows: Iterable[Row], folder: Path
) -> PreparedTokenizer:
    """Load or train the tokenizer and save it to `folder`, replacing what is there.

    Args:
        model: `sft.model`: a Hugging Face folder, or the shape of a new model.
        rows: Training rows in plan order; read only if a tokenizer is trained.
        folder: Where it goes.

    Raises:
        WorkError: The model's folder has no tokenizer that loads, or it knows no end token.
    """
    if isinstance(model, ModelShape):
        tokenizer = _train(rows, model)
        prepared = PreparedTokenizer(tokenizer=tokenizer, is_trained=True, pad_is_eos=False)
    else:
        prepared = _load(model)
    with naming_disk_faults(folder):
        if folder.exists():
            shutil.rmtree(folder)
        prepared.tokenizer.save_pretrained(folder)
        _forget_the_loading(folder / "tokenizer_config.json")
        _make_durable(folder)
    return prepared


def _train(rows: Iterable[Row], shape: ModelShape) -> Any:
    """Byte-level BPE (Sennrich et al., 2016; bytes as in GPT-2): any text can be encoded.

    Its vocabulary is smaller than asked for where the data holds no more pairs to merge.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab_size,
        min_frequency=2,
        special_tokens=[_BOS, _EOS, _PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(rows), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, tokenizer.token_to_id(_BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_BOS,
        eos_token=_EOS,
        pad_token=_PAD,
        model_max_length=shape.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def _texts(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield alpaca_prompt(row.instruction, row.input) + row.response


def _load(model: Path) -> PreparedTokenizer:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, local_files_only=True, trust_remote_code=False
        )
    # A tokenizer.model without tokenizer.json needs packages that may be missing (ImportError).
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise WorkError(
            f"sft.model: can't load the tokenizer in {model}: {_first_line(error)}; "
            "the folder needs tokenizer.json and tokenizer_config.json"
        ) from None
    if tokenizer.eos_token_id is None:
        raise WorkError(
            f"sft.model: the tokenizer in {model} has no end token, so the model could never learn "
            "to stop; name one as eos_token in its tokenizer_config.json"
        )
    pad_is_eos = tokenizer.pad_token_id is None
    if pad_is_eos:
        _log.info("the tokenizer has no padding token; padding with its end token")
        tokenizer.pad_token = tokenizer.eos_token
    return PreparedTokenizer(tokenizer=tokenizer, is_trained=False, pad_is_eos=pad_is_eos)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _forget_the_loading(path: Path) -> None:
    """Drop what transformers notes about how a tokenizer was loaded: it isn't part of it."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(name, None)
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _make_durable(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    fsync_folder(folder)
