"""The loss of a model on every example of the packed data set."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from teams_hpc.errors import WorkError

_IGNORED = -100
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleLosses:
    """Loss of each example of one group, in the order of `rows`.

    Attributes:
        rows: Row of each example in `dataset.h5`, ascending.
        nll: Sum of negative log-likelihoods (nats) over response tokens.
        tokens: Response tokens.
    """

    rows: NDArray[np.int64]
    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def per_token(self) -> NDArray[np.float64]:
        """Mean loss of each example, nats a token."""
        return self.nll / self.tokens

    @property
    def mean(self) -> float | None:
        """Token mean over all examples; None without any."""
        return float(self.nll.sum() / self.tokens.sum()) if len(self.rows) else None


def device_and_dtype() -> tuple[str, torch.dtype]:
    """Where evaluation runs: bfloat16 on a GPU, float32 on a CPU."""
    return ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def load_model(folder: Path) -> Any:
    """Load a causal model for evaluation.

    Raises:
        WorkError: The folder holds no model that loads.
    """
    device, dtype = device_and_dtype()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise WorkError(f"can't load the model in {folder}: {error}") from None
    # Without a cache and without a mask, position ids keep packed sequences apart.
    model.config.use_cache = False
    return model.to(device).eval()


@torch.inference_mode()
def example_losses(
    model: Any,
    packed: Path,
    group: str,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> ExampleLosses:
    """Loss of every example of one group of `packed.h5`.

    Args:
        model: From `load_model`.
        packed: The packed data set.
        group: `train` or `held_out`.
        batch_size: Packed rows in one forward pass.
        on_batch: Told how many packed rows were done.
    """
    nll: dict[int, float] = {}
    tokens: dict[int, int] = {}
    with h5py.File(packed, "r", locking=False) as file:
        columns = [file[group][name] for name in _COLUMNS]
        for start in range(0, len(columns[0]), batch_size):
            batch = [torch.from_numpy(column[start : start + batch_size]) for column in columns]
            _add_batch(model, batch, nll, tokens)
            on_batch(len(batch[0]))
    rows = np.array(sorted(nll), dtype=np.int64)
    return ExampleLosses(
        rows=rows,
        nll=np.array([nll[row] for row in rows], dtype=np.float64),
        tokens=np.array([tokens[row] for row in rows], dtype=np.int64),
    )


_COLUMNS = ("input_ids", "labels", "position_ids", "sequence_ids")


def _add_batch(
    model: Any, batch: list[torch.Tensor], nll: dict[int, float], tokens: dict[int, int]
) -> None:
    input_ids, labels, position_ids, sequence_ids = (part.long() for part in batch)
    output = model(input_ids=input_ids.to(model.device), position_ids=position_ids.to(model.device))
    targets = labels[:, 1:].to(model.device)
    losses = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].float().transpose(1, 2),
        targets,
        ignore_index=_IGNORED,
        reduction="none",
    ).cpu()
    counted = labels[:, 1:] != _IGNORED
    for row, loss in zip(
        sequence_ids[:, 1:][counted].tolist(), losses[counted].double().tolist(), strict=True
    ):
        nll[row] = nll.get(row, 0.0) + loss
        tokens[row] = tokens.get(row, 0) + 1
