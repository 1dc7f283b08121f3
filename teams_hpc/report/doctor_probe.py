"""One short job on two nodes, and what its processes found there, as lines of a diagnosis."""

import json
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from teams_hpc.cluster.container import CONTAINER_PYTHON
from teams_hpc.cluster.inventory import read_partitions
from teams_hpc.cluster.jobs import JobSpec
from teams_hpc.cluster.preflight import asked_partitions, option_words
from teams_hpc.cluster.probe import TOKEN
from teams_hpc.cluster.slurm import call_slurm
from teams_hpc.cluster.submit import SHELL, sbatch_options
from teams_hpc.config import Config
from teams_hpc.errors import ClusterError
from teams_hpc.report.finding import Finding

Answer = dict[str, Any]

_WAIT_S = 60
_TIMEOUT_S = _WAIT_S + 180.0
_PLACE_OPTIONS = ("partition", "account", "qos", "constraint", "reservation")
_NEEDED = ("teams-hpc", "torch", "transformers", "deepspeed", "h5py")
_BUSY = ("are busy", "down, drained or reserved", "Immediate", "didn't answer", "revoked")
_CLOCK_S = 5.0
_STARTS = "it starts on every node"
_MPI_CODE = "from mpi4py import MPI; print('size', MPI.COMM_WORLD.size, flush=True)"


def probe_findings(config: Config, spec: JobSpec) -> list[Finding]:
    """Run the probe where jobs like `spec` would run."""
    try:
        with _shared_folder(config.resolved_run_dir) as folder:
            return _probe(config, spec, folder)
    except OSError as error:
        found = f"can't write to {error.filename}: {error.strerror}"
        return [Finding(level="note", what="nodes", found=f"not asked, {found}")]


@contextmanager
def _shared_folder(run_dir: Path) -> Iterator[Path]:
    """A fresh folder with a token, on the file system of the run directory."""
    existing = run_dir
    while not existing.is_dir():
        existing = existing.parent
    folder = Path(tempfile.mkdtemp(prefix=".teams-hpc-doctor-", dir=existing))
    try:
        (folder / TOKEN).write_text(secrets.token_hex(8), encoding="utf-8")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _probe(config: Config, spec: JobSpec, folder: Path) -> list[Finding]:
    token = (folder / TOKEN).read_text(encoding="utf-8")
    start = time.time()
    try:
        step = _step_words(config, spec)
        text = call_slurm(*step, *_probe_words(config, folder), timeout_s=_TIMEOUT_S)
    except ClusterError as error:
        return [_no_answer(error)]
    answers = _answers(text)
    if not answers:
        return [Finding(level="fault", what="nodes", found="the probe said nothing")]
    findings = [*_place_lines(config, answers, token), _clocks(answers, start, time.time())]
    findings += _node_lines(config, spec, answers)
    return [*findings, *_mpi(config, answers, step)]


def _step_words(config: Config, spec: JobSpec) -> list[str]:
    """`srun` for two tasks, on two nodes where there are two."""
    options = sbatch_options(config, spec)
    partitions, _ = asked_partitions(config, spec, read_partitions())
    most = max((min(one.num_nodes, one.node_limit or 2) for one in partitions), default=1)
    asked = {name: options[name] for name in _PLACE_OPTIONS if name in options}
    asked |= {"immediate": _WAIT_S, "time": 2, "job-name": f"{config.name}-doctor"}
    asked |= {"nodes": 2 if most > 1 else 1, "ntasks": 2, "cpus-per-task": 1}
    if spec.gpus_per_node:
        asked["gpus-per-node"] = 1
    if spec.mem_gb:
        asked["mem"] = "1G"
    return ["srun", *option_words(asked)]


def _probe_words(config: Config, folder: Path) -> list[str]:
    words = [sys.executable, "-m", "teams_hpc.cluster.probe", str(folder)]
    if config.site.slurm.scratch is not None:
        words += ["--scratch", str(config.site.slurm.scratch)]
    container = config.site.container
    if container is not None:
        words += ["--runtime", container.kind, "--image", str(container.image)]
    return words


def _no_answer(error: ClusterError) -> Finding:
    words = str(error)
    if any(busy in words for busy in _BUSY):
        remedy = f"no nodes within {_WAIT_S} s; run doctor again when the queue is shorter"
        return Finding(level="note", what="nodes", found=f"not asked: {words}", remedy=remedy)
    remedy = f"does every node see {sys.executable}?"
    return Finding(level="fault", what="nodes", found=words, remedy=remedy)


def _answers(text: str) -> list[Answer]:
    answers = []
    for line in text.splitlines():
        try:
            answer = json.loads(line)
        except ValueError:
            continue
        if isinstance(answer, dict) and "rank" in answer:
            answers.append(answer)
    return sorted(answers, key=lambda answer: int(answer["rank"]))


def _names(answers: Sequence[Answer]) -> str:
    return ", ".join(dict.fromkeys(str(answer["node"]) for answer in answers))


def _line(what: str, is_good: bool, found: str, *, expected: str = "", remedy: str = "") -> Finding:
    return Finding(
        level="ok" if is_good else "fault",
        what=what,
        found=found,
        expected=expected,
        remedy="" if is_good else remedy,
    )


def _place_lines(config: Config, answers: Sequence[Answer], token: str) -> Iterator[Finding]:
    """What the nodes see of the run directory, and how it behaves between them."""
    yield _line("nodes", len(answers) == 2, _names(answers), expected="two processes answer")
    if len({answer["node"] for answer in answers}) == 1:
        found = "one node alone: what follows says nothing of several"
        yield Finding(level="note", what="between nodes", found=found)
    blind = [answer for answer in answers if answer.get("token") != token]
    if blind:
        words = blind[0].get("error", "another folder is there")
        yield _line(
            "run directory on the nodes",
            False,
            f"not seen by {_names(blind)}: {words}",
            expected="seen by all of them",
            remedy="set run_dir=PATH to a folder that all nodes see (NFS, Lustre, GPFS ...)",
        )
        return
    yield _line("run directory on the nodes", True, "seen by all of them", expected="the same")
    winners = sum(bool(answer["wins_link"]) for answer in answers)
    renames = all(answer["renames_over"] for answer in answers)
    yield _line(
        "exclusive link, rename over",
        winners == 1 and renames,
        f"{winners} of {len(answers)} took one name; rename {'works' if renames else 'fails'}",
        expected="exactly one, works",
        remedy="leases need both: choose a run_dir on another file system",
    )
    yield _beats(config, answers)


def _beats(config: Config, answers: Sequence[Answer]) -> Finding:
    delays = [answer["beat_s"] for answer in answers]
    expected = f"well under site.lease_s, {config.site.lease_s:g} s"
    if None in delays:
        found = "one node doesn't see what another one writes"
        remedy = "choose a run_dir on another file system"
        return _line("heartbeat between nodes", False, found, expected=expected, remedy=remedy)
    slowest = max(delays)
    return _line(
        "heartbeat between nodes",
        slowest < config.site.lease_s / 4,
        f"answered within {slowest:.1f} s",
        expected=expected,
        remedy=f"set site.lease_s to {8 * slowest:.0f} or more",
    )


def _clocks(answers: Sequence[Answer], start: float, end: float) -> Finding:
    """Clocks between the nodes, and against this machine's as far as one call shows it."""
    between = [abs(answer.get("clock_difference_s") or 0.0) for answer in answers]
    from_here = [max(start - answer["time"], answer["time"] - end, 0.0) for answer in answers]
    worst = max(*between, *from_here)
    return Finding(
        level="ok" if worst < _CLOCK_S else "note",
        what="clocks",
        found=f"at most {worst:.1f} s apart",
        expected=f"less than {_CLOCK_S:g} s",
        remedy="" if worst < _CLOCK_S else "ask your cluster for NTP: jobs read their end from it",
    )


def _node_lines(config: Config, spec: JobSpec, answers: Sequence[Answer]) -> Iterator[Finding]:
    for answer in answers:
        if "error" in answer["scratch"]:
            state = answer["scratch"]
            yield _line(
                f"scratch of {answer['node']}",
                False,
                f"{state['folder']}: {state['error']}",
                expected="a folder to write to",
                remedy="set site.slurm.scratch to a folder that every node has and you may write",
            )
    free = [answer["scratch"]["free_gb"] for answer in answers if "free_gb" in answer["scratch"]]
    if len(free) == len(answers):
        folder = answers[0]["scratch"]["folder"]
        found = f"{folder}, {min(free):.0f} GB free"
        yield _line("scratch of the nodes", True, found, expected="a folder to write to")
    gpus = sorted({str(answer["gpus"]) for answer in answers if answer["gpus"]})
    yield Finding(
        level="ok" if gpus or not spec.gpus_per_node else "note",
        what="GPUs and driver of the nodes",
        found="; ".join(gpus) or "nvidia-smi shows none",
        expected=f"{spec.gpus_per_node} GPUs of each node" if spec.gpus_per_node else "none needed",
    )
    yield from _container(config, answers)
    yield from _packages(config, answers)


def _container(config: Config, answers: Sequence[Answer]) -> Iterator[Finding]:
    container = config.site.container
    if container is None:
        return
    without = [answer for answer in answers if not answer["runtime"]]
    blind = [answer for answer in answers if not answer["image"]]
    dumb = [answer for answer in answers if isinstance(answer.get("container"), str)]
    if without:
        found = f"no {container.kind} on {_names(without)}"
        remedy = "name its module in site.slurm.modules (modules are not loaded for this probe)"
        what = "container runtime"
        yield Finding(level="note", what=what, found=found, expected=_STARTS, remedy=remedy)
    if blind:
        found = f"{container.image} is not seen by {_names(blind)}"
        remedy = "put it where all nodes see it"
        yield _line("container image", False, found, expected=_STARTS, remedy=remedy)
    if dumb:
        found = f"on {_names(dumb)}: {dumb[0]['container']}"
        remedy = "does it hold this package and python3?"
        yield _line("container", False, found, expected=_STARTS, remedy=remedy)
    if not (without or blind or dumb):
        found = f"{container.kind} starts {container.image.name}"
        yield _line("container", True, found, expected=_STARTS)


def _node_packages(config: Config, answers: Sequence[Answer]) -> list[dict[str, str]]:
    """What tasks will find: in the container where there is one. Empty if that isn't known."""
    key = "packages" if config.site.container is None else "container"
    found = [answer.get(key) for answer in answers]
    return [one for one in found if isinstance(one, dict)]


def _packages(config: Config, answers: Sequence[Answer]) -> Iterator[Finding]:
    found = _node_packages(config, answers)
    if not found:
        return
    flash = config.sft.attention == "flash_attention_2"
    for name in (*_NEEDED, "cuda", "nccl", "flash-attn"):
        versions = sorted({one.get(name, "") for one in found})
        is_needed = name in _NEEDED or (name == "flash-attn" and flash)
        is_good = len(versions) == 1 and bool(versions[0] or not is_needed)
        text = ", ".join(version or "not installed" for version in versions)
        remedy = "install the same on all nodes"
        if name == "flash-attn" and flash:
            remedy = "install the extra 'flash', or set sft.attention=sdpa"
        expected = "the same on all" if is_needed else "the same on all, or none"
        yield _line(f"{name} on the nodes", is_good, text, expected=expected, remedy=remedy)


def _mpi(config: Config, answers: Sequence[Answer], step: Sequence[str]) -> Iterator[Finding]:
    """Whether `srun --mpi` and the nodes' MPI speak the same protocol: else two worlds of one."""
    wanted, container = config.site.slurm.mpi, config.site.container
    if wanted is None:
        return
    what = f"MPI with --mpi={wanted}"
    if not any("mpi4py" in one for one in _node_packages(config, answers)):
        yield Finding(level="note", what=what, found="not tried: no mpi4py on the nodes")
        return
    told = dict(config.site.slurm.environment)
    python = [sys.executable]
    if container is not None:  # entered as tasks enter it
        told |= {"TEAMS_HPC_IMAGE": str(container.image), "TEAMS_HPC_CONTAINER": container.kind}
        python = ["sh", str(SHELL / "task.sh"), CONTAINER_PYTHON]
    words = ["env", *(f"{name}={value}" for name, value in told.items())]
    try:
        command = (*step, f"--mpi={wanted}", *words, *python, "-c", _MPI_CODE)
        text = call_slurm(*command, timeout_s=_TIMEOUT_S)
    except ClusterError as error:
        refused = _no_answer(error)
        remedy = "choose another site.slurm.mpi; `srun --mpi=list` shows them"
        yield Finding(level=refused.level, what=what, found=refused.found, remedy=remedy)
        return
    sizes = [line.split()[1] for line in text.splitlines() if line.startswith("size ")]
    yield _line(
        what,
        sizes == ["2", "2"],
        f"worlds of size {' and '.join(sizes) or 'unknown'}",
        expected="one world of size 2",
        remedy="a wrong --mpi starts single processes without an error; choose another one",
    )
