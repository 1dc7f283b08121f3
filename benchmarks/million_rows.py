"""Generation and data set at a million rows: seconds, peak memory, files; scans of 10,000 units.

    python benchmarks/million_rows.py [--seeds 50000] [--trajectories 5] [--steps 4] [--folder PATH]

Seeds are synthetic, one in ten a near-duplicate of an earlier one; the expert is the grammar
(`template`), so that the suite's own work is what is timed. Every step is a process of its own and
peak memory is the resident set the kernel reports for it, mapped files included. What the passes of
the data set take, the comparing of near-duplicates among them, is read off its progress file.

Scans are timed on a run of 10,000 units of which one is still to be made; nearly all its unit files
are copies of a real one. `restart` is a worker that finds what is done, makes the last unit and
writes the manifest; `status, every unit opened` is what a scan takes without the workers' lines.

Writes JSON to benchmarks/results/. With `--folder` the runs are kept there, and stages that are
done are passed over.
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from teams_hpc.config import load_config
from teams_hpc.generation.published import PublishedLines
from teams_hpc.pipeline.start import prepared_run
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.run_dir import RunDir
from teams_hpc.storage.shards import Table

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
_LOOK_S = 0.25
_HAS_ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
FRAMES = (
    "Explain how {} changes {} when {} is near {} and {}.",
    "List {} uses of {} that a {} from {} would name first.",
    "Write a short letter in which {} asks {} for {} before {}.",
    "Compare {} with {} for someone who knows {} but not {}.",
    "What follows from {} if {} and {} never met in {}?",
    "Compute the cost of {} {} when each {} needs {} of {}.",
    "Translate the saying about {} and {} into plain words for {}.",
    "Write a function that sorts {} by {} and leaves out every {} of {}.",
)
SYLLABLES = ("ka", "lo", "mi", "ren", "tu", "sha", "vel", "dor", "pim", "ast", "or", "une", "gri")
CONFIG = """name: million
extends: {site}
run_dir: {run}
seeds: {{path: {seeds}}}
site: {{num_workers: 1}}
generate: {{policy: uniform, num_trajectories: {trajectories}, num_steps: {steps},
           unit_size: {unit_size}}}
sft: {{sequence_length: 2048, model: {{vocab_size: 4096, max_position_embeddings: 2048}}}}
"""


def write_seeds(path: Path, count: int) -> None:
    """So many distinct instructions, as JSON lines."""
    source = random.Random(11)
    words = ["".join(source.choices(SYLLABLES, k=source.randrange(2, 5))) for _ in range(20_000)]
    made: dict[str, None] = {}
    recent: list[str] = []
    while len(made) < count:
        if recent and source.random() < 0.1:
            parts = source.choice(recent).split(" ")
            parts[source.randrange(len(parts))] = source.choice(words)
            text = " ".join(parts)
        else:
            frame = source.choice(FRAMES)
            text = frame.format(*(source.choice(words) for _ in range(frame.count("{}"))))
            text += f" Keep {source.choice(words)} and {source.choice(words)} in view."
        made[text] = None
        recent = [*recent[-999:], text]
    lines = (json.dumps({"instruction": text}) + "\n" for text in made)
    path.write_text("".join(lines), encoding="utf-8")


def prepare(folder: Path, **sizes: int) -> RunDir:
    """Seeds and run directory."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds, config = folder / "seeds.jsonl", folder / "million.yaml"
    if not seeds.exists():
        write_seeds(seeds, sizes["seeds"])
    names = {key: value for key, value in sizes.items() if key != "seeds"}
    site = ROOT / "configs" / "sites" / "local.yaml"
    text = CONFIG.format(site=site, run=folder / "run", seeds=seeds, **names)
    config.write_text(text, encoding="utf-8")
    with prepared_run(load_config(config), stop=StopFlag()) as run_dir:
        return run_dir


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HDF5_USE_FILE_LOCKING": "FALSE"}


def measured(words: Sequence[str], log: Path, progress: Path | None = None) -> dict[str, Any]:
    """Run one `teams-hpc` command: seconds, CPU seconds, peak resident MiB.

    Args:
        words: The command.
        log: Where its output goes.
        progress: A file that says what it is at; then also the seconds of each of its passes.

    Raises:
        RuntimeError: It failed.
    """
    start = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            (sys.executable, "-m", "teams_hpc", *words),
            stdout=output,
            stderr=output,
            env=environment(),
        )
        passes: Counter[str] = Counter()
        while progress is not None and not os.waitid(os.P_PID, process.pid, _HAS_ENDED):
            time.sleep(_LOOK_S)
            if progress.exists():
                message = json.loads(progress.read_text(encoding="utf-8"))["message"]
                passes[message.partition(":")[0]] += 1
        _, state, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(state)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} failed, see {log}")
    return {
        "seconds": round(time.monotonic() - start, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_mib": round(used.ru_maxrss / 1024, 1),
        **({"passes_s": {at: round(_LOOK_S * n, 1) for at, n in passes.items()}} if passes else {}),
    }


def measure(run_dir: RunDir, log: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every step of the large run with what it took."""
    run = str(run_dir.root)
    for stage in ("generate", "dataset"):
        if not run_dir.manifest(stage).exists():
            progress = run_dir.progress(stage) if stage == "dataset" else None
            yield stage, measured(("stage", stage, run), log, progress)
    yield "status", measured(("status", run), log)
    yield "inspect a unit", measured(("inspect", str(run_dir.shard(0))), log)
    yield "inspect dataset.h5", measured(("inspect", str(run_dir.dataset_rows)), log)
    yield "inspect packed.h5", measured(("inspect", str(run_dir.packed_rows)), log)


def make_units(run_dir: RunDir, num_units: int, log: Path) -> None:
    """All units but one: some by a worker that is then stopped, the rest copied from the first."""
    words = (sys.executable, "-m", "teams_hpc", "stage", "generate", str(run_dir.root))
    with log.open("ab") as output:
        worker = subprocess.Popen(words, stdout=output, stderr=output, env=environment())
    while not run_dir.shard(2).exists() and worker.poll() is None:
        time.sleep(0.01)
    worker.terminate()
    worker.wait(timeout=60)
    lines = PublishedLines(run_dir)
    with Table.open(run_dir.shard(0)) as table:
        attrs = table.attrs
    for unit in range(num_units - 1):
        if not run_dir.shard(unit).exists():
            shutil.copyfile(run_dir.shard(0), run_dir.shard(unit))
            lines.add(unit, attrs)


def measure_scans(folder: Path, num_units: int, log: Path) -> dict[str, dict[str, Any]]:
    """Status and restart of a run of many units that is not done."""
    run_dir = prepare(folder, seeds=num_units, trajectories=1, steps=1, unit_size=1)
    make_units(run_dir, num_units, log)
    run, lines = str(run_dir.root), run_dir.generate / "published"
    lines.rename(lines.with_name("aside"))
    found = {"status, every unit opened": measured(("status", run), log)}
    lines.with_name("aside").rename(lines)
    found["status"] = measured(("status", run), log)
    found["restart"] = measured(("stage", "generate", run), log)
    return found


def describe(run_dir: RunDir) -> dict[str, Any]:
    """What was made, from the manifests and the file system."""
    generate = json.loads(run_dir.manifest("generate").read_text(encoding="utf-8"))
    dataset = json.loads(run_dir.manifest("dataset").read_text(encoding="utf-8"))
    files = [path for path in run_dir.root.rglob("*") if path.is_file()]
    return {
        "rows": generate["counts"],
        "units": len(generate["units"]),
        "dataset": dataset["counts"],
        "dataset_sha256": dataset["files"],
        "packing": dataset["packing"],
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "dataset_bytes": run_dir.dataset_rows.stat().st_size,
        "packed_bytes": run_dir.packed_rows.stat().st_size,
    }


def machine() -> Mapping[str, Any]:
    """What it ran on; no names of hosts or people."""
    return {
        "machine": platform.machine(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """The commit, marked if the working tree differs from it."""
    words = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


def show(name: str, took: Mapping[str, Any]) -> None:
    print(f"{name:<26} {took['seconds']:9.2f} s {took['peak_mib']:8.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50_000)
    parser.add_argument("--trajectories", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--unit-size", type=int, default=2000, help="chains of a unit")
    parser.add_argument("--scan-units", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="keep the runs there")
    arguments = parser.parse_args()
    sizes = {key: getattr(arguments, key) for key in ("seeds", "trajectories", "steps")}
    sizes["unit_size"] = arguments.unit_size
    steps: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).absolute()
        run_dir = prepare(folder / "rows", **sizes)
        for name, took in measure(run_dir, folder / "log"):
            steps[name] = took
            show(name, took)
        scans = measure_scans(folder / "scans", arguments.scan_units, folder / "log")
        for name, took in scans.items():
            show(name, took)
        made = describe(run_dir)
    day = time.strftime("%Y-%m-%d")
    result = {
        "what": "generation and data set, the suite's own work",
        "date": day,
        "command": "benchmarks/million_rows.py",
        "commit": commit(),
        "machine": machine(),
        "settings": {**sizes, "scan_units": arguments.scan_units},
        "steps": steps,
        "scans": scans,
        "made": made,
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{day}-rows-{made['rows']['attempted']}.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
