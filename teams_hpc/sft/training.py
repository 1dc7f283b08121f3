"""The stage `sft`: one supervised fine-tuning over packed rows with raw DeepSpeed."""

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from teams_hpc.config import Config, ModelShape
from teams_hpc.config.digest import file_digest
from teams_hpc.errors import CorruptFileError, StopRequested, WorkError
from teams_hpc.runtime.metrics import Progress, append_metrics, read_metrics
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.runtime.ranks import Ranks, read_ranks
from teams_hpc.sft.attention import check_isolation, choose_attention
from teams_hpc.sft.checkpointing import (
    load_checkpoint,
    newest_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from teams_hpc.sft.data import IGNORED, Batch, PackedRows, rows_of_step
from teams_hpc.sft.deepspeed_config import BatchShape, batch_shape, deepspeed_config
from teams_hpc.sft.distributed import device_kind, distributed, import_deepspeed
from teams_hpc.sft.model import build_model, load_model, load_tokenizer, save_model
from teams_hpc.sft.model_card import model_card
from teams_hpc.sft.schedule import learning_rate, schedule_steps
from teams_hpc.storage.atomic import read_json, write_text
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest

_log = logging.getLogger(__name__)


def train(run_dir: RunDir, config: Config, index: int, stop: StopFlag) -> None:
    """Train to `sft.max_steps` (or the end of the schedule) as one rank of a world.

    Args:
        run_dir: The run; `dataset` must be done.
        config: Its configuration.
        index: Not used: the rank comes from the launcher's environment.
        stop: Ranks agree on it after every step.

    Raises:
        UsageError: The world size doesn't fit the global batch or the checkpoint.
        WorkError: The model doesn't load, packed sequences mix, the loss is not a number, or
            memory ran out.
        StopRequested: Asked to stop; all ranks have saved the same checkpoint.
    """
    ranks = read_ranks()
    batch_shape(config, ranks.world_size)
    rows = PackedRows(run_dir.packed_rows, "train")
    if not len(rows):
        raise WorkError(f"{run_dir.packed_rows} has no rows to train on")
    total = schedule_steps(config.sft, len(rows))
    target = min(config.sft.max_steps or total, total)
    manifest = read_manifest(run_dir, "sft")
    if manifest is not None and manifest["steps"] >= target:
        return
    with distributed(ranks) as device:
        try:
            trainer = _start(run_dir, config, ranks, device, rows, total)
            trainer.train(target, stop)
            trainer.finish(target)
        except torch.cuda.OutOfMemoryError as error:
            raise WorkError(
                f"out of GPU memory ({error}); lower sft.micro_batch_rows or "
                "sft.sequence_length, or set sft.activation_checkpointing, sft.offload_optimizer "
                "or sft.offload_parameters to true"
            ) from None


def _parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms and biases don't."""
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    # Under ZeRO-3 a parameter's own shape is empty until gathered; `ds_shape` is the real one.
    sizes = [len(getattr(value, "ds_shape", value.shape)) for _, value in named]
    decayed = [value for (_, value), size in zip(named, sizes, strict=True) if size > 1]
    plain = [value for (_, value), size in zip(named, sizes, strict=True) if size <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


def _start(
    run_dir: RunDir,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    rows: PackedRows,
    total: int,
) -> "_Trainer":
    """Build everything, put the newest checkpoint back, and prove that packing is sound."""
    settings = config.sft
    attention = choose_attention(settings)
    tokenizer = load_tokenizer(run_dir)
    ds_config = deepspeed_config(config, ranks.world_size, device_kind())
    keep_alive: Any = None
    if isinstance(settings.model, ModelShape):
        model = build_model(config, settings.model, tokenizer, attention)
        if ranks.is_first and not run_dir.base_model.exists():
            save_model(model, tokenizer, None, run_dir.base_model, "Untrained weights.\n")
    else:
        if settings.zero_stage == 3:
            from transformers.integrations import HfDeepSpeedConfig

            keep_alive = HfDeepSpeedConfig(ds_config)
        model = load_model(config, settings.model, tokenizer, attention)
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        fused=device.type == "cuda" and not settings.offload_optimizer,
    )
    engine, *_ = import_deepspeed().initialize(
        model=model, optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    trainer = _Trainer(
        run_dir=run_dir,
        config=config,
        ranks=ranks,
        device=device,
        rows=rows,
        held_out=PackedRows(run_dir.packed_rows, "held_out"),
        shape=batch_shape(config, ranks.world_size),
        total=total,
        engine=engine,
        tokenizer=tokenizer,
        attention=attention,
        digest=read_json(run_dir.inputs("sft"))["digest"],
        keep_alive=keep_alive,
    )
    trainer.resume()
    difference = check_isolation(engine.module, rows, device)
    if difference is not None and ranks.is_first:
        _log.info("packed sequences are apart: logits differ by at most %.2g", difference)
    return trainer


@dataclass(slots=True, kw_only=True)
class _Trainer:
    run_dir: RunDir
    config: Config
    ranks: Ranks
    device: torch.device
    rows: PackedRows
    held_out: PackedRows
    shape: BatchShape
    total: int
    engine: Any
    tokenizer: Any
    attention: str
    digest: str
    keep_alive: Any
    step: int = 0
    _progress: Progress = field(init=False)
    _note: str = ""

    def __post_init__(self) -> None:
        path = self.run_dir.progress("sft")
        self._progress = Progress(path, unit="steps", enabled=self.ranks.is_first)

    def resume(self) -> None:
        """Go back to the newest checkpoint, if there is one."""
        if self.ranks.is_first:
            remove_unfinished(self.run_dir.checkpoints)
        checkpoint = newest_checkpoint(self.run_dir.checkpoints, self.digest)
        if checkpoint is not None:
            load_checkpoint(self.engine, checkpoint, self.ranks)
            self.step = checkpoint.step
            if self.ranks.is_first:
                _log.info("continuing after step %d", self.step)
        if self.ranks.is_first:
            path = self.run_dir.sft / "metrics.jsonl"
            known = [line for line in read_metrics(path) if line["step"] <= self.step > 0]
            write_text(path, "".join(f"{json.dumps(line)}\n" for line in known))
        dist.barrier()

    def train(self, target: int, stop: StopFlag) -> None:
        """Take optimizer steps up to `target`."""
        settings = self.config.sft
        self._progress.update(self.step, target)
        if self.step == 0:
            self._evaluate()
        while self.step < target:
            self._train_step()
            is_last = self.step == target
            if is_last or self.step % settings.eval_interval_steps == 0:
                self._evaluate()
            wants_stop = self._anyone(stop.is_set)
            if is_last or wants_stop or self.step % settings.checkpoint_interval_steps == 0:
                self._save()
            self._progress.update(self.step, target, self._note)
            if wants_stop and not is_last:
                raise StopRequested(
                    f"stopped on {stop.reason or 'another rank'} after {self.step} of {target} "
                    "steps; run again to go on"
                )

    def _anyone(self, flag: bool) -> bool:
        """Whether the flag is set on any rank: all get the same answer."""
        value = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def _micro_batches(self, rows: NDArray[np.int64]) -> Iterator[Batch]:
        """This rank's share of one optimizer step."""
        mine = rows[self.ranks.rank :: self.ranks.world_size]
        for start in range(0, len(mine), self.shape.micro_batch_rows):
            batch = self.rows.batch(mine[start : start + self.shape.micro_batch_rows])
            yield batch.to(self.device)

    def _train_step(self) -> None:
        begin = time.monotonic()
        settings = self.config.sft
        self.engine.train()
        rate = learning_rate(settings, self.step, self.total)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        rows = rows_of_step(len(self.rows), settings.global_batch_rows, self.step, self.config.seed)
        num_targets = max(1, self.rows.num_targets(rows))
        # DeepSpeed averages over ranks and micro batches; this makes it the mean over tokens.
        scale = self.shape.world_size * self.shape.accumulation / num_targets
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self._micro_batches(rows):
            loss = loss_sum(self.engine, batch)
            total += loss.detach().double()
            self.engine.backward(loss * scale)
            self.engine.step()
        dist.all_reduce(total)
        mean = float(total) / num_targets
        if not math.isfinite(mean):
            raise WorkError(
                f"the loss of step {self.step + 1} is {mean}; the last checkpoint is kept; lower "
                "sft.learning_rate or look at the rows of that step"
            )
        self.step += 1
        self._note = f"loss {mean:.3f}"
        norm = self.engine.get_global_grad_norm()
        tokens = settings.global_batch_rows * self.rows.length
        self._append(
            {
                "loss": mean,
                "lr": rate,
                "grad_norm": None if norm is None else float(norm),
                "tokens": tokens,
                "tokens_per_s": tokens / (time.monotonic() - begin),
            }
        )

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Token mean of the loss on held-out rows; every rank makes as many passes."""
        count = len(self.held_out)
        if not count:
            return
        self.engine.eval()
        per_pass = self.shape.micro_batch_rows * self.ranks.world_size
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for start in range(0, count, per_pass):
            first = start + self.ranks.rank * self.shape.micro_batch_rows
            mine = np.arange(first, min(first + self.shape.micro_batch_rows, count))
            # A rank without rows left passes one anyway: ZeRO-3 gathers weights from all ranks.
            batch = self.held_out.batch(mine if len(mine) else np.array([0])).to(self.device)
            loss = loss_sum(self.engine, batch)
            if len(mine):
                sums[0] += loss.double()
                sums[1] += self.held_out.num_targets(mine)
        dist.all_reduce(sums)
        mean = float(sums[0] / sums[1].clamp(min=1))
        self._append({"held_out_loss": mean})
        self._note += f", held out {mean:.3f}"

    def _append(self, values: dict[str, Any]) -> None:
        if self.ranks.is_first:
            append_metrics(self.run_dir.sft / "metrics.jsonl", {"step": self.step, **values})

    def _save(self) -> None:
        save_checkpoint(
            self.engine,
            self.run_dir.checkpoints,
            step=self.step,
            ranks=self.ranks,
            digest=self.digest,
            keep=self.config.sft.keep_checkpoints,
        )

    def finish(self, target: int) -> None:
        """Write the trained model and the manifest."""
        module = self.engine.module
        if self.config.sft.zero_stage == 3:
            weights = self.engine._zero3_consolidated_16bit_state_dict()
        else:
            weights = module.state_dict()
        if self.ranks.is_first:
            result = self._result()
            card = model_card(self.run_dir, self.config, result)
            save_model(module, self.tokenizer, weights, self.run_dir.model, card)
            names = sorted(path.name for path in self.run_dir.model.iterdir())
            files = {f"model/{name}": file_digest(self.run_dir.model / name) for name in names}
            write_manifest(self.run_dir, "sft", {**result, "files": files})
            self._progress.update(target, target, self._note)
        dist.barrier()

    def _result(self) -> dict[str, Any]:
        metrics = list(read_metrics(self.run_dir.sft / "metrics.jsonl"))
        losses = [line["loss"] for line in metrics if "loss" in line]
        held_out = [line["held_out_loss"] for line in metrics if "held_out_loss" in line]
        if len(losses) != self.step:
            raise CorruptFileError(
                f"{self.run_dir.sft / 'metrics.jsonl'} has {len(losses)} steps instead of "
                f"{self.step}; run again with --rerun-from sft"
            )
        return {
            "steps": self.step,
            "schedule_steps": self.total,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "held_out_loss": {
                "before": held_out[0] if held_out else None,
                "after": held_out[-1] if held_out else None,
            },
            "attention": self.attention,
            "dtype": self.config.sft.dtype,
            "zero_stage": self.config.sft.zero_stage,
        }


def loss_sum(model: Any, batch: Batch) -> torch.Tensor:
    """Sum over response tokens of the negative log-likelihood (nats), in float32."""
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
