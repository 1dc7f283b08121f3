"""Liger's fused GPU kernels in place of the model's norms, rotary angles and MLP, and for the loss.

They compute the same with fewer passes over memory, and keep less of it. Written in Triton: they
run on CUDA alone.
"""

import importlib.util
import logging
from typing import Any

import torch

from teams_hpc.config.schema import SftConfig
from teams_hpc.errors import WorkError
from teams_hpc.sft.data import IGNORED

_log = logging.getLogger(__name__)


def check_liger(sft: SftConfig, device: str) -> None:
    """Refuse `sft.liger` where its kernels can't run; they are never left out without a word.

    Raises:
        WorkError: There is no CUDA device, or the package is missing.
    """
    if not sft.liger:
        return
    lacking = None
    if device != "cuda":
        lacking = "there is no CUDA device"
    elif importlib.util.find_spec("liger_kernel") is None:
        lacking = "the package liger-kernel is not installed (extra 'liger')"
    if lacking:
        raise WorkError(
            f"sft.liger: can't be used, because {lacking}; mend that, or set sft.liger=false"
        )


def apply_liger(model: Any) -> None:
    """Let a Llama, before DeepSpeed takes it over, compute with Liger's kernels.

    Models made later in this process get them too: Liger puts its own classes into transformers.

    Raises:
        WorkError: It is no Llama.
    """
    if model.config.model_type != "llama":
        raise WorkError(
            f"sft.liger: is for Llama models, and this one is {model.config.model_type}; "
            "set sft.liger=false"
        )
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # needs Triton

    apply_liger_kernel_to_llama(
        rope=True,
        rms_norm=True,
        swiglu=True,
        # The loss is ours, from logits: it is a sum over this step's tokens.
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=model,
    )
    _log.info("sft.liger: norms, rotary angles, MLP and loss are Liger's")


def liger_loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As `token_loss_sum`; the gradient takes the place of the logits, so that they are spent.

    Args:
        logits: (rows, length, vocabulary).
        targets: int64 (rows, length), already shifted.
    """
    from liger_kernel.transformers.functional import liger_cross_entropy  # needs Triton

    loss: torch.Tensor = liger_cross_entropy(
        # Liger sums losses in the type of the logits: in bfloat16 three digits would be left.
        logits.flatten(0, 1).float(),
        targets.flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
    return loss
