"""Real tokens per second of the fine-tuning, against padding and against TRL, on the CPU.

    python benchmarks/sft_throughput.py [--run runs/quickstart | --data FILE] [--repeats 5]
        [--peer-python PYTHON]

A small Llama in float32 is trained on the same examples from the same weights with the same AdamW,
rate and clipping, and about as many real tokens an update; sft_ways.py says how each way does it.
Ways take turns, each in a process of its own, so that a busy machine hits all alike; the first
updates are not timed. One thread by default: several wait for each other on a busy machine, and
that waiting counts as CPU time. Padding is not counted, in any of them. At the end of each,
held-out loss is measured by one and the same function, every sequence alone.

The examples are those of a run (`make quickstart` makes one), or of a JSON, JSONL or text file in
Alpaca's or Self-Instruct's form; a tokenizer is trained on them. What padding costs depends on how
long they are: the result tells their lengths, and the bound, row length over mean length.

TRL is optional and is left out, and said so, where it can't be imported. It goes into an
environment of its own, which borrows the packages of ours (here .venv):

    python3.11 -m venv peer
    echo "import site; site.addsitedir('$PWD/.venv/lib/python3.11/site-packages')" \\
      > peer/lib/python3.11/site-packages/ours.pth
    peer/bin/pip install --no-deps trl==1.16.0
    python benchmarks/sft_throughput.py --peer-python peer/bin/python

Prints a table and writes JSON to benchmarks/results/.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from records import RESULTS, commit, machine
from sft_ways import PEER, ROOT, WAYS, Job, Result, peer_versions, run_way
from transformers import LlamaConfig, LlamaForCausalLM

from teams_hpc.config import ModelShape
from teams_hpc.dataset.balance import GROUPS
from teams_hpc.dataset.packed_file import SequenceCollector, read_examples, write_packed
from teams_hpc.dataset.templates import Row, choose_format
from teams_hpc.dataset.tokenizer import prepare_tokenizer
from teams_hpc.rewriting.seeds import read_seeds
from teams_hpc.storage.run_dir import RunDir
from teams_hpc.storage.shards import Table

OURS = "teams_hpc"
TARGETS = {"trl": 1.0, "padded": 2.5}
ONE_IN = 8
"""Of a file's rows every so-manieth is held out; a run says itself which ones are."""


def read_run(run_dir: RunDir) -> tuple[list[Row], list[int]]:
    """Examples of a run, and whether each is held out (1) or not (0)."""
    if not run_dir.dataset_rows.exists():
        sys.exit(
            f"{run_dir.root} has no data set: `make quickstart` makes runs/quickstart; "
            "or name another run with --run, or a file with --data"
        )
    with Table.open(run_dir.dataset_rows) as table:
        return read_examples(table, 0, table.num_rows)


def read_file(path: Path) -> tuple[list[Row], list[int]]:
    """Examples of a file; those without an answer are left out."""
    seeds = [seed for seed in read_seeds(path, None).seeds if seed.output]
    if len(seeds) < 2 * ONE_IN:
        sys.exit(f"{path} has {len(seeds)} rows with an output; at least {2 * ONE_IN} are needed")
    rows = [Row(seed.instruction, seed.input, seed.output) for seed in seeds]
    return rows, [int(number % ONE_IN == 0) for number in range(len(rows))]


def prepare(
    rows: Sequence[Row], uses: Sequence[int], arguments: argparse.Namespace, folder: Path
) -> Result:
    """Write tokenizer, packed rows and a model with random weights; returns what the data is."""
    shape = ModelShape(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden // 64),
        num_key_value_heads=max(1, arguments.hidden // 64),
    )
    train = [row for row, use in zip(rows, uses, strict=True) if not use]
    prepared = prepare_tokenizer(shape, train, folder / "tokenizer")
    collectors = {group: SequenceCollector(arguments.length) for group in GROUPS}
    encoded = choose_format(prepared.tokenizer).encode(rows)
    for number, (example, use) in enumerate(zip(encoded, uses, strict=True)):
        collectors[GROUPS[use]].add(example, number)
    attrs = {"vocab_size": prepared.vocab_size, "sequence_length": arguments.length}
    counts = write_packed(folder / "packed.h5", collectors, prepared.pad_token_id, attrs)
    torch.manual_seed(0)
    vocabulary = -(-prepared.vocab_size // 64) * 64
    values = shape.model_dump() | {"vocab_size": vocabulary}
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.save_pretrained(folder / "model")
    lengths = collectors[GROUPS[0]].sequences().lengths
    return {
        **counts,
        "lengths": {
            "mean": round(float(np.mean(lengths)), 1),
            "percentiles_10_50_90": np.percentile(lengths, (10, 50, 90)).tolist(),
            "longest": max(lengths),
        },
        "bound_by_padding": round(arguments.length / float(np.mean(lengths)), 2),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": vocabulary,
    }


def summary(values: Sequence[float], digits: int = 3) -> Result:
    """Median and spread."""
    return {
        "median": round(statistics.median(values), digits),
        "lowest": round(min(values), digits),
        "highest": round(max(values), digits),
    }


def measure(ways: Sequence[str], arguments: argparse.Namespace, folder: Path) -> dict[str, Result]:
    """Time all ways by turns; each repeat has its own order of rows."""
    micro_rows = {
        OURS: arguments.micro_rows,
        PEER: arguments.peer_micro_rows,
    }
    found: dict[str, list[Result]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats):
        # Another one begins each time, so that none is always first.
        for way in [*ways[repeat % len(ways) :], *ways[: repeat % len(ways)]]:
            job = Job(
                way=way,
                model=str(folder / "model"),
                tokenizer=str(folder / "tokenizer"),
                packed=str(folder / "packed.h5"),
                length=arguments.length,
                update_rows=arguments.update_rows,
                micro_rows=micro_rows.get(way, arguments.padded_micro_rows),
                warmup_updates=arguments.warmup,
                updates=arguments.updates,
                learning_rate=arguments.rate,
                seed=repeat,
                zero_stage=3 if way == OURS else None,
                threads=arguments.threads,
                is_evaluated=True,
            )
            python = arguments.peer_python if way == PEER else sys.executable
            one = run_way(job, python=python)
            found[way].append(one)
            print(
                f"  {repeat + 1}/{arguments.repeats} {way:<18}"
                f"{one['tokens'] / one['seconds']:>8.0f} tokens/s   "
                f"{one['tokens'] / one['cpu_s']:>7.0f} a CPU second   "
                f"held-out {one['held_out_loss']:.4f}",
                flush=True,
            )
    return {way: tell(results, found[OURS], arguments) for way, results in found.items()}


def tell(
    results: Sequence[Result], ours: Sequence[Result], arguments: argparse.Namespace
) -> Result:
    """What the repeats of one way come to, beside ours in the same repeat."""
    rates = [one["tokens"] / one["seconds"] for one in results]
    cpu_rates = [one["tokens"] / one["cpu_s"] for one in results]
    pairs = list(zip(results, ours, strict=True))
    return {
        "tokens_per_s": summary(rates, 1),
        "tokens_per_cpu_s": summary(cpu_rates, 1),
        "ours_is_faster": summary(
            [a["tokens"] / a["seconds"] / rate for (_, a), rate in zip(pairs, rates, strict=True)]
        ),
        "ours_is_faster_by_cpu": summary(
            [a["tokens"] / a["cpu_s"] / rate for (_, a), rate in zip(pairs, cpu_rates, strict=True)]
        ),
        "tokens_an_update": summary([one["tokens"] / arguments.updates for one in results], 1),
        "padding_computed": summary(
            [1 - one["tokens"] / one["computed_tokens"] for one in results]
        ),
        "peak_gb": summary([one["peak_gb"] for one in results], 2),
        "held_out_loss": summary([one["held_out_loss"] for one in results], 5),
        "held_out_loss_minus_ours": summary(
            [one["held_out_loss"] - a["held_out_loss"] for one, a in pairs], 6
        ),
    }


def print_table(lines: dict[str, Result], data: Result) -> None:
    def spread(line: Result, digits: int) -> str:
        low, high = (f"{line[name]:.{digits}f}" for name in ("lowest", "highest"))
        return f"{line['median']:.{digits}f} ({low} to {high})"

    print(f"\nexamples of {data['lengths']['mean']} tokens; bound {data['bound_by_padding']} x")
    for way, line in lines.items():
        print(
            f"  {way:<18} {spread(line['tokens_per_s'], 0):<24} tokens/s   "
            f"ours {spread(line['ours_is_faster'], 2)} x   "
            f"held-out {line['held_out_loss']['median']:.4f}, "
            f"beside ours {spread(line['held_out_loss_minus_ours'], 4)}"
        )
        target = TARGETS.get(way)
        if target is not None and line["ours_is_faster"]["median"] < target:
            print(f"  {'':<18} TARGET MISSED: at least {target} x")


def shown(word: object) -> str:
    """An argument without the folders of this machine."""
    path = Path(str(word))
    if not path.is_absolute():
        return str(word)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--data", type=Path, help="examples of a file instead of a run's")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=8, help="timed optimizer steps")
    parser.add_argument("--warmup", type=int, default=1, help="optimizer steps before them")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--update-rows", type=int, default=8, help="packed rows an update")
    parser.add_argument("--micro-rows", type=int, default=4, help="ours: packed rows a pass")
    parser.add_argument("--peer-micro-rows", type=int, default=1, help="TRL: packed rows a pass")
    parser.add_argument("--padded-micro-rows", type=int, default=8, help="padded rows a pass")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate, constant")
    parser.add_argument("--threads", type=int, default=1, help="torch CPU threads")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with TRL")
    parser.add_argument("--label", default="", help="added to the name of the results")
    arguments = parser.parse_args()
    versions = peer_versions(arguments.peer_python)
    ways = [OURS, *(way for way in arguments.ways.split(",") if way != OURS)]
    if versions is None:
        ways = [way for way in ways if way != PEER]
    measured_at, before = commit(), machine()
    rows, uses = read_file(arguments.data) if arguments.data else read_run(RunDir(arguments.run))
    with tempfile.TemporaryDirectory() as folder:
        data = prepare(rows, uses, arguments, Path(folder))
        print(
            f"{len(rows)} examples, {data['lengths']['mean']} tokens each; "
            f"{data['parameters'] / 1e6:.1f} M parameters; ways: {', '.join(ways)}"
        )
        lines = measure(ways, arguments, Path(folder))
    print_table(lines, data)
    now = datetime.now(UTC)
    label = arguments.label and "-" + arguments.label
    path = RESULTS / f"{now:%Y-%m-%d}-sft-throughput{label}.json"
    report = {
        "what": "real (non-padding) tokens per second of fine-tuning, and held-out loss, by way",
        "date": f"{now:%Y-%m-%d}",
        "commit": measured_at,
        "command": ["python", "benchmarks/sft_throughput.py", *map(shown, sys.argv[1:])],
        "machine": before | {"load_average_at_the_end": machine()["load_average"]},
        "versions": versions or {"trl": None, "torch": torch.__version__},
        "settings": {name: shown(value) for name, value in vars(arguments).items()},
        "data": data,
        "targets": {way: f"ours at least {target} x" for way, target in TARGETS.items()},
        "left_out": [way for way in WAYS if way not in lines],
        "results": lines,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
