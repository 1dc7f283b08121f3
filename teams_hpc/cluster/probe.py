"""What a cluster's nodes see: run by `doctor` through srun, one process on each of two nodes.

    python -m teams_hpc.cluster.probe FOLDER [--scratch DIR] [--runtime NAME --image FILE]

Each process prints one JSON line. Needs nothing but the standard library.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

TOKEN = "token"
TIMEOUT_S = 30.0
_PERIOD_S = 0.1
_ECHOES = 5
_TOOL_TIMEOUT_S = 40.0
_PACKAGES = ("teams-hpc", "torch", "transformers", "deepspeed", "h5py", "flash-attn", "mpi4py")


def packages() -> dict[str, str]:
    """Versions of what stages need, and of CUDA and NCCL, whatever their packages are called."""
    found = {}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    for package in metadata.distributions():
        name = package.metadata["Name"] or ""
        for prefix, short in (("nvidia-nccl", "nccl"), ("nvidia-cuda-runtime", "cuda")):
            if name.startswith(prefix):
                found[short] = package.version
    return found


def container_packages(runtime: str, image: str) -> dict[str, str] | str:
    """`packages` inside the container; words if it doesn't start."""
    command = [runtime, "exec", image, "python3", "-m", "teams_hpc.cluster.probe", "--packages"]
    said, error = _output(command)
    if said is None:
        return error
    try:
        found: dict[str, str] = json.loads(said)
    except ValueError:
        return f"said {said[:200]!r}"
    return found


def gpu_driver() -> str | None:
    """GPUs and driver as nvidia-smi tells them; None without."""
    said, _ = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    return None if said is None else "; ".join(sorted(set(said.strip().splitlines())))


def _output(command: Sequence[str]) -> tuple[str | None, str]:
    """Standard output of a command that succeeds, or None and why not."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_TOOL_TIMEOUT_S, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return None, f"no command {command[0]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        return None, words[-1] if words else f"exit code {done.returncode}"
    return done.stdout, ""


def wins_link(folder: Path, rank: int) -> bool:
    """Take one name by an exclusive `link`; of all processes just one may succeed."""
    own = folder / f"claim-{rank}"
    own.write_text(str(rank), encoding="utf-8")
    try:
        os.link(own, folder / "claim")
    except FileExistsError:
        return False
    return True


def renames_over(folder: Path, rank: int) -> bool:
    """Whether a file that is renamed over another one replaces it, as seen from here."""
    target, fresh = folder / f"rename-{rank}", folder / f"rename-{rank}.tmp"
    target.write_text("old", encoding="utf-8")
    fresh.write_text("new", encoding="utf-8")
    fresh.replace(target)
    return target.read_text(encoding="utf-8") == "new" and not fresh.exists()


def exchange_beats(folder: Path, rank: int, world: int) -> tuple[float | None, float | None]:
    """Show a heartbeat to the others and look at theirs, until each has seen a few of each.

    Returns:
        The longest time until a beat of ours was answered by another node's beat, and the
        difference between the clocks; None where the others' beats were not seen.
    """
    others = [other for other in range(world) if other != rank]
    sent: dict[int, float] = {}
    heard: dict[int, dict[str, Any]] = {}
    answered: dict[int, float] = {}
    differences: list[float] = []
    start = time.monotonic()
    count = 0
    while time.monotonic() - start < TIMEOUT_S:
        count += 1
        has_all = len(answered) >= _ECHOES
        seen = {str(other): beat["count"] for other, beat in heard.items()}
        sent[count] = time.monotonic()
        _write_beat(folder, rank, {"count": count, "seen": seen, "done": has_all})
        if has_all and all(heard[other]["done"] for other in others):
            break
        time.sleep(_PERIOD_S)
        for other in others:
            beat = _read_beat(folder, other)
            if beat is None or beat["count"] == heard.get(other, {}).get("count"):
                continue
            heard[other] = beat
            differences.append(time.time() - beat["time"])
        if len(heard) == len(others):
            known = min((beat["seen"].get(str(rank), 0) for beat in heard.values()), default=count)
            if known and known not in answered:
                answered[known] = time.monotonic() - sent[known]
    slowest = max(answered.values()) if answered else None
    return slowest, min(differences, key=abs) if differences else None


def _write_beat(folder: Path, rank: int, beat: dict[str, Any]) -> None:
    fresh = folder / f"beat-{rank}.tmp"
    fresh.write_text(json.dumps({**beat, "time": time.time()}), encoding="utf-8")
    fresh.replace(folder / f"beat-{rank}")


def _read_beat(folder: Path, rank: int) -> dict[str, Any] | None:
    try:
        beat: dict[str, Any] = json.loads((folder / f"beat-{rank}").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return beat


def scratch_state(folder: Path) -> dict[str, Any]:
    """Whether the node's own folder can be written to, and how much is free there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        return {"folder": str(folder), "free_gb": shutil.disk_usage(folder).free / 1e9}
    except OSError as error:
        return {"folder": str(folder), "error": error.strerror or str(error)}


def folder_state(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """What the run directory's file system does when several nodes use it."""
    try:
        token = (folder / TOKEN).read_text(encoding="utf-8")
        link, rename = wins_link(folder, rank), renames_over(folder, rank)
        slowest, difference = exchange_beats(folder, rank, world)
    except OSError as error:
        return {"error": f"{error.filename}: {error.strerror}"}
    return {
        "token": token,
        "wins_link": link,
        "renames_over": rename,
        "beat_s": slowest,
        "clock_difference_s": difference,
    }


def look_around(options: argparse.Namespace) -> dict[str, Any]:
    """Everything one process finds on its node."""
    rank, world = (int(os.environ.get(f"SLURM_{name}", "0")) for name in ("PROCID", "NTASKS"))
    answer: dict[str, Any] = {
        "rank": rank,
        "node": os.environ.get("SLURMD_NODENAME") or platform.node(),
        "time": time.time(),
        "python": platform.python_version(),
        **folder_state(options.folder, rank, max(1, world)),
        "scratch": scratch_state(options.scratch or Path(tempfile.gettempdir())),
        "gpus": gpu_driver(),
        "packages": packages(),
    }
    if options.image is not None:
        answer["image"] = Path(options.image).exists()
        answer["runtime"] = shutil.which(options.runtime)
        if answer["image"] and answer["runtime"]:
            answer["container"] = container_packages(options.runtime, options.image)
    return answer


def main(words: Sequence[str] | None = None) -> None:
    """Print one JSON line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path())
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--runtime", default="apptainer")
    parser.add_argument("--image")
    parser.add_argument("--packages", action="store_true")
    options = parser.parse_args(words)
    answer = packages() if options.packages else look_around(options)
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
