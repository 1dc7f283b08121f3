"""What this machine has and lacks, for one configuration or in general."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.table import Table

from teams_hpc.config import Config, TransformersEngineConfig
from teams_hpc.config.check import input_faults
from teams_hpc.errors import TeamsError
from teams_hpc.rewriting.seeds import read_seeds

Level = Literal["ok", "note", "fault"]

_PACKAGES = (
    ("torch", "policy, SFT, local models", True),
    ("transformers", "local models, SFT", True),
    ("deepspeed", "SFT", True),
    ("sb3-contrib", "policy training", True),
    ("h5py", "generation, data set", True),
    ("flash-attn", "flash attention on GPUs: extra 'flash'", False),
    ("lm-eval", "ARC, HellaSwag: extra 'eval'", False),
)
_LOW_DISK_GB = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the diagnosis."""

    level: Level
    what: str
    found: str
    expected: str = ""
    remedy: str = ""

    @property
    def is_fault(self) -> bool:
        return self.level == "fault"


def _packages() -> Iterator[Finding]:
    for package, use, is_needed in _PACKAGES:
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


def _machine(folder: Path) -> Iterator[Finding]:
    yield Finding(level="ok", what="python", found=sys.version.split()[0], expected="3.11 or newer")
    cores = len(os.sched_getaffinity(0))
    yield Finding(level="ok", what="cores", found=str(cores))
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield Finding(level="ok", what="memory", found=f"{pages / 2**30:.0f} GiB")
    while not folder.exists():
        folder = folder.parent
    free_gb = shutil.disk_usage(folder).free / 1e9
    yield Finding(
        level="ok" if free_gb > _LOW_DISK_GB else "fault",
        what="free disk",
        found=f"{free_gb:.0f} GB",
        expected=f"more than {_LOW_DISK_GB:.0f} GB where the run directory is",
        remedy="" if free_gb > _LOW_DISK_GB else f"free some space on {folder}",
    )
    allocation = os.environ.get("SLURM_JOB_ID")
    yield Finding(
        level="ok", what="allocation", found=f"Slurm job {allocation}" if allocation else "none"
    )


def _gpus(config: Config | None) -> Iterator[Finding]:
    wanted = 0 if config is None else max(config.site.gpus_per_node, _ranks_on_gpus(config))
    if importlib.util.find_spec("torch") is None:
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
    for fault in input_faults(config):
        key, _, text = fault.partition(": ")
        found, _, remedy = text.partition("; ")
        yield Finding(level="fault", what=key, found=found, remedy=remedy)
    try:
        seeds = read_seeds(config.seeds.path, config.seeds.limit)
    except TeamsError as error:
        yield Finding(level="fault", what="seeds", found=str(error))
    else:
        found = f"{len(seeds.seeds)} ({seeds.num_duplicates} duplicates dropped)"
        yield Finding(level="ok", what="seeds", found=found)
    for role in ("instructor", "reviewer", "expert"):
        engine = getattr(config, role)
        model = f" {engine.model}" if isinstance(engine, TransformersEngineConfig) else ""
        is_grammar = engine.kind == "template"
        yield Finding(
            level="note" if is_grammar else "ok",
            what=role,
            found=f"{engine.kind}{model}",
            remedy="a grammar, not a model: for tests and first steps" if is_grammar else "",
        )


def diagnose(config: Config | None) -> list[Finding]:
    """Look at this machine; with a configuration, at all that it names too."""
    folder = Path.cwd() if config is None else config.resolved_run_dir
    findings = [*_machine(folder), *_packages(), *_gpus(config)]
    return [*findings, *(_config_findings(config) if config else ())]


def findings_table(findings: list[Finding]) -> Table:
    """The diagnosis for people: found, expected, what to do."""
    colours = {"ok": "green", "note": "yellow", "fault": "red"}
    table = Table(box=None)
    for heading in ("", "what", "found", "expected", "what to do"):
        table.add_column(heading, overflow="fold")
    for line in findings:
        mark = f"[{colours[line.level]}]{line.level}[/]"
        table.add_row(mark, line.what, line.found, line.expected, line.remedy)
    return table
