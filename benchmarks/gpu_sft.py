"""The fine-tuning on GPUs, checked and measured in one command.

    python benchmarks/gpu_sft.py [--peer-python PYTHON] [--layers N] [--folder FOLDER]
    python benchmarks/gpu_sft.py --dry          # the same code, tiny, on the CPU (sdpa twice)

1. Equality: logits, loss and gradients of packed rows, by flash attention and by SDPA in bfloat16,
   each against SDPA in float32. Flash attention may be at most twice as far from float32 as SDPA
   is (the criterion of its own tests), and must keep packed sequences apart.
2. Throughput: Llama-2-7B's shapes with random weights, ZeRO-3, packed rows of 4096 tokens, with and
   without activation checkpointing, through `teams_hpc.sft` and through TRL's SFTTrainer (where
   `--peer-python` has it; sft_throughput.py tells how to install it).

One process for each GPU. Where 32 layers don't fit, as many as do are taken, and the result says
so: their shapes, and so what a layer achieves, stay the same. `--layers` overrides it.

Two MFU are told. `mfu` counts what packed causal sequences need, and no padding. `mfu_field` takes
each token to attend to a whole row, as the published figures do (PaLM, appendix B); recomputed
activations count in neither.

Needs a CUDA device and flash-attn, or says what is missing and ends with exit code 2. Prints tables
and writes JSON to benchmarks/results/.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from records import RESULTS, commit, machine
from sft_ways import PEER, Job, Result, WayFailedError, peer_versions, run_way, start_child

OURS = "teams_hpc"
PEAKS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "L40S": 362e12,
}
"""Dense bfloat16 operations per second, from NVIDIA's data sheets; the first name that fits."""
TARGETS = {"mfu_field": 0.5, "trl": 1.0}
STATE_BYTES = 20
"""For each parameter, divided over the GPUs: bfloat16 weight and gradient, float32 master weight,
gradient and two moments."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama and the load put on it.

    Attributes:
        length: Tokens a packed row holds.
        mean_document: Mean length of the sequences in it, log-normal.
        equality_layers: Layers of the model whose attention is compared.
        micro_rows, accumulation: Rows of a forward pass, passes of a GPU for each update.
        warmup, updates: Optimizer steps before the clock runs, and with it.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    mean_document: float
    equality_layers: int = 2
    micro_rows: int = 1
    accumulation: int = 8
    warmup: int = 1
    updates: int = 3

    @property
    def layer_parameters(self) -> int:
        return 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """All of them; input embeddings and head are not tied."""
        return 2 * self.vocabulary * self.hidden + self.layers * self.layer_parameters + self.hidden

    @property
    def matrix_parameters(self) -> int:
        """Those that every token is multiplied with: without the input embeddings."""
        layer = self.layer_parameters - 2 * self.hidden
        return self.layers * layer + self.vocabulary * self.hidden

    def operations(self, tokens: int, squares: int) -> tuple[float, float]:
        """Floating-point operations of forward and backward passes.

        Args:
            tokens: Real tokens.
            squares: Sum of squared lengths of their sequences.

        Returns:
            As packed causal sequences need, and by the field's convention.
        """
        matrices = 6.0 * self.matrix_parameters * tokens
        attention = 12.0 * self.layers * self.hidden
        return matrices + attention * squares / 2, matrices + attention * self.length * tokens


LLAMA_2_7B = Shape(
    hidden=4096,
    intermediate=11008,
    layers=32,
    heads=32,
    vocabulary=32000,
    length=4096,
    mean_document=500.0,
)
TINY = Shape(
    hidden=64,
    intermediate=176,
    layers=2,
    heads=4,
    vocabulary=2048,
    length=128,
    mean_document=40.0,
    accumulation=2,
    updates=2,
)


def peak_of(device: str) -> float | None:
    """Operations per second that this device could do at most."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def layers_that_fit(shape: Shape, memory_bytes: float, num_gpus: int) -> int:
    """How many of the shape's layers can be trained without activation checkpointing.

    Activations of a layer: about 58 values of the hidden size for each token, in bytes.
    """
    states = STATE_BYTES / num_gpus
    activations = 58.0 * shape.hidden * shape.length * shape.micro_rows
    logits = 12.0 * shape.vocabulary * shape.length * shape.micro_rows
    room = 0.85 * memory_bytes - 4e9 - logits - states * 2 * shape.vocabulary * shape.hidden
    fitting = int(room // (states * shape.layer_parameters + activations))
    return max(1, min(shape.layers, fitting))


def prepare(folder: Path, settings: dict[str, Any]) -> Result:
    """Look at the devices, compare attention, write model and data; runs in a child.

    Returns:
        `lacking`: what is missing; or devices, shape and the comparison.
    """
    import torch
    from transformers.utils import is_flash_attn_2_available

    dry, attention = settings["dry"], settings["attention"]
    if not dry and not torch.cuda.is_available():
        return {
            "lacking": f"no CUDA device (torch {torch.__version__} sees "
            f"{torch.cuda.device_count()}): run it where there is a GPU, with a CUDA build of "
            "torch; --dry runs the same code, tiny, on the CPU"
        }
    if not dry and attention == "flash_attention_2" and not is_flash_attn_2_available():
        return {
            "lacking": "no flash-attn: pip install --no-build-isolation '.[flash]' on a machine "
            "with CUDA; --attention sdpa measures without it and leaves the comparison out"
        }
    shape, found = TINY, {"device": f"CPU, {platform.machine()}", "num_gpus": 1, "memory_gb": None}
    if not dry:
        properties = torch.cuda.get_device_properties(0)
        num_gpus = torch.cuda.device_count()
        layers = settings["layers"] or layers_that_fit(
            LLAMA_2_7B, properties.total_memory, num_gpus
        )
        shape = replace(LLAMA_2_7B, layers=layers)
        found = {
            "device": properties.name,
            "num_gpus": num_gpus,
            "memory_gb": round(properties.total_memory / 1e9, 1),
        }
    write_data(folder, shape, found["num_gpus"])
    compared = None
    if dry or attention == "flash_attention_2":
        compared = compare_attention(folder, shape, dry=dry)
    write_model(folder / "model", shape, "cpu" if dry else "cuda")
    return {
        **found,
        "shape": vars_of(shape),
        "equality": compared,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
    }


def vars_of(shape: Shape) -> dict[str, Any]:
    """The shape as JSON."""
    return {name: getattr(shape, name) for name in Shape.__dataclass_fields__}


def write_data(folder: Path, shape: Shape, num_gpus: int) -> None:
    """Packed rows of random tokens, enough for all updates, and a tokenizer to go with them."""
    import numpy as np

    from teams_hpc.config import ModelShape
    from teams_hpc.dataset.balance import GROUPS
    from teams_hpc.dataset.packed_file import SequenceCollector, write_packed
    from teams_hpc.dataset.templates import Example, Row
    from teams_hpc.dataset.tokenizer import prepare_tokenizer
    from teams_hpc.rewriting.seeds import read_seeds

    rows = [Row(seed.instruction, seed.input, seed.output) for seed in read_seeds(None, None).seeds]
    vocabulary = ModelShape(vocab_size=min(2048, shape.vocabulary))
    prepared = prepare_tokenizer(vocabulary, rows, folder / "tokenizer")
    needed = num_gpus * shape.micro_rows * shape.accumulation * (shape.warmup + shape.updates)
    generator, spread = np.random.default_rng(0), 0.7
    middle = math.log(shape.mean_document) - spread**2 / 2
    collectors = {group: SequenceCollector(shape.length) for group in GROUPS}
    number = tokens = 0
    # A little more than is needed, since packing leaves gaps.
    while tokens < (needed + 1) * shape.length:
        length = int(np.clip(generator.lognormal(middle, spread), 8, shape.length))
        ids = generator.integers(3, shape.vocabulary, length).tolist()
        collectors[GROUPS[0]].add(Example(tokens=ids, prompt_length=length // 3), number)
        number, tokens = number + 1, tokens + length
    attrs = {"vocab_size": shape.vocabulary, "sequence_length": shape.length}
    write_packed(folder / "packed.h5", collectors, prepared.pad_token_id, attrs)


def llama_config(shape: Shape, **changed: Any) -> Any:
    from transformers import LlamaConfig

    values = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.length,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(values | changed))


def write_model(folder: Path, shape: Shape, device: str) -> None:
    """A model with random weights in bfloat16, made on `device`, which is the faster by far."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(llama_config(shape))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)


def compare_attention(folder: Path, shape: Shape, *, dry: bool) -> Result:
    """Distance of both kinds of attention from SDPA in float32, and of each from the other."""
    import torch
    from transformers import LlamaForCausalLM

    from teams_hpc.sft.attention import check_isolation, packed_logits
    from teams_hpc.sft.data import PackedRows
    from teams_hpc.sft.engine import token_loss_sum

    device = "cpu" if dry else "cuda"
    flash = "sdpa" if dry else "flash_attention_2"
    packed = PackedRows.open(folder / "packed.h5", "train", shape.length)
    batch = packed.read([0, 1])
    is_real = torch.from_numpy(batch.sequence_ids >= 0)
    torch.manual_seed(0)
    config = llama_config(shape, num_hidden_layers=shape.equality_layers)
    model = LlamaForCausalLM(config).to(torch.bfloat16).to(device).train()

    def forward(ids: Any, positions: Any, attention: Any) -> Any:
        model.set_attn_implementation(attention)
        return packed_logits(model, ids.to(device), positions.to(device), attention)

    def passed(attention: Any) -> tuple[Any, float, Any]:
        """Logits of real tokens, mean loss, all gradients in one row."""
        model.zero_grad()
        logits = forward(
            torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids), attention
        )
        targets = torch.from_numpy(batch.targets).to(device)
        loss = token_loss_sum(logits, targets) / batch.num_loss_tokens
        loss.backward()
        gradients = torch.cat([p.grad.float().flatten().cpu() for p in model.parameters()])
        return logits.detach().float().cpu()[is_real], float(loss), gradients

    by_flash, by_sdpa = passed(flash), passed("sdpa")
    with torch.no_grad():
        difference = check_isolation(
            lambda ids, positions: forward(ids, positions, flash).cpu(), packed, "bfloat16"
        )
    model.float()
    exact = passed("sdpa")
    result: Result = {
        "ways": [flash, "sdpa"],
        "tokens": int(is_real.sum()),
        "logits_from_float32": {
            "flash": distance(by_flash[0], exact[0]),
            "sdpa": distance(by_sdpa[0], exact[0]),
        },
        "gradients_from_float32": {
            "flash": distance(by_flash[2], exact[2]),
            "sdpa": distance(by_sdpa[2], exact[2]),
        },
        "flash_from_sdpa": {
            "logits": distance(by_flash[0], by_sdpa[0]),
            "gradients": distance(by_flash[2], by_sdpa[2]),
        },
        "loss": {"flash": by_flash[1], "sdpa": by_sdpa[1], "float32": exact[1]},
        "packed_from_alone_largest_logit_difference": difference,
        "criterion": "flash at most twice as far from float32 as sdpa is, in logits and gradients",
    }
    result["is_equal"] = all(
        result[name]["flash"]["relative"] <= 2 * result[name]["sdpa"]["relative"]
        for name in ("logits_from_float32", "gradients_from_float32")
    )
    return result


def distance(values: Any, reference: Any) -> dict[str, float]:
    """Largest difference, and root mean square of differences over that of the reference."""
    difference = (values - reference).double()
    return {
        "largest": float(difference.abs().max()),
        "relative": float(difference.norm() / reference.double().norm()),
    }


def job_of(folder: Path, way: str, prepared: Result, settings: dict[str, Any]) -> Job:
    """What one way is asked to do."""
    shape, dry = Shape(**prepared["shape"]), settings["dry"]
    return Job(
        way=way,
        model=str(folder / "model"),
        tokenizer=str(folder / "tokenizer"),
        packed=str(folder / "packed.h5"),
        length=shape.length,
        update_rows=prepared["num_gpus"] * shape.micro_rows * shape.accumulation,
        micro_rows=shape.micro_rows,
        warmup_updates=shape.warmup,
        updates=shape.updates,
        learning_rate=1e-5,
        dtype="bfloat16",
        device="cpu" if dry else "cuda",
        attention="sdpa" if dry else settings["attention"],
        activation_checkpointing=settings["activation_checkpointing"],
        threads=1 if dry else max(1, (os.cpu_count() or 1) // prepared["num_gpus"]),
    )


def measure(
    folder: Path, ways: Sequence[str], prepared: Result, settings: dict[str, Any], repeats: int
) -> dict[str, Result]:
    """Each way, by turns, with and without activation checkpointing."""
    found: dict[str, list[Result]] = {}
    for repeat in range(repeats):
        for checkpointing in (True, False):
            for way in ways:
                name = f"{way}, {'with' if checkpointing else 'without'} activation checkpointing"
                say(f"{name}: repeat {repeat + 1} of {repeats} ...")
                one = settings | {"activation_checkpointing": checkpointing}
                python = settings["peer_python"] if way == PEER else sys.executable
                job = job_of(folder, way, prepared, one)
                try:
                    result = run_way(job, python=python, num_processes=prepared["num_gpus"])
                    line = tell(result, prepared, settings["peak_tflops"])
                except WayFailedError as error:
                    line = {"failed": str(error)}
                say(f"  {describe(line)}")
                found.setdefault(name, []).append(line)
    return {name: combine(lines) for name, lines in found.items()}


def tell(result: Result, prepared: Result, peak_tflops: float | None) -> Result:
    """Rates for each GPU; the clock saw the first GPU's share of the work."""
    shape = Shape(**prepared["shape"])
    peak = peak_tflops * 1e12 if peak_tflops else peak_of(prepared["device"])
    seconds = result["seconds"]
    rates = [x / seconds for x in shape.operations(result["tokens"], result["square_lengths"])]
    return {
        "tokens_per_s_per_gpu": result["tokens"] / seconds,
        "tflops_per_gpu": rates[0] / 1e12,
        "mfu": rates[0] / peak if peak else None,
        "mfu_field": rates[1] / peak if peak else None,
        "padding_computed": 1 - result["tokens"] / result["computed_tokens"],
        "peak_gb": result["peak_gb"],
        "losses": result["losses"],
    }


def combine(lines: Sequence[Result]) -> Result:
    """Medians of the repeats that came to an end, and all of them."""
    done = [line for line in lines if "failed" not in line]
    names = ("tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "mfu_field", "peak_gb")
    medians = {
        name: statistics.median(line[name] for line in done)
        for name in names
        if done and done[0][name] is not None
    }
    return {"median": medians, "repeats": list(lines)}


def describe(line: Result) -> str:
    """One repeat in words."""
    if "failed" in line:
        return f"FAILED: {line['failed']}"
    mfu = "MFU unknown" if line["mfu"] is None else f"MFU {line['mfu']:.3f}"
    if line["mfu_field"] is not None:
        mfu += f" ({line['mfu_field']:.3f} as the field counts)"
    losses = f"loss {line['losses'][0]:.3f} to {line['losses'][-1]:.3f}" if line["losses"] else ""
    rate, peak = line["tokens_per_s_per_gpu"], line["peak_gb"]
    return f"{rate:,.0f} tokens/s a GPU, {mfu}, {peak:.1f} GB, {losses}"


def judge(results: dict[str, Result], equality: Result | None) -> Result:
    """Whether targets are met; None: not measured."""
    rates = {
        name: line["median"].get("tokens_per_s_per_gpu", 0.0) for name, line in results.items()
    }
    mfu = [line["median"].get("mfu_field") for name, line in results.items() if OURS in name]
    known = [value for value in mfu if value is not None]
    ratios = {}
    for name, rate in rates.items():
        theirs = rates.get(name.replace(OURS, PEER), 0.0)
        if OURS in name and theirs:
            ratios[name.partition(", ")[2]] = rate / theirs
    return {
        "flash_equals_sdpa": None if equality is None else equality["is_equal"],
        "ours_over_trl": ratios or None,
        "is_never_below_trl": min(ratios.values()) >= TARGETS["trl"] if ratios else None,
        "best_mfu_field": max(known) if known else None,
        "is_mfu_reached": max(known) >= TARGETS["mfu_field"] if known else None,
        "targets": "mfu_field at least 0.5; never below TRL",
    }


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="the same code, tiny, on the CPU")
    parser.add_argument("--attention", choices=("flash_attention_2", "sdpa"), help="sdpa: no flash")
    parser.add_argument("--layers", type=int, help="of Llama-2-7B's 32; default: what fits")
    parser.add_argument("--repeats", type=int, help="default: 3, dry 1")
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16, where it isn't known")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with TRL")
    parser.add_argument(
        "--folder", type=Path, help="for weights, up to 14 GB; default: as tempfile"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--label", default="", help="added to the name of the results")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = {
        "dry": arguments.dry,
        "attention": arguments.attention or "flash_attention_2",
        "layers": arguments.layers,
        "peak_tflops": arguments.peak_tflops,
        "peer_python": arguments.peer_python,
    }
    if arguments.child:
        folder, path = arguments.child
        path.write_text(json.dumps(prepare(folder, settings)), encoding="utf-8")
        return
    measured_at, ran_on = commit(), machine()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        say("looking at devices, comparing attention, writing model and data ...")
        try:
            words = [word for word in sys.argv[1:] if word]
            prepared = start_child(Path(__file__), [*words, "--child", name], threads=2)
        except WayFailedError as error:
            sys.exit(f"gpu_sft: the comparison of attention failed: {error}")
        if "lacking" in prepared:
            print(f"gpu_sft: {prepared['lacking']}", file=sys.stderr)
            sys.exit(2)
        report_prepared(prepared)
        versions = peer_versions(arguments.peer_python)
        ways = (OURS, PEER) if versions else (OURS,)
        repeats = arguments.repeats or (1 if arguments.dry else 3)
        results = measure(folder, ways, prepared, settings, repeats)
    verdict = judge(results, prepared["equality"])
    say(f"verdict: {json.dumps(verdict)}")
    now = datetime.now(UTC)
    label = ("-dry" if arguments.dry else "") + (arguments.label and "-" + arguments.label)
    path = arguments.results / f"{now:%Y-%m-%d}-gpu-sft{label}.json"
    report = {
        "what": "fine-tuning on GPUs: flash attention against SDPA, throughput and MFU",
        "date": f"{now:%Y-%m-%d}",
        "commit": measured_at,
        "command": ["python", "benchmarks/gpu_sft.py", *sys.argv[1:]],
        "is_dry": arguments.dry,
        "machine": ran_on,
        **prepared,
        "layers_of_llama_2_7b": f"{prepared['shape']['layers']} of {LLAMA_2_7B.layers}"
        if not arguments.dry
        else None,
        "peer": versions or "TRL left out: it can't be imported",
        "verdict": verdict,
        "results": results,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    say(f"written: {path}")
    failed = [one for line in results.values() for one in line["repeats"] if "failed" in one]
    if verdict["flash_equals_sdpa"] is False or (arguments.dry and failed):
        sys.exit(1)


def report_prepared(prepared: Result) -> None:
    """What was found and compared, in words."""
    say(f"  {prepared['num_gpus']} x {prepared['device']}; {prepared['shape']['layers']} layers")
    compared = prepared["equality"]
    if compared is None:
        say("  flash attention is NOT COMPARED with SDPA: --attention sdpa")
        return
    for name in ("logits_from_float32", "gradients_from_float32"):
        far = {way: line["relative"] for way, line in compared[name].items()}
        first, second = compared["ways"]
        what = name.replace("_", " ")
        say(f"  {what}: {first} {far['flash']:.2e}, {second} {far['sdpa']:.2e} (relative)")
    say(f"  {'equal' if compared['is_equal'] else 'NOT EQUAL'}: {compared['criterion']}")


if __name__ == "__main__":
    main()
