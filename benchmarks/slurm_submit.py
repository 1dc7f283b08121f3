"""How long `submit` and `status` take for an array of many tasks, on the tests' private Slurm.

    python benchmarks/slurm_submit.py [--tasks 1000] [--repeats 3]

The nodes are drained, so that tasks wait and the commands alone are timed. Every call of one of
Slurm's commands is counted. Needs Slurm's packages (README, "Developing").
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from slurm.cluster import SlurmCluster, temporary_cluster  # noqa: E402

COMMANDS = ("sbatch", "sacct", "squeue", "scontrol", "sinfo", "sacctmgr", "srun")
CONFIG = """name: many
extends: {site}
policy: {{num_members: {tasks}, iterations: 2}}
"""


def counting_path(folder: Path) -> tuple[str, Path]:
    """A PATH whose Slurm commands note each call in a file, and that file."""
    calls = folder / "calls"
    for name in COMMANDS:
        real = shutil.which(name)
        script = folder / name
        script.write_text(f'#!/bin/sh\necho {name} >> {calls}\nexec {real} "$@"\n')
        script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}", calls


def timed(cluster: SlurmCluster, path: str, calls: Path, *words: str) -> dict[str, object]:
    """Seconds of one `teams-hpc` command, and how often it called which command of Slurm."""
    calls.write_text("")
    start = time.monotonic()
    subprocess.run(
        (sys.executable, "-m", "teams_hpc", *words),
        env={**cluster.environment, "PATH": path},
        stdout=subprocess.DEVNULL,
        timeout=600,
        check=True,
    )
    seconds = time.monotonic() - start
    names = calls.read_text().split()
    return {"seconds": seconds, "calls": {name: names.count(name) for name in sorted(set(names))}}


def measure(num_tasks: int, repeats: int) -> dict[str, list[dict[str, object]]]:
    """`submit`, `submit` again (everything adopted) and `status`, some times each."""
    found: dict[str, list[dict[str, object]]] = {"submit": [], "submit again": [], "status": []}
    with TemporaryDirectory() as folder, temporary_cluster() as cluster:
        path, calls = counting_path(Path(folder))
        for node in cluster.nodes:
            cluster.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=bench")
        config = Path(folder) / "many.yaml"
        site = ROOT / "configs" / "sites" / "slurm-test.yaml"
        config.write_text(CONFIG.format(site=site, tasks=num_tasks))
        for number in range(repeats):
            run = f"{folder}/run{number}"
            words = ("submit", str(config), f"run_dir={run}")
            found["submit"].append(timed(cluster, path, calls, *words))
            found["submit again"].append(timed(cluster, path, calls, *words))
            time.sleep(5)  # accounting lags
            found["status"].append(timed(cluster, path, calls, "status", run))
            cluster.cancel_all()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    found = measure(arguments.tasks, arguments.repeats)
    print(f"{arguments.tasks} array tasks, median of {arguments.repeats}")
    for name, runs in found.items():
        seconds = sorted(float(str(run["seconds"])) for run in runs)
        spread = f"{statistics.median(seconds):6.2f} s  ({seconds[0]:.2f} to {seconds[-1]:.2f})"
        print(f"  {name:<13} {spread}  {runs[0]['calls']}")
    commit = subprocess.run(
        ("git", "-C", str(ROOT), "rev-parse", "HEAD"), capture_output=True, text=True, check=False
    ).stdout.strip()
    day = time.strftime("%Y-%m-%d")
    target = ROOT / "benchmarks" / "results" / f"{day}-slurm-submit.json"
    result = {
        "date": day,
        "command": f"benchmarks/slurm_submit.py --tasks {arguments.tasks}",
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "tasks": arguments.tasks,
        "runs": found,
    }
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
