"""The container of a site: what a task needs to see inside, as environment variables.

Apptainer takes every option from the environment too, so that batch scripts need no quoting:
`shell/task.sh` only puts `apptainer exec IMAGE` before the command.
"""

from collections.abc import Iterator
from pathlib import Path

from teams_hpc.config import Config, LocalEngineConfig

CONTAINER_PYTHON = "python3"


def container_environment(config: Config, run_dir: Path) -> dict[str, str]:
    """Variables that put each task into the site's container; empty without one.

    Home stays outside; what the run reads and writes is bound at the same path.
    """
    container = config.site.container
    if container is None:
        return {}
    upper = container.runtime.upper()
    binds = (*needed_binds(config, run_dir), *container.binds)
    values = {
        "TEAMS_HPC_IMAGE": str(container.image),
        "TEAMS_HPC_RUNTIME": container.runtime,
        f"{upper}_BIND": ",".join(binds),
        f"{upper}_NO_HOME": "1",
        f"{upper}_PWD": str(run_dir),
    }
    if container.nv and config.site.gpus_per_node:
        values[f"{upper}_NV"] = "1"
    return values


def needed_binds(config: Config, run_dir: Path) -> list[str]:
    """Folders that each task needs inside, whatever else is bound."""
    return list(dict.fromkeys(str(path) for path in _needed_paths(config, run_dir)))


def _needed_paths(config: Config, run_dir: Path) -> Iterator[Path]:
    yield run_dir
    if config.seeds.path is not None:
        yield config.seeds.path.parent
    yield from (path.parent for path in config.dataset.decontaminate)
    for role in ("instructor", "reviewer", "expert"):
        engine = getattr(config, role)
        if isinstance(engine, LocalEngineConfig):
            yield engine.model
    if isinstance(config.sft.model, Path):
        yield config.sft.model
    if config.evaluate.lm_eval_path is not None:
        yield config.evaluate.lm_eval_path
    if config.site.slurm.scratch is not None:
        yield config.site.slurm.scratch
