"""Small whole runs on a test cluster: how to submit them, what they made, what was to be made."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.cluster import FINISHED, ClusterError, Job, SlurmCluster
from teams_hpc.cluster.records import JobRecord, read_records
from teams_hpc.storage.run_dir import RunDir, read_manifest

STAGES = ("policy", "select", "generate", "dataset", "sft", "evaluate", "report")
TINY = """
name: tiny
run_dir: run
seeds: {limit: 24}
policy: {num_members: 2, iterations: 2, num_envs: 4, num_bootstrap: 100, num_eval_episodes: 1}
generate: {num_steps: 3, unit_size: 6, equal_threshold: 0.0}
sft:
  dtype: float32
  model: {vocab_size: 400, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
          num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 512}
  sequence_length: 512
  schedule_steps: 4
  global_batch_rows: 2
  micro_batch_rows: 1
  warmup_steps: 1
  learning_rate: 1.0e-2
  checkpoint_interval_steps: 2
  eval_interval_steps: 2
evaluate: {num_bootstrap: 100, control_steps: 5}
site:
  executor: slurm
  num_workers: 2
  slurm: {partition: low, time_min: 10, warning_s: 30, mem_gb: 2}
"""
# The stages up to the data set one after the other in one process, undisturbed.
_QUIET = """
import sys
from pathlib import Path
from teams_hpc.config import load_config
from teams_hpc.pipeline.graph import stage_graph
from teams_hpc.pipeline.inputs import prepare_stage
from teams_hpc.pipeline.start import prepared_run
from teams_hpc.pipeline.submit import all_indices
from teams_hpc.runtime.preemption import StopFlag
config = load_config(Path(sys.argv[1]), sys.argv[2:])
with prepared_run(config, stop=StopFlag()) as run_dir:
    for stage in stage_graph(config):
        if stage.name == "sft":
            break
        prepare_stage(run_dir, config, stage)
        for index in all_indices(config, stage):
            stage.load()(run_dir, config, index, StopFlag())
"""


@dataclass(frozen=True, slots=True)
class Said:
    """What a command said, both streams, and how it ended."""

    code: int
    text: str


def write_config(folder: Path, text: str = TINY) -> Path:
    """A configuration file; its run goes to `folder/run` unless it says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def command(cluster: SlurmCluster, *words: str, folder: Path, timeout_s: float = 120) -> Said:
    """`teams-hpc WORDS`, called in `folder` on a login node of this cluster."""
    done = subprocess.run(
        (sys.executable, "-m", "teams_hpc", *words),
        cwd=folder,
        env={**os.environ, **cluster.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Said(done.returncode, done.stdout)


def submit(cluster: SlurmCluster, config: Path, *words: str, code: int = 0) -> str:
    """Submit a configuration; what `submit` printed. It has to end with this exit code."""
    said = command(cluster, "submit", str(config), *words, folder=config.parent)
    assert said.code == code, said.text
    assert "Traceback" not in said.text, said.text
    return said.text


def status(cluster: SlurmCluster, root: Path) -> dict[str, Any]:
    """`status --json` of a run."""
    said = command(cluster, "status", str(root), "--json", folder=root.parent)
    assert said.code == 0, said.text
    found: dict[str, Any] = json.loads(said.text)
    return found


def final_status(cluster: SlurmCluster, root: Path) -> dict[str, Any]:
    """`status` of a run whose jobs have ended: accounting learns of that some seconds later."""
    deadline = time.monotonic() + 40
    while (found := status(cluster, root))["is_active"]:
        assert time.monotonic() < deadline, found
    return found


def stage_states(cluster: SlurmCluster, root: Path) -> dict[str, str]:
    """What `status` calls each stage."""
    return {line["stage"]: line["state"] for line in status(cluster, root)["stages"]}


def records(root: Path, stage: str | None = None) -> list[JobRecord]:
    """What was submitted for a run, or for one of its stages, in order."""
    return [r for r in read_records(RunDir(root)) if stage in (None, r.stage)]


def output(root: Path) -> str:
    """Everything that a run's batch scripts and tasks have said."""
    run_dir = RunDir(root)
    paths = [*run_dir.slurm.glob("*.out"), *run_dir.logs.glob("*.log")]
    return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')}" for p in sorted(paths))


def wait_for_end(cluster: SlurmCluster, root: Path, timeout_s: float) -> list[Job]:
    """Wait until no job of the run is in the queue; Slurm's records of all of them."""
    try:
        return cluster.wait_for([r.job_id for r in records(root)], FINISHED, timeout_s)
    except ClusterError as error:
        raise AssertionError(f"{error}\n{output(root)}") from error


def finish(cluster: SlurmCluster, root: Path, timeout_s: float = 150) -> list[Job]:
    """Wait until every job of the run has completed; shows what was said if one does not."""
    jobs = wait_for_end(cluster, root, timeout_s)
    states = {job["JobName"] + " " + job["JobId"]: job["JobState"] for job in jobs}
    assert set(states.values()) == {"COMPLETED"}, f"{states}\n{output(root)}"
    return jobs


def verify(cluster: SlurmCluster, root: Path) -> None:
    """`verify` has no complaint about the run."""
    said = command(cluster, "verify", str(root), folder=root.parent)
    assert said.code == 0, said.text
    assert "FAULT" not in said.text


def rows(root: Path) -> dict[str, Any]:
    """What identifies the rows: digests over columns, counts, every unit's digest."""
    generated = read_manifest(RunDir(root), "generate")
    dataset = read_manifest(RunDir(root), "dataset")
    assert generated is not None, output(root)
    assert dataset is not None, output(root)
    kept = ("counts", "units", "sha256")
    return {"dataset": dataset["sha256"], **{name: generated[name] for name in kept}}


def quiet_rows(config: Path, root: Path, *words: str) -> dict[str, Any]:
    """`rows` of the same run made here, without Slurm and by one worker, up to the data set."""
    settings = (f"run_dir={root}", "site.num_workers=1", "site.executor=local", *words)
    done = subprocess.run(
        (sys.executable, "-c", _QUIET, str(config), *settings),
        cwd=config.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return rows(root)


def starts(root: Path, task: str) -> list[tuple[str, int]]:
    """Job and restart count of each start of a task, in order."""
    path = RunDir(root).metrics / f"{task}.starts.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(line["job"], line["restart"]) for line in map(json.loads, lines)]
