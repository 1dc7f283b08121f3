"""What a stage is made from, recorded when it starts and compared ever after."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teams_hpc.config import Config
from teams_hpc.config.digest import (
    STAGE_KEYS,
    changed_keys,
    file_digest,
    inputs_digest,
    stage_inputs,
)
from teams_hpc.errors import InputChangedError, WorkError
from teams_hpc.pipeline.graph import Stage, find_stage, stage_graph
from teams_hpc.rewriting.operations import PROMPT_SCHEMA
from teams_hpc.rewriting.seeds import SHIPPED_SEEDS
from teams_hpc.storage.atomic import read_json, write_json
from teams_hpc.storage.run_dir import RunDir, read_manifest


def outcome_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 over what a stage made; what it cost (`usage`) is not part of it."""
    content = {key: value for key, value in manifest.items() if key != "usage"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _config_inputs(config: Config, stage: Stage) -> dict[str, Any]:
    """The part of a stage's inputs that needs no other stage, as JSON gives it back."""
    inputs = dict(stage_inputs(config, stage.name)) if stage.name in STAGE_KEYS else {}
    if "seeds.path" in inputs:
        inputs["seeds.shipped"] = None if config.seeds.path else file_digest(SHIPPED_SEEDS)
        inputs["prompts.schema"] = PROMPT_SCHEMA
    normal: dict[str, Any] = json.loads(json.dumps(inputs, default=str))
    return normal


def _current_inputs(run_dir: RunDir, config: Config, stage: Stage) -> dict[str, Any]:
    """What `stage` would be made from now.

    Raises:
        WorkError: A stage it reads is not done.
    """
    inputs = _config_inputs(config, stage)
    for name in stage.reads:
        manifest = read_manifest(run_dir, name)
        if manifest is None:
            raise WorkError(f"{stage.name} needs {name}, which is not done; run {name} first")
        inputs[f"upstream.{name}"] = outcome_digest(manifest)
    return inputs


def is_done(run_dir: RunDir, config: Config, stage: Stage) -> bool:
    """Whether the stage's manifest is there; training may have been asked to go further since."""
    manifest = read_manifest(run_dir, stage.name)
    if manifest is None:
        return False
    if stage.name == "sft":
        wanted = config.sft.max_steps or manifest["schedule_steps"]
        return bool(manifest["steps"] >= min(wanted, manifest["schedule_steps"]))
    return True


def _shorten(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _refuse_changed(stage: Stage, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    changed = changed_keys(dict(old), dict(new))
    if not changed:
        return
    lines = [
        f"  {key}: was {_shorten(old.get(key))}, is {_shorten(new.get(key))}" for key in changed[:6]
    ]
    if len(changed) > 6:
        lines.append(f"  ... and {len(changed) - 6} more")
    raise InputChangedError(
        "\n".join(
            [
                f"the stage {stage.name} of this run was made from other inputs:",
                *lines,
                f"run it and what follows again with --rerun-from {stage.name}, "
                "take the old values back, or choose another name",
            ]
        )
    )


def prepare_stage(run_dir: RunDir, config: Config, stage: Stage) -> None:
    """Write `<stage>/inputs.json`, or check that it says what the stage is made from today.

    Raises:
        InputChangedError: The stage was started with other inputs; names the keys.
        WorkError: A stage it reads is not done.
    """
    inputs = _current_inputs(run_dir, config, stage)
    path = run_dir.inputs(stage.name)
    if path.exists():
        _refuse_changed(stage, read_json(path)["inputs"], inputs)
        return
    for folder in (run_dir.stage_dir(stage.name), run_dir.metrics, run_dir.logs):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {"digest": inputs_digest(inputs), "inputs": inputs})


def check_unchanged(run_dir: RunDir, config: Config, before: str | None = None) -> None:
    """Refuse a configuration that contradicts a stage already started, before anything runs.

    Only stages that come before `before` are checked, if it is given.

    Raises:
        InputChangedError: Names the first such stage and the keys.
    """
    for stage in stage_graph(config):
        if stage.name == before:
            return
        path = run_dir.inputs(stage.name)
        if path.exists():
            old = {
                key: value
                for key, value in read_json(path)["inputs"].items()
                if not key.startswith("upstream.")
            }
            _refuse_changed(stage, old, _config_inputs(config, stage))


def set_aside(run_dir: RunDir, config: Config, first: str) -> Path | None:
    """Move `first` and every later stage out of the way; nothing that was paid for is deleted.

    Returns:
        The folder they are in now, or None if there was nothing.
    """
    find_stage(config, first)
    later = [stage.name for stage in stage_graph(config)]
    later = later[later.index(first) :]
    present = [name for name in later if run_dir.stage_dir(name).exists()]
    if not present:
        return None
    numbers = [int(path.name) for path in (run_dir.root / "superseded").glob("[0-9]*")]
    folder = run_dir.root / "superseded" / f"{max(numbers, default=0) + 1:03d}"
    folder.mkdir(parents=True)
    for name in present:
        run_dir.stage_dir(name).rename(folder / name)
    for name in present:
        for path in run_dir.metrics.glob(f"{name}*"):
            path.unlink()
    return folder


def set_aside_outdated(run_dir: RunDir, config: Config, stage: Stage) -> None:
    """Move away what was made from `stage`, which was done before and is now to go further."""
    if read_manifest(run_dir, stage.name) is not None:
        later = stage_graph(config)
        set_aside(run_dir, config, later[later.index(stage) + 1].name)
