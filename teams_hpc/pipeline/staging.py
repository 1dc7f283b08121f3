"""Model folders copied to a node's own disk before they are loaded, once for all its processes."""

import logging
import os
import shutil
import time
from pathlib import Path

from teams_hpc.config import Config, LocalEngineConfig
from teams_hpc.storage.lease import Lease

_log = logging.getLogger(__name__)
_POLL_S = 0.5


def staged(config: Config, stage: str) -> Config:
    """The configuration with the models that `stage` loads taken from the node's own disk.

    The job's private folder there is TMPDIR (shell/task.sh makes it). Whose copy of a folder comes
    first makes it; the others wait. A model's identity is its content, so nothing else changes.
    """
    if not config.site.slurm.stage_weights:
        return config
    scratch = Path(os.environ["TMPDIR"])
    update: dict[str, object] = {}
    for role in config.roles_of(stage):
        engine = getattr(config, role)
        if isinstance(engine, LocalEngineConfig):
            update[role] = engine.model_copy(update={"model": _copied(engine.model, scratch)})
    if stage == "sft" and isinstance(config.sft.model, Path):
        update["sft"] = config.sft.model_copy(update={"model": _copied(config.sft.model, scratch)})
    return config.model_copy(update=update)


def _copied(model: Path, scratch: Path) -> Path:
    name = "-".join(model.resolve().parts[1:])
    target = scratch / "weights" / name
    with Lease(scratch / f"{name}.lease") as lease:
        while not lease.acquire():
            if target.exists():
                return target
            time.sleep(_POLL_S)
        if not target.exists():
            start = time.monotonic()
            partial = target.with_name(f".{name}.tmp")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(model, partial)
            partial.rename(target)
            _log.info("copied %s to %s in %.0f s", model, target, time.monotonic() - start)
    return target
