"""The DeepSpeed engine, as far as it is used: one optimizer step, a mean loss, save and load."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teams_hpc.config import Config
from teams_hpc.errors import WorkError
from teams_hpc.sft.attention import Attention, packed_logits
from teams_hpc.sft.data import IGNORED, Batch, PackedRows
from teams_hpc.sft.deepspeed_config import plan_batch
from teams_hpc.sft.liger import liger_loss_sum
from teams_hpc.sft.model import BuiltModel
from teams_hpc.sft.reshaping import TAG, repair_universal_load
from teams_hpc.sft.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step says of itself.

    Attributes:
        loss: Mean over the response tokens of the step, before the update; nats a token.
        grad_norm: Before clipping.
    """

    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def token_loss_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of negative log-likelihoods (nats) of the targets that aren't `IGNORED`.

    Args:
        logits: (rows, length, vocabulary).
        targets: int64 (rows, length), already shifted.
    """
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters that decay (matrices) and those that don't (norms, biases)."""
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for parameter in model.parameters():
        # A parameter that ZeRO-3 divided keeps its real shape in ds_shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        groups[len(shape) >= 2].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


class ZeroEngine:
    """A model being trained with ZeRO; every method is called by all processes together.

    Args:
        built: The model; it belongs to the engine from now on.
        config: The run's configuration.
        zero_config: DeepSpeed's configuration.
        world: The processes.
        attention: What the model was built with.
    """

    def __init__(
        self,
        built: BuiltModel,
        config: Config,
        zero_config: dict[str, Any],
        world: World,
        attention: Attention,
    ) -> None:
        import deepspeed  # slow, and it reads the environment that joined_world sets

        optimizer = torch.optim.AdamW(
            parameter_groups(built.model, config.sft.weight_decay),
            lr=config.sft.learning_rate,
            fused=world.device == "cuda",
        )
        self._groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self._engine, *_ = deepspeed.initialize(
            model=built.model, optimizer=optimizer, config=zero_config
        )
        self._world = world
        self._attention = attention
        self._loss = liger_loss_sum if config.sft.liger else token_loss_sum
        self._zero_stage = config.sft.zero_stage
        self._micro_rows = plan_batch(config.sft, world.size).micro_rows

    @property
    def model(self) -> Any:
        """The causal model; at stage 3 its parameters are divided."""
        return self._engine.module

    def step(self, batch: Batch, loss_tokens: float, learning_rate: float) -> StepResult:
        """Accumulate over this process's rows and update.

        The gradient is that of the mean over all tokens of the step: each sum is divided by their
        number, and multiplied by the number of processes because DeepSpeed averages over them.

        Args:
            batch: This process's rows of the step.
            loss_tokens: Tokens with loss of the whole step, over all processes.
            learning_rate: Rate of this update.
        """
        self._engine.train()
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        for micro in self._pieces(batch):
            sum_of_losses = self._loss_sum(micro)
            scale = self._world.size / max(loss_tokens, 1.0)
            self._engine.backward(sum_of_losses * scale, scale_wrt_gas=False)
            self._engine.step()
            total += sum_of_losses.detach()  # stays on the device: nothing waits for it here
        norm = self._engine.get_global_grad_norm()
        (loss_sum,) = self._world.sum(float(total))
        return StepResult(loss=loss_sum / max(loss_tokens, 1.0), grad_norm=float(norm or 0.0))

    def mean_loss(self, rows: PackedRows) -> float | None:
        """Mean loss over all response tokens of `rows`, nats a token; None without any.

        Each process takes every so-manieth row. All make the same number of passes, because
        parameters are gathered from all of them; a process without rows left passes again over
        one that doesn't count.
        """
        own = np.arange(self._world.ranks.rank, len(rows), self._world.size)
        most = math.ceil(len(rows) / self._world.size)
        total = tokens = 0.0
        with self._evaluating():
            for start in range(0, most, self._micro_rows):
                chosen = own[start : start + self._micro_rows]
                batch = rows.read(chosen) if len(chosen) else rows.read([0]).without_loss()
                total += float(self._loss_sum(batch))
                tokens += batch.num_loss_tokens
        total, tokens = self._world.sum(total, tokens)
        return total / tokens if tokens else None

    def logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Logits as in training, on the CPU: (rows, length, vocabulary)."""
        with self._evaluating():
            return packed_logits(
                self._engine, self._put(input_ids), self._put(position_ids), self._attention
            ).cpu()

    def save(self, folder: Path) -> None:
        """Write all there is to go on from, each process its part.

        Raises:
            WorkError: The file system refuses it.
        """
        try:
            self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        except RuntimeError as error:
            if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
                raise
            raise WorkError(
                f"can't write a checkpoint to {folder.parent}: {error}; is the disk full? "
                "Make room and run again"
            ) from error

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote, or what was made of it; only right after this was made.

        Raises:
            WorkError: DeepSpeed doesn't find its state there.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise WorkError(f"DeepSpeed finds no state in {folder}; remove that folder")
        if self._engine.load_universal_checkpoint() and self._zero_stage == 3:
            repair_universal_load(self._engine.optimizer.optimizer, self._groups)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All weights, whole, on the CPU: on the first process; the others get {}."""
        if self._zero_stage == 3:
            # The name is historical: the weights keep the type they are trained in.
            return self._engine._zero3_consolidated_16bit_state_dict() or {}
        if not self._world.is_first:
            return {}
        return {name: value.detach().cpu() for name, value in self.model.state_dict().items()}

    def _pieces(self, batch: Batch) -> Iterator[Batch]:
        for start in range(0, len(batch), self._micro_rows):
            yield batch.part(start, start + self._micro_rows)

    def _loss_sum(self, batch: Batch) -> torch.Tensor:
        logits = packed_logits(
            self._engine,
            self._put(torch.from_numpy(batch.input_ids)),
            self._put(torch.from_numpy(batch.position_ids)),
            self._attention,
        )
        return self._loss(logits, self._put(torch.from_numpy(batch.targets)))

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._world.device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._engine.eval()
        with torch.no_grad():
            yield
