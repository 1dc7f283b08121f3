"""Which attention is used, and whether it keeps the sequences of a packed row apart.

Packed sequences are told apart by their position ids alone: an attention mask or a key-value cache
would switch that off without a word (facts of transformers 5.23). Hence the check at the start.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.utils import is_flash_attn_2_available

from teams_hpc.config.schema import SftConfig
from teams_hpc.errors import WorkError
from teams_hpc.sft.data import Batch, PackedRows

Attention = Literal["flash_attention_2", "sdpa"]
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits (rows, length, vocabulary) of token ids and position ids, both (rows, length)."""

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
_SEARCHED_ROWS = 256
_CHECKED_ROWS = 2
_CHECKED_SEQUENCES = 3
_log = logging.getLogger(__name__)


def choose_attention(sft: SftConfig, device: str) -> Attention:
    """The attention to use; `auto` takes flash attention where it can run.

    Raises:
        WorkError: `flash_attention_2` was asked for by name and can't run here.
    """
    lacking = _lacking_for_flash(sft, device)
    if sft.attention == "sdpa" or (sft.attention == "auto" and lacking):
        if lacking and sft.attention == "auto":
            _log.info("sft.attention: auto takes sdpa, because %s", lacking)
        return "sdpa"
    if lacking:
        raise WorkError(
            f"sft.attention: flash_attention_2 can't be used, because {lacking}; "
            "mend that, or set sft.attention=sdpa"
        )
    _log.info("sft.attention: %s takes flash_attention_2", sft.attention)
    return "flash_attention_2"


def _lacking_for_flash(sft: SftConfig, device: str) -> str | None:
    if device != "cuda":
        return "there is no CUDA device"
    if not is_flash_attn_2_available():
        return "the package flash-attn is not installed (extra 'flash')"
    if sft.dtype == "float32":
        return "sft.dtype is float32 and flash attention computes in bfloat16 only"
    return None


def packed_logits(
    model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor, attention: Attention
) -> torch.Tensor:
    """Logits of packed rows, sequence by sequence.

    Flash attention looks at position ids only where there is a single row (transformers 5.23), so
    rows are joined to one for it.

    Args:
        model: A causal model or DeepSpeed engine.
        input_ids: Tokens, int64 (rows, length).
        position_ids: Positions, int64 (rows, length).
        attention: What the model was built with.

    Returns:
        Logits, (rows, length, vocabulary).
    """
    shape = input_ids.shape
    if attention == "flash_attention_2":
        input_ids, position_ids = input_ids.view(1, -1), position_ids.view(1, -1)
    logits: torch.Tensor = model(
        input_ids=input_ids, position_ids=position_ids, use_cache=False
    ).logits
    return logits.view(*shape, -1)


def check_isolation(forward: Forward, packed: PackedRows, dtype: str) -> float:
    """Compare packed rows with their sequences one at a time.

    Args:
        forward: The model as it is trained.
        packed: Rows to take the most crowded from.
        dtype: `float32` or `bfloat16`, what the model computes in.

    Returns:
        Largest difference of two logits; 0.0 where no row holds two sequences.

    Raises:
        WorkError: Sequences see each other; training on them would be wrong.
    """
    batch = _crowded_rows(packed)
    together = forward(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids))
    differences, scales = [0.0], [0.0]
    for row in range(len(batch)):
        for start, stop in _sequence_bounds(batch.sequence_ids[row])[:_CHECKED_SEQUENCES]:
            alone = forward(
                torch.from_numpy(batch.input_ids[row : row + 1, start:stop]),
                torch.from_numpy(batch.position_ids[row : row + 1, start:stop]),
            )
            there = together[row, start:stop].float()
            differences.append(float((there - alone[0].float()).abs().max()))
            scales.append(float(alone.abs().max()))
    # numpy's maximum is NaN if anything is; Python's depends on the order.
    difference, scale = float(np.max(differences)), float(np.max(scales))
    if not difference <= _TOLERANCE[dtype] * max(scale, 1e-6):
        raise WorkError(
            f"sft.attention: sequences packed into one row see each other: their logits differ by "
            f"{difference:.3g} from those of the same sequences alone (largest logit {scale:.3g}); "
            "training on them would be wrong. Set sft.attention=sdpa, and use the versions of "
            "torch and transformers that pyproject.toml names"
        )
    _log.info("packed sequences are kept apart: logits differ by at most %.3g", difference)
    return difference


def _crowded_rows(packed: PackedRows) -> Batch:
    """The rows with the most sequences among the first, most crowded first."""
    batch = packed.read(np.arange(min(len(packed), _SEARCHED_ROWS)))
    crowd = np.array([len(_sequence_bounds(ids)) for ids in batch.sequence_ids])
    return packed.read(np.argsort(-crowd, kind="stable")[:_CHECKED_ROWS])


def _sequence_bounds(sequence_ids: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Start and end of each sequence of one row, padding left out."""
    edges = np.flatnonzero(np.diff(sequence_ids)) + 1
    bounds = zip([0, *edges.tolist()], [*edges.tolist(), len(sequence_ids)], strict=True)
    return [(start, stop) for start, stop in bounds if sequence_ids[start] >= 0]
