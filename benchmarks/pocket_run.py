"""A run directory whose three roles are the pocket Llama, for benchmarks that need one."""

import os
from pathlib import Path

from teams_hpc.config import Config, dump_yaml, load_config
from teams_hpc.pipeline.graph import find_stage
from teams_hpc.pipeline.inputs import prepare_stage
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.run_dir import RunDir, read_manifest

POCKET = Path(__file__).parents[1] / "teams_hpc" / "data" / "pocket-llama"


def open_pocket_run(folder: Path, model: Path, *words: str) -> tuple[RunDir, Config]:
    """The run in `folder`, begun or gone on with: exact, on one thread."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "benchmark.yaml"
    path.write_text("name: pocket\n", encoding="utf-8")
    engine = {
        "kind": "transformers",
        "model": model,
        "dtype": "float32",
        "device": "cpu",
        "batching": "fixed",
        "batch_size": 64,
        "threads": 1,
        "max_tokens": 160,
        "temperature": 0.4,
    }
    roles = [
        f"{role}.{key}={value}"
        for role in ("instructor", "reviewer", "expert")
        for key, value in engine.items()
    ]
    config = load_config(path, [f"run_dir={folder}", *roles, *words])
    run_dir = RunDir(config.resolved_run_dir)
    for needed in (run_dir.metrics, run_dir.logs):
        needed.mkdir(parents=True, exist_ok=True)
    run_dir.config.write_text(dump_yaml(config), encoding="utf-8")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return run_dir, config


def do_stage(run_dir: RunDir, config: Config, name: str, num_tasks: int = 1) -> dict[str, object]:
    """Do a stage unless it is done, one task after the other; returns its manifest."""
    stage = find_stage(config, name)
    prepare_stage(run_dir, config, stage)
    work = stage.load()
    for index in range(num_tasks):
        if read_manifest(run_dir, name) is None:
            print(f"{name} {index + 1} of {num_tasks}", flush=True)
            work(run_dir, config, index, StopFlag())
    manifest = read_manifest(run_dir, name)
    assert manifest is not None
    return manifest
