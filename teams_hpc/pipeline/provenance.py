"""Which machine, command and versions worked on a run: beside its data, never part of it."""

import os
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from teams_hpc import __version__
from teams_hpc.storage.atomic import read_json, write_json
from teams_hpc.storage.run_dir import RunDir


def git_commit() -> str | None:
    """The commit this code is from: of its checkout, or of what its image was made from."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():  # installed; a repository further up is somebody else's
        return os.environ.get("TEAMS_HPC_REVISION")  # an image says it
    try:
        found = subprocess.run(
            (  # noqa: S607 (whichever git is on PATH)
                "git",
                "-C",
                str(checkout),
                "rev-parse",
                "HEAD",
            ),
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def record_provenance(run_dir: RunDir) -> None:
    """Add this session to `provenance.json`: when, where, with what."""
    packages = ("torch", "transformers", "deepspeed", "sb3-contrib", "h5py", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    session = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "command": sys.argv[1:],
        "teams_hpc": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cores": os.cpu_count(),
        "packages": versions,
    }
    sessions = read_json(run_dir.provenance)["sessions"] if run_dir.provenance.exists() else []
    write_json(run_dir.provenance, {"sessions": [*sessions, session]})
