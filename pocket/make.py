"""Make the pocket Llama: examples, tokenizer, fine-tuning, measurement, and the folder shipped.

    python -m pocket.make [--train-only] [KEY=VALUE]...

The settings are those of `model.yaml`, overrides as for `teams-hpc run`. Stopped, or killed, the
same command goes on. It ends by replacing `teams_hpc/data/pocket-llama` and writing a dated result
to `benchmarks/results`; with `--train-only` it leaves the model in `sft/model` of the run.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from pocket.data import build_data
from pocket.measure import measure
from pocket.publish import SHIPPED, publish
from teams_hpc.config import Config, load_config
from teams_hpc.config.load import dump_yaml
from teams_hpc.errors import RunInUseError, TeamsError
from teams_hpc.pipeline.graph import find_stage
from teams_hpc.pipeline.local import run_stage
from teams_hpc.pipeline.provenance import record_provenance
from teams_hpc.report.live import LiveDisplay
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import write_text
from teams_hpc.storage.lease import Lease
from teams_hpc.storage.run_dir import RunDir

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path(__file__).parent / "model.yaml"
_NUM_TEXTS = 204
_log = logging.getLogger(__name__)


@contextmanager
def _own_run(config: Config) -> Iterator[RunDir]:
    """As `prepared_run`, whose stages before `sft` this run doesn't have."""
    run_dir = RunDir(config.resolved_run_dir)
    run_dir.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    with Lease(run_dir.leases / "run", config.site.lease_s) as lease:
        if not lease.outlast():
            raise RunInUseError(f"{run_dir.root} is in use by another process; wait for it")
        write_text(run_dir.config, dump_yaml(config))
        record_provenance(run_dir)
        yield run_dir


def train(config: Config) -> RunDir:
    """Examples and fine-tuning, as far as they aren't done.

    Raises:
        StopRequested: Asked to stop; the same again goes on.
    """
    stop = StopFlag()
    stop.install()
    with _own_run(config) as run_dir:
        build_data(run_dir, config)
        display = LiveDisplay(run_dir, Console(highlight=False))
        try:
            run_stage(run_dir, config, find_stage(config, "sft"), display, stop)
        finally:
            display.close()
    return run_dir


def result(measured: dict[str, Any], now: datetime) -> dict[str, Any]:
    """What `benchmarks/results` keeps."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    git = ("git", "describe", "--always", "--dirty", "--abbrev=12")
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return {
        "what": "the pocket Llama: verdicts, rewrites and answers against the grammar's truth",
        "date": f"{now:%Y-%m-%d}",
        "commit": commit.strip() or "unknown",
        "command": ["make", "pocket-model"],
        "machine": {
            "cpu": names[0] if names else platform.machine(),
            "num_cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "results": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    config = load_config(CONFIG, arguments.overrides)
    run_dir = train(config)
    if arguments.train_only:
        return
    measured = measure(run_dir.model, _NUM_TEXTS)
    publish(run_dir, config, measured, SHIPPED)
    now = datetime.now(UTC)
    path = ROOT / "benchmarks" / "results" / f"{now:%Y-%m-%d}-pocket-model.json"
    path.write_text(json.dumps(result(measured, now), indent=1) + "\n", encoding="utf-8")
    _log.info("made %s and %s", SHIPPED, path)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except TeamsError as error:
        _log.error("error: %s", error)
        sys.exit(error.exit_code)
