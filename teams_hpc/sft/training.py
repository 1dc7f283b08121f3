"""The stage `sft`: fine-tune a Llama on the packed data set with DeepSpeed ZeRO.

All processes run the same code; what only one does stands behind `world.is_first`. The order of
rows is a function of (seed, epoch, step), so a checkpoint is DeepSpeed's state and a few numbers.
"""

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from teams_hpc.config import Config, ModelShape
from teams_hpc.errors import WorkError
from teams_hpc.runtime.metrics import Progress
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.runtime.ranks import read_ranks
from teams_hpc.sft.attention import Attention, check_isolation, choose_attention
from teams_hpc.sft.checkpointing import Checkpoint, CheckpointStore, RunState, checkpoint_for
from teams_hpc.sft.claim import claimed
from teams_hpc.sft.data import Batch, PackedRows, RowOrder
from teams_hpc.sft.deepspeed_config import BatchPlan, deepspeed_config, plan_batch
from teams_hpc.sft.engine import StepResult, ZeroEngine
from teams_hpc.sft.export import base_card, model_card, model_files, write_model
from teams_hpc.sft.folders import remove_leftover_folders
from teams_hpc.sft.liger import check_liger
from teams_hpc.sft.metrics_log import MetricsLog
from teams_hpc.sft.model import build_model
from teams_hpc.sft.schedule import Schedule
from teams_hpc.sft.throughput import Meter
from teams_hpc.sft.world import World, default_threads, find_device, joined_world
from teams_hpc.storage.atomic import read_json, remove_leftovers
from teams_hpc.storage.lease import Lease
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest

_MARGIN = 1.5
"""How much longer than the slowest so far the next checkpoint may take."""
_log = logging.getLogger(__name__)


def train(run_dir: RunDir, config: Config, index: int, stop: StopFlag) -> None:
    """Fine-tune up to `sft.max_steps`, from the last checkpoint if there is one.

    Raises:
        UsageError: The processes can't share the batch, or the checkpoint is of another number
            and has not been reshaped.
        InputChangedError: The checkpoint is of other inputs.
        WorkError: Model, attention or Liger can't be had, sequences aren't kept apart, the loss is
            not finite, or memory or disk ran out. Checkpoints stay.
        StopRequested: Asked to stop, on any of the processes; all have written a checkpoint.
    """
    packed = PackedRows.open(run_dir.packed_rows, "train", config.sft.sequence_length)
    schedule = Schedule.of(config.sft, len(packed))
    manifest = read_manifest(run_dir, "sft")
    if manifest is not None and manifest["steps"] >= schedule.stop_step:
        return
    ranks, device = read_ranks(), find_device()
    plan = plan_batch(config.sft, ranks.world_size)
    attention = choose_attention(config.sft, device)
    check_liger(config.sft, device)
    transformers_logging.disable_progress_bar()
    with claimed(run_dir, config, ranks) as lease, joined_world(ranks, device) as world:
        _Training(
            run_dir=run_dir,
            config=config,
            world=world,
            plan=plan,
            schedule=schedule,
            attention=attention,
            packed=packed,
            lease=lease,
            stop=stop,
        ).run()


@dataclass(slots=True, kw_only=True)
class _Training:
    """One start of the fine-tuning, to its end or to a stop."""

    run_dir: RunDir
    config: Config
    world: World
    plan: BatchPlan
    schedule: Schedule
    attention: Attention
    packed: PackedRows
    lease: Lease
    stop: StopFlag

    def run(self) -> None:
        config, run_dir = self.config, self.run_dir
        digest = read_json(run_dir.inputs("sft"))["digest"]
        if self.world.is_first:
            remove_leftover_folders(run_dir.sft)  # of a kill while a model was being written
            remove_leftovers(run_dir.sft)
        store = CheckpointStore(
            run_dir.checkpoints, digest, self.world, config.sft.keep_checkpoints
        )
        checkpoint = checkpoint_for(store, self.world.size, run_dir.root)
        state = checkpoint.state if checkpoint else RunState()
        if checkpoint is None or checkpoint.world_size is None:
            state = replace(state, threads=self._threads())
        torch.set_num_threads(state.threads)
        engine = self._build(checkpoint)
        check_isolation(engine.logits, self.packed, config.sft.dtype)
        loop = _Loop(self, engine, store, state)
        loop.go()
        self._finish(engine, loop.state, digest)
        loop.report()

    def _threads(self) -> int:
        """The same for all processes, whatever their own environment says."""
        return int(min(self.world.gather(default_threads(self.world.ranks))))

    def _build(self, checkpoint: Checkpoint | None) -> ZeroEngine:
        zero_config = deepspeed_config(
            self.config,
            self.world.size,
            self.world.device,
            is_reshaped=checkpoint is not None and checkpoint.world_size is None,
        )
        tokenizer = self.run_dir.tokenizer
        built = build_model(
            self.config, tokenizer, self.packed.vocab_size, self.attention, zero_config
        )
        if (
            self.world.is_first
            and isinstance(self.config.sft.model, ModelShape)
            and not self.run_dir.base_model.exists()
        ):
            card = base_card(self.config)
            write_model(self.run_dir.base_model, built.model, None, tokenizer, card)
        engine = ZeroEngine(built, self.config, zero_config, self.world, self.attention)
        if checkpoint is not None:
            engine.load(checkpoint.folder)
            _log.info("going on from step %d", checkpoint.state.step)
        return engine

    def _finish(self, engine: ZeroEngine, state: RunState, digest: str) -> None:
        """Write the model and, last of all, the manifest."""
        weights = engine.state_dict()
        if self.world.is_first:
            run_dir = self.run_dir
            num_parameters = sum(weight.numel() for weight in weights.values())
            run_dir.manifest("sft").unlink(missing_ok=True)
            card = model_card(run_dir, self.config, state, digest)
            write_model(run_dir.model, engine.model, weights, run_dir.tokenizer, card)
            write_manifest(run_dir, "sft", self._manifest(state, num_parameters))
        self.world.barrier()

    def _manifest(self, state: RunState, num_parameters: int) -> dict[str, Any]:
        return {
            "steps": state.step,
            "schedule_steps": self.schedule.num_steps,
            "tokens": state.tokens,
            "parameters": num_parameters,
            "first_loss": state.first_loss,
            "last_loss": state.last_loss,
            "held_out_loss": {"before": state.held_out_before, "after": state.held_out_loss},
            "attention": self.attention,
            "dtype": self.config.sft.dtype,
            "zero_stage": self.config.sft.zero_stage,
            "files": model_files(self.run_dir),
        }


class _Loop:
    """Steps from `state` to the end of the schedule's part that was asked for."""

    def __init__(
        self, training: _Training, engine: ZeroEngine, store: CheckpointStore, state: RunState
    ) -> None:
        self.state = state
        self._training = training
        self._sft = training.config.sft
        self._world = training.world
        self._schedule = training.schedule
        self._engine = engine
        self._store = store
        self._saved_step = state.step
        training.stop.need_before_limit(_MARGIN * store.slowest_save_s)
        self._order = RowOrder(len(training.packed), training.config.seed)
        run_dir = training.run_dir
        self._held_out = PackedRows.open(run_dir.packed_rows, "held_out", self._sft.sequence_length)
        self._metrics = MetricsLog(run_dir.sft, state.step, enabled=self._world.is_first)
        self._meter = Meter.of(self._sft, self._world, engine.model)
        self._tokens_per_s: float | None = None
        self._progress = Progress(
            run_dir.progress("sft"), unit="steps", enabled=self._world.is_first
        )

    @property
    def _stop_step(self) -> int:
        """Where to end; a checkpoint beyond `sft.max_steps` is not taken back."""
        return max(self._schedule.stop_step, self.state.step)

    def go(self) -> None:
        """Train; at the end held-out loss is measured and a checkpoint is there."""
        if self.state.step == 0:
            self._measure_held_out()
            self._metrics.append({"step": 0, "held_out_loss": self.state.held_out_loss})
        while self.state.step < self._stop_step:
            self.report()
            self._step()
            if self._is_due(self._sft.checkpoint_interval_steps):
                self._save()
        if self.state.held_out_step != self.state.step:
            self._measure_held_out()
        self._save()
        self._metrics.close()

    def report(self) -> None:
        """Say how far it is."""
        losses = {"loss": self.state.last_loss, "held-out": self.state.held_out_loss}
        words = [f"{name} {x:.2f}" for name, x in losses.items() if x is not None]
        if self._tokens_per_s is not None:
            words.append(f"{self._tokens_per_s:,.0f} tokens/s")
        self._progress.update(self.state.step, self._stop_step, ", ".join(words))

    def _step(self) -> None:
        start = time.monotonic()
        step = self.state.step
        batch = self._own_rows(step)
        loss_tokens, tokens, pairs, stops = self._world.sum(
            batch.num_loss_tokens,
            batch.num_tokens,
            batch.num_pairs,
            float(self._training.stop.is_set),
        )
        if stops:
            self._stop()
        rate = self._schedule.learning_rate(step)
        result = self._engine.step(batch, loss_tokens, rate)
        self._refuse_not_finite(result)
        measured = self._meter.measure(tokens, pairs, time.monotonic() - start)
        self._tokens_per_s = measured["tokens_per_s"]
        self.state = replace(
            self.state,
            step=step + 1,
            tokens=self.state.tokens + int(tokens),
            first_loss=result.loss if step == 0 else self.state.first_loss,
            last_loss=result.loss,
        )
        line: dict[str, Any] = {
            "step": step + 1,
            "loss": result.loss,
            "lr": rate,
            "grad_norm": result.grad_norm,
            "tokens": self.state.tokens,
            "loss_tokens": int(loss_tokens),
            **measured,
        }
        if self._is_due(self._sft.eval_interval_steps) or step + 1 == self._stop_step:
            self._measure_held_out()
            line["held_out_loss"] = self.state.held_out_loss
        self._metrics.append(line)

    def _own_rows(self, step: int) -> Batch:
        plan = self._training.plan
        rows = self._order.rows(step * self._sft.global_batch_rows, self._sft.global_batch_rows)
        first = self._world.ranks.rank * plan.rank_rows
        return self._training.packed.read(rows[first : first + plan.rank_rows])

    def _is_due(self, interval: int) -> bool:
        return self.state.step % interval == 0

    def _stop(self) -> None:
        self._save()
        stop = self._training.stop
        stop.reason = stop.reason or "the wish of another process"
        stop.raise_if_set(f"{self.state.step} of {self._stop_step} steps")

    def _refuse_not_finite(self, result: StepResult) -> None:
        if result.is_finite:
            return
        step = self.state.step
        rows = self._order.rows(step * self._sft.global_batch_rows, self._sft.global_batch_rows)
        shown = ", ".join(str(row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
        raise WorkError(
            f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; packed rows "
            f"{shown}. The checkpoint of step {self._saved_step} is kept. Lower sft.learning_rate "
            "or raise sft.warmup_steps, and start over with --rerun-from sft"
        )

    def _measure_held_out(self) -> None:
        self.state = self.state.with_held_out(self._engine.mean_loss(self._held_out))

    def _save(self) -> None:
        if self.state.step != self._saved_step:
            if self._world.is_first:
                self._training.lease.refuse_if_lost("the fine-tuning")
            self._store.save(self._engine, self.state)
            self._saved_step = self.state.step
            self._training.stop.need_before_limit(_MARGIN * self._store.slowest_save_s)
