"""How fast generation is beside its engine: durable rows, overhead, and ranks that share a run.

    python benchmarks/generation.py [--parts rows,overhead,ranks] [--repeats 3]
        [--peer-python PYTHON]

The engine is a stub: it takes a fixed time for up to so many requests together, and does nothing.

- rows: durable rows per second, against datatrove's inference runner with checkpoints on (see
  datatrove_peer.py; `--peer-python` names a Python that has it). Both have equally many requests in
  flight, of the same latency, on the same file system, and take turns. A unit of ours has twice as
  many chains as there are slots, and the peer more documents than are in flight. A row of ours is
  two calls and a verdict, three durable results; with `answer: last` ("1 call") one call and a
  verdict, and every fourth one call more. A document of the peer is one call, or three, one after
  the other. The peer in use always calls a server, so it is told over HTTP
  (a stub of the same latency, a process of its own: stub_server.py), and, its best case, with the
  call replaced by a pause. Ours in use has its engine in the process; "over HTTP" it calls the same
  stub, verdicts aside. The peer is also told with the stub server that ships with it, with
  checkpoints and without, which is the simplest way to try it; that stub has no latency and answers
  one call at a time. Told for the disk as it is, and with each fsync of either side 3 ms later, as
  on a shared file system.
- overhead: time that isn't the engine's, with 64 slots, 128 runnable chains and steps of 50 ms,
  where each fsync takes 0 or 10 ms (replaced by a pause, so that the disk doesn't matter). For
  four units of 10 s, and for a single one of 5 s. Told while a unit runs, and for the whole stage:
  its start, what is between two units, the last one's publishing and the manifest. Beyond what the
  engine's steps took (on a busy machine a pause is longer than asked for), and beyond the ideal.
- ranks: the same run by 1, 2 and 4 MPI ranks. The clock runs from the first look for work, after
  MPI has joined the processes, to the manifest: starting processes is left out.

Prints tables and writes JSON to benchmarks/results/.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
sys.path.insert(1, str(ROOT / "tests"))

from mpi.launch import environment, missing_mpi, mpiexec  # noqa: E402

from teams_hpc.config import Config  # noqa: E402
from teams_hpc.config.schema import HttpEngineConfig  # noqa: E402
from teams_hpc.generation import equipment, worker  # noqa: E402
from teams_hpc.generation.plan import settle_plan  # noqa: E402
from teams_hpc.llm.base import Completion, Engine, Request, Score, ScoreRequest  # noqa: E402
from teams_hpc.llm.load import load_engine  # noqa: E402
from teams_hpc.runtime.preemption import StopFlag  # noqa: E402
from teams_hpc.runtime.ranks import read_ranks  # noqa: E402
from teams_hpc.storage.atomic import read_json, write_json  # noqa: E402
from teams_hpc.storage.run_dir import RunDir, read_manifest  # noqa: E402

Result = dict[str, Any]
OURS, SIDE, HTTP, ONE_CALL = "teams_hpc", "datatrove", " over HTTP", ", 1 call"
OWN, UNSAFE = " with its own stub", ", no checkpoints"
DURABLE = {
    OURS: (
        "each batch of results by one fdatasync before anything follows from it, with the intents "
        "of what is sent next; then rows as HDF5, fsynced and linked"
    ),
    SIDE: (
        "each request's result by one SQLite commit (synchronous=FULL) from a queue that documents "
        "don't wait for; documents appended to JSONL, never fsynced; no intents"
    ),
}
NUM_SEEDS = 64
_LATE_FSYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
static int late(const char *name, int descriptor) {
    usleep(PAUSE_US);
    return ((int (*)(int)) dlsym(RTLD_NEXT, name))(descriptor);
}
int fsync(int descriptor) { return late("fsync", descriptor); }
int fdatasync(int descriptor) { return late("fdatasync", descriptor); }
"""
_LATE_S = 0.003
_PEER_CALLS = (1, 3)
_REWRITE = "Describe in {seed} words how the parts of a plan fit together, and name one risk. " * 5
_ANSWER = "The parts fit together since each of them needs what the one before it has made. " * 8


@dataclass(frozen=True, kw_only=True)
class Load:
    """A run to time.

    Attributes:
        units, unit_size, num_steps: Its size.
        answer: `every`: a chain has two calls a step; `last`: one, and one more at its end.
        slots: Requests that the engine works on together.
        step_s: How long it takes for them.
        fsync_s: How long an fsync takes; None: the disk's.
        url: Of a server that is the expert; None: an engine in the process.
    """

    units: int
    unit_size: int
    num_steps: int
    slots: int
    step_s: float
    fsync_s: float | None = None
    url: str | None = None
    answer: str = "every"

    @property
    def num_rows(self) -> int:
        return self.units * self.unit_size * self.num_steps

    @property
    def ideal_s(self) -> float:
        """What the slots allow: all of them busy all the time, with two calls a row."""
        return 2 * self.num_rows / self.slots * self.step_s


@dataclass(slots=True)
class StubEngine:
    """Takes `step_s` for up to `slots` requests; every reply is kept, none is real."""

    slots: int
    step_s: float
    busy_s: float = 0.0
    content_id: str = "stub"
    exactness: str = "exact"
    is_model: bool = False
    _pending: list[Request] = field(default_factory=list)

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def add(self, request: Request) -> None:
        self._pending.append(request)

    def step(self) -> list[Completion]:
        taken, self._pending = self._pending[: self.slots], self._pending[self.slots :]
        start = time.monotonic()
        replies = [self._complete(request) for request in taken]  # part of the time it takes
        time.sleep(max(0.0, self.step_s - (time.monotonic() - start)))
        self.busy_s += time.monotonic() - start
        return replies

    def _complete(self, request: Request) -> Completion:
        template = _REWRITE if request.task.kind == "rewrite" else _ANSWER
        return Completion(
            id=request.id,
            text=template.format(seed=request.seed),
            finish_reason="stop",
            prompt_tokens=100,
            completion_tokens=100,
        )

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [Score(log_probabilities=(-9.0, -0.01), prompt_tokens=100) for _ in requests]

    def close(self) -> None:
        """Nothing to free."""


def make_run(root: Path, load: Load) -> tuple[RunDir, Config]:
    """A run directory as the pipeline leaves it, with its plan."""
    num_chains = load.units * load.unit_size
    if num_chains % NUM_SEEDS:
        raise ValueError(f"{num_chains} chains are not a multiple of {NUM_SEEDS} seeds")
    config = Config.model_validate(
        {
            "name": "benchmark",
            "run_dir": str(root),
            "seeds": {"limit": NUM_SEEDS},
            "expert": {"kind": "transformers", "model": "stub", "batch_size": load.slots},
            "reviewer": {"kind": "template"},
            "generate": {
                "policy": "uniform",
                "num_trajectories": num_chains // NUM_SEEDS,
                "num_steps": load.num_steps,
                "answer": load.answer,
                "unit_size": load.unit_size,
            },
        }
    )
    run_dir = RunDir(root)
    for folder in (run_dir.metrics, run_dir.logs):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(run_dir.inputs("generate"), {"digest": "benchmark", "inputs": {}})
    settle_plan(run_dir, config)
    return run_dir, config


def slow_fsync(seconds: float) -> None:
    """From now on, in this process, an fsync takes so long and does nothing."""

    def pause(descriptor: int) -> None:
        if seconds:
            time.sleep(seconds)

    os.fsync = os.fdatasync = pause


def noting(real: Callable[..., None], times: list[float]) -> Callable[..., None]:
    """The same, noting when it began and when it was over."""

    def noted(*args: Any, **kwargs: Any) -> None:
        times.append(time.monotonic())
        real(*args, **kwargs)
        times.append(time.monotonic())

    return noted


def run_child(root: Path, load: Load) -> None:
    """The stage `generate` as this process does it; leaves the times of its parts.

    Clocks of processes on one machine are one clock, so those of several ranks compare.
    """
    run_dir, config = make_run(root, load)
    if load.fsync_s is not None:
        slow_fsync(load.fsync_s)
    stub = StubEngine(load.slots, load.step_s)
    expert: Engine = stub
    if load.url is not None:
        server = f"{load.url}/v1"
        expert = load_engine(
            HttpEngineConfig(base_url=server, model="stub", max_concurrency=load.slots)
        )
    equipment.load_engines = lambda *_, **__: [expert, StubEngine(load.slots, 0.0)]
    work: list[float] = []
    finish: list[float] = []
    units: list[float] = []
    worker._Worker.work = noting(worker._Worker.work, work)
    worker._Worker.finish = noting(worker._Worker.finish, finish)
    worker.UnitRunner.run = noting(worker.UnitRunner.run, units)
    cpu = time.process_time()
    worker.generate(run_dir, config, 0, StopFlag())
    times = {
        "start": work[0],
        "end": finish[-1],
        "in_units": sum(units[1::2]) - sum(units[::2]),
        "engine": stub.busy_s,
        "cpu": time.process_time() - cpu,
    }
    write_json(root / f"times-{read_ranks().rank}.json", times)


def timed_run(
    load: Load, folder: Path, num_ranks: int = 1, more: Mapping[str, str] | None = None
) -> Result:
    """Start the processes of a run and see how long they were at work.

    Args:
        load: The run.
        folder: Where it is put.
        num_ranks: Processes that MPI joins.
        more: Additions to their environment.

    Raises:
        RuntimeError: Something failed, or rows are missing.
    """
    with tempfile.TemporaryDirectory(dir=folder) as root:
        if num_ranks > 1:
            make_run(Path(root), load)
        words = [*(mpiexec(num_ranks) if num_ranks > 1 else ()), sys.executable, __file__]
        done = subprocess.run(
            (*words, "--child", root, json.dumps(vars(load))),
            env={**environment(), **(more or {})},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"a run failed: {done.stderr[-2000:]}")
        times = [read_json(path) for path in Path(root).glob("times-*.json")]
        manifest = read_manifest(RunDir(Path(root)), "generate")
        if len(times) != num_ranks or manifest is None:
            raise RuntimeError(f"{len(times)} of {num_ranks} ranks left their times")
        if manifest["counts"]["kept"] != load.num_rows:
            raise RuntimeError(f"not all of {load.num_rows} rows were kept: {manifest['counts']}")
    return {
        # The first to be through has written the manifest.
        "seconds": min(one["end"] for one in times) - min(one["start"] for one in times),
        "in_units": max(one["in_units"] for one in times),
        "engine": sum(one["engine"] for one in times),
        "cpu": sum(one["cpu"] for one in times),
    }


def summary(values: Sequence[float], digits: int = 4) -> Result:
    """Median and spread."""
    return {
        "median": round(statistics.median(values), digits),
        "lowest": round(min(values), digits),
        "highest": round(max(values), digits),
        "repeats": len(values),
    }


def spread(found: Result, scale: float = 1.0) -> str:
    low, high = scale * found["lowest"], scale * found["highest"]
    return f"{scale * found['median']:>9.2f}   ({low:.2f} to {high:.2f})"


def fsync_ms(folder: Path) -> float:
    """Median of an fdatasync of 16 KiB here, to judge the disk by."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(50):
            file.write(b"x" * 16384)
            file.flush()
            start = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - start)
    return round(1000 * statistics.median(times), 3)


def late_fsync(folder: Path, seconds: float) -> dict[str, str] | None:
    """Environment of a process whose every fsync comes so much later; None without a compiler."""
    if (compiler := shutil.which("cc")) is None:
        return None
    source, library = folder / "late.c", folder / "late.so"
    source.write_text(_LATE_FSYNC)
    pause = f"-DPAUSE_US={round(1e6 * seconds)}"
    words = (compiler, "-shared", "-fPIC", pause, "-o", str(library), str(source), "-ldl")
    subprocess.run(words, check=True)
    return {"LD_PRELOAD": str(library)}


def run_peer(
    python: str,
    folder: Path,
    load: Load,
    documents: int,
    words: Sequence[str],
    more: Mapping[str, str],
) -> Result:
    """What one process of the peer says of itself; `words` are further options of it."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        done = subprocess.run(
            (
                *(python, str(ROOT / "benchmarks" / "datatrove_peer.py"), "--folder", root),
                *("--documents", str(documents), *words),
                *("--in-flight", str(load.slots), "--latency", str(load.step_s)),
            ),
            env={**os.environ, **more},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{SIDE} failed: {done.stderr[-2000:]}")
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def stub_server(latency_s: float) -> Iterator[str]:
    """The address of a server that answers every call after so long."""
    words = (sys.executable, str(ROOT / "benchmarks" / "stub_server.py"))
    with subprocess.Popen(
        (*words, "--latency", str(latency_s)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.communicate(timeout=10)  # closes its input, and it ends


def peer_version(python: str) -> str | None:
    """The peer's version if this Python has it and what its checkpoints need."""
    ask = "import datatrove, aiofiles, aiosqlite, httpx, orjson, xxhash, importlib.metadata as m"
    words = (python, "-c", f"{ask}; print(m.version('datatrove'))")
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


@dataclass(frozen=True, kw_only=True)
class Race:
    """Both sides at the same work, in turn.

    Attributes:
        folder: Where runs are put.
        load: All of ours; a process of the peer has as many in flight as one of ours.
        python: One that has the peer; None: ours alone.
        documents: How many each of its processes makes.
        more: Additions to everybody's environment.
        processes: As many ranks of ours, and as many tasks of the peer, share the machine.
    """

    folder: Path
    load: Load
    python: str | None
    documents: int
    more: Mapping[str, str]
    processes: int

    def round(self) -> Iterator[tuple[str, float]]:
        """Each way once, and how many rows or documents a second it made."""
        with stub_server(self.load.step_s) as url:
            for way, load in (("", self.load), (HTTP, replace(self.load, url=url))):
                for name, answer in (("", "every"), (ONE_CALL, "last")):
                    one = replace(load, answer=answer)
                    ours = timed_run(one, self.folder, self.processes, self.more)
                    yield f"{OURS}{way}{name}", load.num_rows / ours["seconds"]
                for calls in _PEER_CALLS if self.python else ():
                    name = ONE_CALL if calls == 1 else f", {calls} calls"
                    server = ("--url", load.url) if load.url else ()
                    yield f"{SIDE}{way}{name}", self._peer("--calls", str(calls), *server)
        if self.python:
            yield f"{SIDE}{OWN}{ONE_CALL}", self._peer("--own-server")
            yield f"{SIDE}{OWN}{UNSAFE}", self._peer("--own-server", "--no-checkpoints")

    def _peer(self, *words: str) -> float:
        """All its tasks together; what one does before another has begun isn't held against it."""
        assert self.python is not None
        task = partial(
            run_peer, self.python, self.folder, self.load, self.documents, words, self.more
        )
        with ThreadPoolExecutor(self.processes) as pool:
            found = [one.result() for one in [pool.submit(task) for _ in range(self.processes)]]
        return self.processes * self.documents / max(one["seconds"] for one in found)


def measure_rows(folder: Path, repeats: int, python: str, documents: int) -> Result:
    """Durable rows per second, ours and the peer's in turn."""
    load = Load(units=8, unit_size=512, num_steps=4, slots=256, step_s=0.01)
    version = peer_version(python)
    if version is None:
        print(f"{SIDE} is NOT COMPARED: {python} lacks it or what it needs (datatrove_peer.py)")
    numbers = [1, 2]
    if missing := missing_mpi():
        print(f"two processes are NOT MEASURED: this machine lacks {missing}")
        numbers = [1]
    disks: dict[str, Result] = {}
    print(f"durable rows per second, {load.slots} in flight, {1000 * load.step_s:.0f} ms a call")
    with tempfile.TemporaryDirectory() as tools:
        late = late_fsync(Path(tools), _LATE_S)
        if late is None:
            print("a slower disk is NOT MEASURED: there is no C compiler (cc)")
        ways = {"as it is": {}} | ({f"{1000 * _LATE_S:.0f} ms later": late} if late else {})
        for (disk, more), number in product(ways.items(), numbers):
            race = Race(
                folder=folder,
                load=replace(load, units=number * load.units),
                python=python if version else None,
                documents=documents,
                more=more,
                processes=number,
            )
            rates: dict[str, list[float]] = {}
            for name, rate in chain.from_iterable(race.round() for _ in range(repeats)):
                rates.setdefault(name, []).append(rate)
            found = compared(f"fsync {disk}, {number} process{'es' if number > 1 else ''}", rates)
            disks.setdefault(disk, {})[number] = found
    for name, what in DURABLE.items():
        print(f"  {name} makes durable: {what}")
    return {
        "load": vars(load),
        "peer_documents": documents,
        "peer_version": version,
        "fsync_ms": fsync_ms(folder),
        "durable": DURABLE,
        "fsync_then_processes": disks,
        "target": "at least 20 times the peer; as much as a row is a document of 3 calls",
    }


def compared(disk: str, rates: Mapping[str, Sequence[float]]) -> Result:
    """Rows per second of each, and how many times ours are the others'; printed and returned.

    Each way's peers beside ours the same way; those over HTTP also beside ours as both are used,
    and those of one call also beside our rows of one.
    """
    times: dict[str, dict[str, Result]] = {}
    print(f"  {disk}")
    for name, values in rates.items():
        ways = ("", HTTP) if HTTP in name else ("",)
        rows = ("", ONE_CALL) if name.endswith(ONE_CALL) else ("",)
        beside = {
            ours: summary([a / b for a, b in zip(rates[ours], values, strict=True)], 2)
            for ours in (f"{OURS}{way}{row}" for way, row in product(ways, rows))
            if not name.startswith(OURS)
        }
        times[name] = beside
        print(f"    {name:<36} {spread(summary(values))}")
        for ours, ratio in beside.items():
            print(f"      {ours} is {ratio['median']:.1f} x")
    return {
        "rows_per_second": {name: summary(values, 1) for name, values in rates.items()},
        "times_faster": times,
    }


def measure_overhead(folder: Path, repeats: int) -> Result:
    """Time that isn't the engine's, as a share of what is."""
    loads = {
        f"{units} x {steps // 5} s, fsync {ms} ms": Load(
            units=units,
            unit_size=128,
            num_steps=steps,
            slots=64,
            step_s=0.05,
            fsync_s=ms / 1000,
        )
        for units, steps in ((4, 50), (1, 25))
        for ms in (0, 10)
    }
    found: dict[str, list[Result]] = {name: [] for name in loads}
    for _ in range(repeats):
        for name, load in loads.items():
            found[name].append(timed_run(load, folder))
    lines: Result = {}
    for name, load in loads.items():
        ideal = load.ideal_s
        lines[name] = {
            "ideal_s": ideal,
            **{
                f"{part}_beyond_engine": summary(
                    [one[key] / one["engine"] - 1 for one in found[name]]
                )
                for part, key in (("stage", "seconds"), ("units", "in_units"))
            },
            "stage_beyond_ideal": summary([one["seconds"] / ideal - 1 for one in found[name]]),
            "cpu_s": summary([one["cpu"] for one in found[name]], 2),
        }
    first = next(iter(loads.values()))
    print(
        f"\ntime beyond the engine's in %, {first.slots} slots, {first.unit_size} chains, "
        f"{1000 * first.step_s:.0f} ms a step"
    )
    for name, line in lines.items():
        print(f"  {name:<22} whole stage          {spread(line['stage_beyond_engine'], 100)}")
        print(f"  {'':<22} while units run      {spread(line['units_beyond_engine'], 100)}")
        print(f"  {'':<22} stage, beyond ideal  {spread(line['stage_beyond_ideal'], 100)}")
    return {
        "load": {name: vars(load) for name, load in loads.items()},
        "overhead": lines,
        "target": "below 0.03",
    }


def measure_ranks(folder: Path, repeats: int, step_s: float) -> Result | None:
    """How well ranks share a run: time of one, over number times time of several."""
    if missing := missing_mpi():
        print(f"ranks are NOT MEASURED: this machine lacks {missing}")
        return None
    load = Load(units=16, unit_size=64, num_steps=2, slots=64, step_s=step_s)
    sizes = (1, 2, 4)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    cpu: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            one = timed_run(load, folder, size)
            seconds[size].append(one["seconds"])
            cpu[size].append(one["cpu"])
    efficiency = {
        size: summary(
            [a / size / b for a, b in zip(seconds[1], seconds[size], strict=True)],
        )
        for size in sizes
    }
    print("\nefficiency of ranks in %, without the start of processes")
    for size in sizes:
        print(
            f"  {size} ranks  {spread(efficiency[size], 100)}   {spread(summary(seconds[size]))} s"
        )
    return {
        "load": vars(load),
        "seconds": {size: summary(values, 3) for size, values in seconds.items()},
        "cpu_s": {size: summary(values, 2) for size, values in cpu.items()},
        "efficiency": efficiency,
        "left_out": "the start of processes, imports, MPI's own start",
        "target": "at least 0.95",
    }


def machine() -> Result:
    """What it ran on; no names of hosts or people."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def load_average() -> float:
    """How busy the machine is, the benchmark included."""
    return round(os.getloadavg()[0], 2)


def commit() -> str:
    """The commit, marked if the working tree differs from it."""
    found = subprocess.run(
        ("git", "describe", "--always", "--dirty", "--abbrev=12"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="rows,overhead,ranks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with datatrove")
    parser.add_argument("--peer-documents", type=int, default=400)
    parser.add_argument("--rank-step", type=float, default=0.5, help="seconds of a step: ranks")
    parser.add_argument("--folder", type=Path, help="where runs are put; default: as tempfile")
    parser.add_argument("--label", default="", help="added to the name of the results")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(Path(arguments.child[0]), Load(**json.loads(arguments.child[1])))
        return
    folder, repeats = arguments.folder or Path(tempfile.gettempdir()), arguments.repeats
    measured_at, ran_on = commit(), machine()
    parts: dict[str, Callable[[], Result | None]] = {
        "rows": lambda: measure_rows(
            folder, repeats, arguments.peer_python, arguments.peer_documents
        ),
        "overhead": lambda: measure_overhead(folder, repeats),
        "ranks": lambda: measure_ranks(folder, repeats, arguments.rank_step),
    }
    results = {}
    for name in arguments.parts.split(","):
        before = load_average()
        found = parts[name]()
        if found is not None:
            results[name] = {**found, "load_average": [before, load_average()]}
    now = datetime.now(UTC)
    path = RESULTS / f"{now:%Y-%m-%d}-generation{arguments.label and '-' + arguments.label}.json"
    report = {
        "what": "generation beside its engine: durable rows, overhead, ranks",
        "date": f"{now:%Y-%m-%d}",
        "commit": measured_at,
        "command": (
            f"benchmarks/generation.py --parts {arguments.parts} --repeats {repeats} "
            f"--rank-step {arguments.rank_step} --peer-documents {arguments.peer_documents}"
        ),
        "machine": ran_on,
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
