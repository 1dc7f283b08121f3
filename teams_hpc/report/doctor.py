"""What this machine has and lacks, for one configuration or in general."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from teams_hpc.config import Config, LocalEngineConfig
from teams_hpc.config.check import input_faults
from teams_hpc.errors import TeamsError
from teams_hpc.pipeline.room import disk_room, room_faults, room_lines
from teams_hpc.pipeline.submit import submission_faults
from teams_hpc.report.doctor_slurm import slurm_findings
from teams_hpc.report.finding import Finding, fault_of_line
from teams_hpc.rewriting.seeds import read_seeds
from teams_hpc.storage.run_dir import RunDir

_PACKAGES = (
    ("torch", "policy, SFT, local models", True),
    ("transformers", "local models, SFT", True),
    ("deepspeed", "SFT", True),
    ("sb3-contrib", "policy training", True),
    ("h5py", "generation, data set", True),
    ("flash-attn", "flash attention on GPUs: extra 'flash'", False),
    ("liger-kernel", "sft.liger on GPUs: extra 'liger'", False),
    ("vllm", "kind vllm: extra 'vllm'", False),
    ("lm-eval", "ARC, HellaSwag: extra 'eval'", False),
)
_LOW_DISK_GB = 5.0


def _packages(config: Config | None) -> Iterator[Finding]:
    runs_here = config is None or config.site.executor == "local"
    for package, use, needed in _PACKAGES:
        is_needed = needed and runs_here
        try:
            yield Finding(level="ok", what=package, found=metadata.version(package), expected=use)
        except metadata.PackageNotFoundError:
            yield Finding(
                level="fault" if is_needed else "note",
                what=package,
                found="not installed",
                expected=use,
                remedy="make setup, or pip install 'teams-hpc[compute]'" if is_needed else "",
            )


def _machine(config: Config | None) -> Iterator[Finding]:
    yield Finding(level="ok", what="python", found=sys.version.split()[0], expected="3.11 or newer")
    for_each = "some for each process of a run"
    cores = len(os.sched_getaffinity(0))
    yield Finding(level="ok", what="cores", found=str(cores), expected=for_each)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = f"{pages / 2**30:.0f} GiB"
    yield Finding(level="ok", what="memory", found=found, expected=for_each)
    yield _disk(config)
    allocation = os.environ.get("SLURM_JOB_ID")
    yield Finding(
        level="ok",
        what="allocation",
        found=f"Slurm job {allocation}" if allocation else "none",
        expected="any: `submit` asks for its own, `run` works where it is",
    )


def _disk(config: Config | None) -> Finding:
    """Free space where the run is, against what the fine-tuning will write."""
    folder = Path.cwd() if config is None else config.resolved_run_dir
    while not folder.exists():
        folder = folder.parent
    free_gb = shutil.disk_usage(folder).free / 1e9
    needed_gb = max(_LOW_DISK_GB, disk_room(config).total / 1e9 if config else 0.0)
    is_enough = free_gb > needed_gb
    return Finding(
        level="ok" if is_enough else "fault",
        what="free disk",
        found=f"{free_gb:.0f} GB",
        expected=f"more than {needed_gb:.0f} GB where the run directory is",
        remedy="" if is_enough else f"free some space on {folder}, or lower sft.keep_checkpoints",
    )


def _gpus(config: Config | None) -> Iterator[Finding]:
    runs_here = config is None or config.site.executor == "local"
    wanted = 0
    if config is not None and runs_here:
        wanted = max(config.site.gpus_per_node, _ranks_on_gpus(config))
    if importlib.util.find_spec("torch") is None:
        found = "not known: torch is not installed here"
        expected = f"{wanted} here" if runs_here else "none here: the jobs ask Slurm for them"
        yield Finding(level="note", what="GPUs", found=found, expected=expected)
        return
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)})) or "none"
    yield Finding(
        level="fault" if count < wanted else "ok",
        what="GPUs",
        found=f"{count} ({names})" if count else "none",
        expected=str(wanted) if wanted else "none needed",
        remedy="ask the queue for them, or set site.gpus_per_node" if count < wanted else "",
    )


def _ranks_on_gpus(config: Config) -> int:
    return config.site.num_sft_ranks if config.site.gpus_per_node else 0


def _config_findings(config: Config) -> Iterator[Finding]:
    faults = _faults(config)
    yield from map(fault_of_line, faults)
    if not faults:
        for line in room_lines(config)[1:]:
            what, _, found = line.strip().partition(": ")
            yield Finding(level="ok", what=what, found=found, expected="it fits")
    try:
        seeds = read_seeds(config.seeds.path, config.seeds.limit)
    except TeamsError as error:
        yield Finding(level="fault", what="seeds", found=str(error), expected="one or more")
    else:
        found = f"{len(seeds.seeds)} ({seeds.num_duplicates} duplicates dropped)"
        yield Finding(level="ok", what="seeds", found=found, expected="one or more")
    for role in ("instructor", "reviewer", "expert"):
        engine = getattr(config, role)
        model = f" {engine.model}" if isinstance(engine, LocalEngineConfig) else ""
        is_grammar = engine.kind == "template"
        yield Finding(
            level="note" if is_grammar else "ok",
            what=role,
            found=f"{engine.kind}{model}",
            expected="a model, for real data",
            remedy="a grammar, not a model: for tests and first steps" if is_grammar else "",
        )


def _faults(config: Config) -> list[str]:
    try:
        if config.site.executor == "local":
            return [*input_faults(config), *room_faults(config)]
        return submission_faults(config, RunDir(config.resolved_run_dir))
    except TeamsError as error:
        return [str(error)]


def diagnose(config: Config | None) -> list[Finding]:
    """Look at this machine; with a configuration, at all that it names too, and at its cluster."""
    findings = [*_machine(config), *_packages(config), *_gpus(config)]
    if config is None:
        return findings
    findings += _config_findings(config)
    return [*findings, *(slurm_findings(config) if config.site.executor == "slurm" else ())]


def findings_table(findings: list[Finding]) -> Table:
    """The diagnosis for people: found, expected, what to do."""
    colours = {"ok": "green", "note": "yellow", "fault": "red"}
    table = Table(box=None)
    for heading in ("", "what", "found", "expected", "what to do"):
        table.add_column(heading, overflow="fold")
    for line in findings:
        mark = f"[{colours[line.level]}]{line.level}[/]"
        words = (line.what, line.found, line.expected, line.remedy)
        table.add_row(mark, *(escape(word) for word in words))
    return table
