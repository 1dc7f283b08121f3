"""Ways of fine-tuning the same model on the same data, each timed in processes of its own.

Used by sft_throughput.py and gpu_sft.py, which start this file:

    python benchmarks/sft_ways.py JOB.json RESULT.json

- teams_hpc: packed rows through `teams_hpc.sft`'s ZeroEngine, step by step as the stage `sft` does;
- padded: the published recipe's style, the sequences of the same rows one to a row, padded on the
  right to the full length, with an attention mask, in plain PyTorch (no trainer: its best case);
- padded_to_longest: the same, padded only to the longest sequence of each forward pass;
- trl: TRL's SFTTrainer with `packing_strategy="bfd"`; it packs the same sequences itself.

All start from the weights in one folder, use AdamW at the same constant rate, and take the mean
loss over the response tokens of an update. The first updates are not timed.
"""

import dataclasses
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

Result = dict[str, Any]
WAYS = ("teams_hpc", "padded", "padded_to_longest", "trl")
PEER = "trl"
TIMEOUT_S = 3600.0
_LOCAL = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One way to be timed.

    Attributes:
        way: One of `WAYS`.
        model, tokenizer, packed: A model's folder, a tokenizer's, and `packed.h5`.
        length: Tokens a row holds.
        update_rows: Packed rows of one optimizer step, over all processes.
        micro_rows: Packed (or padded) rows of one forward pass of one process.
        warmup_updates, updates: Optimizer steps before the clock runs, and with it.
        seed: Of the order of rows.
        zero_stage: DeepSpeed's stage; None: without DeepSpeed, which only `trl` and `padded` can.
        is_evaluated: Whether to measure held-out loss at the end.
    """

    way: str
    model: str
    tokenizer: str
    packed: str
    length: int
    update_rows: int
    micro_rows: int
    warmup_updates: int
    updates: int
    learning_rate: float
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    attention: str = "sdpa"
    activation_checkpointing: bool = False
    zero_stage: int | None = 3
    threads: int = 1
    is_evaluated: bool = False

    @property
    def all_updates(self) -> int:
        return self.warmup_updates + self.updates


class WayFailedError(Exception):
    """A way's processes ended without a result."""


def run_way(job: Job, *, python: str = sys.executable, num_processes: int = 1) -> Result:
    """Time one way in processes of its own, and return what the first of them tells.

    Raises:
        WayFailedError: They failed; says how.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_path, result_path = Path(folder) / "job.json", Path(folder) / "result.json"
        job_path.write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(num_processes)]
        command = (python, str(Path(__file__).resolve()), str(job_path), str(result_path))
        codes = run_processes(command, logs, job.threads)
        if any(codes) or not result_path.exists():
            raise WayFailedError(_reason(logs, codes))
        result: Result = json.loads(result_path.read_text(encoding="utf-8"))
        return result


def start_child(script: Path, words: Sequence[str], threads: int) -> Result:
    """Run a script in a process of its own; its last argument is where it writes its JSON.

    Raises:
        WayFailedError: It failed; says how.
    """
    with tempfile.TemporaryDirectory() as folder:
        result_path, log = Path(folder) / "result.json", Path(folder) / "log"
        codes = run_processes(
            (sys.executable, str(script), *words, str(result_path)), [log], threads
        )
        if any(codes) or not result_path.exists():
            raise WayFailedError(_reason([log], codes))
        result: Result = json.loads(result_path.read_text(encoding="utf-8"))
        return result


def run_processes(command: Sequence[str], logs: Sequence[Path], threads: int) -> list[int]:
    """Start a process for each log, as a launcher of torch would, and wait for them.

    When one fails the others are ended, since they would wait for it.
    """
    with socket.socket() as probe:
        probe.bind((_LOCAL, 0))
        port = probe.getsockname()[1]
    processes = []
    try:
        for rank, log in enumerate(logs):
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": len(logs),
                "LOCAL_WORLD_SIZE": len(logs),
                "MASTER_ADDR": _LOCAL,
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": threads,
                "HF_HUB_OFFLINE": 1,
                "TOKENIZERS_PARALLELISM": "false",
            }
            # Ours first: it could stand on the path as another checkout.
            path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
            environment = {**os.environ, **{k: str(v) for k, v in place.items()}}
            with log.open("w") as stream:
                processes.append(
                    subprocess.Popen(
                        command,
                        env={**environment, "PYTHONPATH": path},
                        stdout=stream,
                        stderr=stream,
                    )
                )
        deadline = time.monotonic() + TIMEOUT_S
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    return [process.returncode for process in processes]


def _reason(logs: Sequence[Path], codes: Sequence[int]) -> str:
    texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    for text in texts:
        if "out of memory" in text.lower():
            return "out of memory"
    # A process that was ended because another failed has nothing to say.
    first = next((n for n, code in enumerate(codes) if code not in (0, -9)), 0)
    lines = texts[first].strip().splitlines()
    return f"exit codes {list(codes)}: " + " | ".join(lines[-4:])


def peer_versions(python: str) -> dict[str, str] | None:
    """Versions of TRL and what it stands on, or None where it can't be imported."""
    code = (
        "import json, trl, datasets, accelerate, transformers, torch; from trl import SFTTrainer;"
        "print(json.dumps({m.__name__: m.__version__ for m in "
        "(trl, datasets, accelerate, transformers, torch)}))"
    )
    try:
        done = subprocess.run((python, "-c", code), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        text = getattr(error, "stderr", None) or str(error)
        print(f"{PEER} is LEFT OUT: {python} can't import it ({text.strip().splitlines()[-1]})")
        return None
    found: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@dataclass
class Clock:
    """Wall and CPU time between two moments, and the work in between.

    Attributes:
        tokens: Real tokens, without padding.
        computed: Tokens that went through the model, with padding.
        squares: Sum of squared sequence lengths: what attention costs.
    """

    device: str
    tokens: int = 0
    computed: int = 0
    squares: int = 0
    is_running: bool = False
    _started: tuple[float, float] = (0.0, 0.0)
    _ended: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        self.is_running = True
        self._started = self._now()

    def stop(self) -> None:
        self._ended = self._now()
        self.is_running = False

    def count(self, lengths: Sequence[int], computed: int) -> None:
        """Note sequences of one forward pass, if the clock runs."""
        if self.is_running:
            self.tokens += sum(lengths)
            self.squares += sum(length * length for length in lengths)
            self.computed += computed

    def _now(self) -> tuple[float, float]:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def result(self) -> Result:
        seconds, cpu = (b - a for a, b in zip(self._started, self._ended, strict=True))
        return {
            "tokens": self.tokens,
            "computed_tokens": self.computed,
            "square_lengths": self.squares,
            "seconds": seconds,
            "cpu_s": cpu,
        }


@dataclass
class Outcome:
    """What a way leaves: its clock, losses of updates, and weights if they are evaluated."""

    clock: Clock
    losses: list[float] = field(default_factory=list)
    weights: dict[str, Any] | None = None


def lengths_of(sequence_ids: Any) -> list[int]:
    """Lengths of all sequences of packed rows, padding left out."""
    return [stop - start for row in sequence_ids for start, stop in bounds_of(row)]


def bounds_of(sequence_ids: Any) -> list[tuple[int, int]]:
    """Start and end of each sequence of one packed row."""
    import numpy as np

    edges = [0, *(np.flatnonzero(np.diff(sequence_ids)) + 1).tolist(), len(sequence_ids)]
    return [(start, stop) for start, stop in pairwise(edges) if sequence_ids[start] >= 0]


def train_ours(job: Job) -> Outcome:
    """The stage `sft` without its files: the same calls in the same order."""
    from teams_hpc.config import Config
    from teams_hpc.config.schema import SftConfig
    from teams_hpc.runtime.ranks import read_ranks
    from teams_hpc.sft.attention import check_isolation
    from teams_hpc.sft.data import PackedRows, RowOrder
    from teams_hpc.sft.deepspeed_config import deepspeed_config, plan_batch
    from teams_hpc.sft.engine import ZeroEngine
    from teams_hpc.sft.model import build_model
    from teams_hpc.sft.world import joined_world

    sft = SftConfig.model_validate(
        {
            "model": job.model,
            "attention": job.attention,
            "dtype": job.dtype,
            "zero_stage": job.zero_stage,
            "sequence_length": job.length,
            "global_batch_rows": job.update_rows,
            "micro_batch_rows": job.micro_rows,
            "learning_rate": job.learning_rate,
            "activation_checkpointing": job.activation_checkpointing,
        }
    )
    config = Config(name="benchmark", seed=job.seed, sft=sft)
    packed = PackedRows.open(Path(job.packed), "train", job.length)
    ranks = read_ranks()
    outcome = Outcome(Clock(job.device))
    with joined_world(ranks, job.device) as world:  # type: ignore[arg-type]
        zero = deepspeed_config(config, world.size, world.device)
        built = build_model(config, Path(job.tokenizer), packed.vocab_size, job.attention, zero)  # type: ignore[arg-type]
        engine = ZeroEngine(built, config, zero, world, job.attention)  # type: ignore[arg-type]
        check_isolation(engine.logits, packed, job.dtype)
        order = RowOrder(len(packed), job.seed)
        own_rows = plan_batch(sft, world.size).rank_rows
        for update in range(job.all_updates):
            if update == job.warmup_updates:
                outcome.clock.start()
            rows = order.rows(update * job.update_rows, job.update_rows)
            batch = packed.read(rows[ranks.rank * own_rows : (ranks.rank + 1) * own_rows])
            loss_tokens, *_ = world.sum(batch.num_loss_tokens, batch.num_tokens, 0.0)
            outcome.losses.append(engine.step(batch, loss_tokens, job.learning_rate).loss)
            outcome.clock.count(lengths_of(batch.sequence_ids), batch.input_ids.size)
        outcome.clock.stop()
        if job.is_evaluated:
            outcome.weights = engine.state_dict()
    return outcome


def train_padded(job: Job) -> Outcome:
    """The sequences of the same rows, padded on the right, in plain PyTorch."""
    import torch
    from transformers import AutoModelForCausalLM

    from teams_hpc.sft.data import PackedRows, RowOrder
    from teams_hpc.sft.engine import token_loss_sum

    packed = PackedRows.open(Path(job.packed), "train", job.length)
    model = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=getattr(torch, job.dtype), attn_implementation=job.attention
    ).train()
    model.to(job.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.learning_rate, weight_decay=0.0)
    order = RowOrder(len(packed), job.seed)
    outcome = Outcome(Clock(job.device))
    for update in range(job.all_updates):
        if update == job.warmup_updates:
            outcome.clock.start()
        batch = packed.read(order.rows(update * job.update_rows, job.update_rows))
        sequences = [
            (batch.input_ids[row, start:stop], batch.targets[row, start:stop])
            for row in range(len(batch))
            for start, stop in bounds_of(batch.sequence_ids[row])
        ]
        total = 0.0
        for first in range(0, len(sequences), job.micro_rows):
            some = sequences[first : first + job.micro_rows]
            width = job.length if job.way == "padded" else max(len(ids) for ids, _ in some)
            ids, mask, targets = _pad(some, width, packed.pad_token_id)
            logits = model(
                input_ids=ids.to(job.device), attention_mask=mask.to(job.device), use_cache=False
            ).logits
            loss = token_loss_sum(logits, targets.to(job.device)) / batch.num_loss_tokens
            loss.backward()
            total += float(loss.detach())
            outcome.clock.count([len(ids) for ids, _ in some], ids.numel())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        outcome.losses.append(total)
    outcome.clock.stop()
    outcome.weights = model.state_dict()
    return outcome


def _pad(sequences: Sequence[tuple[Any, Any]], width: int, pad_token_id: int) -> tuple[Any, ...]:
    """Token ids, attention mask and shifted targets of (sequences, width)."""
    import torch

    shape = (len(sequences), width)
    ids, mask = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, -100)
    for row, (tokens, following) in enumerate(sequences):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        targets[row, : len(tokens)] = torch.from_numpy(following)
        mask[row, : len(tokens)] = 1
    return ids, mask, targets


def train_with_trl(job: Job) -> Outcome:
    """TRL's SFTTrainer as its users set it up, but for gradient checkpointing (its default: on)."""
    world_size = int(os.environ["WORLD_SIZE"])
    if job.zero_stage is None:
        # accelerate would take these for a distributed run, and wrap the model.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    elif job.device == "cpu":
        _spare_deepspeed_compiling()
    import torch
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    disable_progress_bar()
    outcome = Outcome(Clock(job.device))

    class Marks(TrainerCallback):  # type: ignore[misc]
        """Runs the clock from the end of the last warm-up update."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == job.warmup_updates:
                outcome.clock.start()
            elif state.global_step == job.all_updates:
                outcome.clock.stop()

    class Counting(SFTTrainer):  # type: ignore[misc]
        """Counts what a forward pass gets."""

        def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            lengths = inputs["cu_seq_lens_q"].diff().tolist()
            outcome.clock.count(lengths, inputs["input_ids"].numel())
            return super().training_step(model, inputs, *rest)

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            packing=True,
            packing_strategy="bfd",
            max_length=job.length,
            per_device_train_batch_size=job.micro_rows,
            gradient_accumulation_steps=job.update_rows // world_size // job.micro_rows,
            max_steps=job.all_updates,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            gradient_checkpointing=job.activation_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=job.dtype == "bfloat16",
            use_cpu=job.device == "cpu",
            seed=job.seed,
            deepspeed=_zero_of_peer(job) if job.zero_stage is not None else None,
            logging_steps=1 if job.device == "cuda" else 10,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=job.device == "cuda",
            model_init_kwargs={
                "dtype": getattr(torch, job.dtype),
                "attn_implementation": job.attention,
            },
        )
        trainer = Counting(
            model=job.model,
            args=settings,
            train_dataset=Dataset.from_list(list(examples(job))),
            processing_class=AutoTokenizer.from_pretrained(job.tokenizer, local_files_only=True),
            callbacks=[Marks()],
        )
        if job.device == "cpu":
            torch.set_num_threads(job.threads)
        trainer.train()
    outcome.losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    if job.is_evaluated:
        outcome.weights = trainer.model.state_dict()
    return outcome


def examples(job: Job) -> Iterator[dict[str, list[int]]]:
    """The training sequences of `packed.h5`, tokenised, in the data set's own order."""
    from teams_hpc.sft.data import PackedRows

    columns = PackedRows.open(Path(job.packed), "train", job.length).columns
    found = {}
    for row, ids in enumerate(columns["sequence_ids"]):
        for start, stop in bounds_of(ids):
            found[int(ids[start])] = {
                name: columns[name][row, start:stop].tolist() for name in ("input_ids", "labels")
            }
    return (found[name] for name in sorted(found))


def _zero_of_peer(job: Job) -> Result:
    """The DeepSpeed configuration that our own gets, as the Trainer wants it."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": job.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": job.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": job.device == "cuda",
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _spare_deepspeed_compiling() -> None:
    """As `teams_hpc.sft.world` does: no operator is compiled, gloo finds itself."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_SIZE"] = os.environ["LOCAL_WORLD_SIZE"]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def held_out_loss(job: Job, weights: dict[str, Any]) -> float:
    """Mean loss over the response tokens of the held-out sequences, each passed alone."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    from teams_hpc.sft.data import PackedRows
    from teams_hpc.sft.engine import token_loss_sum

    model = LlamaForCausalLM(AutoConfig.from_pretrained(job.model)).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any(name != "lm_head.weight" for name in missing):
        raise ValueError(f"{job.way} left weights that don't fit: {missing}, {unexpected}")
    packed = PackedRows.open(Path(job.packed), "held_out", job.length)
    batch = packed.read(range(len(packed)))
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in range(len(batch)):
            for start, stop in bounds_of(batch.sequence_ids[row]):
                ids = torch.from_numpy(batch.input_ids[row : row + 1, start:stop])
                targets = torch.from_numpy(batch.targets[row : row + 1, start:stop])
                total += float(token_loss_sum(model(input_ids=ids).logits, targets))
                count += int((targets != -100).sum())
    return total / count


def _peak_gb(device: str) -> float:
    if device == "cuda":
        import torch

        return float(torch.cuda.max_memory_allocated()) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    is_first = os.environ["RANK"] == "0"
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(job.threads)
    ways = {"teams_hpc": train_ours, "trl": train_with_trl}
    outcome = ways.get(job.way, train_padded)(job)
    if is_first:
        result = {
            **outcome.clock.result(),
            "losses": outcome.losses,
            "peak_gb": _peak_gb(job.device),
            "held_out_loss": held_out_loss(job, outcome.weights)
            if job.is_evaluated and outcome.weights
            else None,
        }
        temporary = Path(sys.argv[2] + ".part")
        temporary.write_text(json.dumps(result), encoding="utf-8")
        temporary.rename(sys.argv[2])
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries' exit handlers have been seen to abort a process whose work was done (DeepSpeed).
    os._exit(0)


if __name__ == "__main__":
    main()
