"""What every benchmark of the policy writes beside its numbers."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What it ran on; no names of hosts or people."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "num_cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def commit() -> str:
    """The commit, marked if the working tree differs from it."""
    found = subprocess.run(
        ("git", "describe", "--always", "--dirty", "--abbrev=12"),
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


MEASURED_AT = commit()
"""When the benchmark began: people work on while it runs."""


def write_record(name: str, what: str, settings: Mapping[str, Any], results: Any) -> Path:
    """Write `<date>-<name>.json` beside other results."""
    now = datetime.now(UTC)
    path = RESULTS / f"{now:%Y-%m-%d}-{name}.json"
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    report = {
        "what": what,
        "date": f"{now:%Y-%m-%d}",
        "commit": MEASURED_AT,
        "command": ["python", f"benchmarks/{Path(sys.argv[0]).name}", *words],
        "machine": machine(),
        "settings": {
            key: Path(value).name if isinstance(value, Path) else value
            for key, value in settings.items()
        },
        "results": results,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path
