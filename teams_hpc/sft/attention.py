"""Which attention is used, and the proof that packed sequences don't see each other."""

import importlib.util
import logging
from typing import Any

import numpy as np
import torch

from teams_hpc.config.schema import SftConfig
from teams_hpc.errors import WorkError
from teams_hpc.sft.data import Batch, PackedRows

_log = logging.getLogger(__name__)
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


def choose_attention(settings: SftConfig) -> str:
    """The attention implementation: the one named, or for `auto` the fastest that is there.

    Raises:
        WorkError: flash_attention_2 is named, but can't be had.
    """
    has_flash = importlib.util.find_spec("flash_attn") is not None
    has_gpu = torch.cuda.is_available()
    if settings.attention == "flash_attention_2" and not (has_flash and has_gpu):
        missing = "the package flash-attn (extra 'flash')" if not has_flash else "a CUDA GPU"
        raise WorkError(
            f"sft.attention=flash_attention_2 needs {missing}; install it or set sft.attention=sdpa"
        )
    if settings.attention != "auto":
        return settings.attention
    use_flash = has_flash and has_gpu and settings.dtype == "bfloat16"
    chosen = "flash_attention_2" if use_flash else "sdpa"
    _log.info("sft.attention=auto takes %s", chosen)
    return chosen


def _row_with_several(rows: PackedRows) -> int | None:
    """The first row that holds more than one sequence."""
    for row in range(len(rows)):
        sequences = rows.columns["sequence_ids"][row]
        if len(np.unique(sequences[sequences >= 0])) > 1:
            return row
    return None


@torch.no_grad()
def check_isolation(model: Any, rows: PackedRows, device: torch.device) -> float | None:
    """Compare a packed row with its sequences alone.

    Without a mask and without a cache, transformers keeps sequences apart by their position ids;
    both ways to get that wrong are silent, so it is checked before every training. Every rank
    takes part, because ZeRO-3 gathers parameters.

    Returns:
        Largest difference of a logit; None if no row holds two sequences.

    Raises:
        WorkError: They differ.
    """
    row = _row_with_several(rows)
    if row is None:
        return None
    sequences = rows.columns["sequence_ids"][row]
    names = [name for name in dict.fromkeys(sequences.tolist()) if name >= 0][:3]
    batch = rows.batch(np.array([row])).to(device)
    packed = _logits(model, batch)
    worst = 0.0
    for name in names:
        here = torch.from_numpy(np.flatnonzero(sequences == name)).to(device)
        length = len(here)
        alone = Batch(
            batch.input_ids[:, here],
            batch.labels[:, here],
            torch.arange(length, device=device)[None],
        )
        difference = (packed[:, here] - _logits(model, alone)).abs().max()
        worst = max(worst, float(difference))
    limit = _TOLERANCE[next(model.parameters()).dtype]
    if not worst <= limit:
        raise WorkError(
            f"packed sequences see each other: logits differ by {worst:.3g} (at most {limit} is "
            "allowed); this attention and this version of transformers can't train on packed rows"
        )
    return worst


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    output = model(input_ids=batch.input_ids, position_ids=batch.position_ids)
    return torch.as_tensor(output.logits).float()
