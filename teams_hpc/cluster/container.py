"""The container of a site: what a task needs to see inside, as environment variables.

Apptainer takes every option from the environment too, so that batch scripts need no quoting:
`shell/task.sh` only puts `apptainer exec IMAGE` before the command.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from teams_hpc.config import Config
from teams_hpc.config.check import named_data, named_models

CONTAINER_PYTHON = "python3"
DEFAULT_SCRATCH = Path("/tmp")  # noqa: S108 (task.sh makes a private folder in it)


def container_environment(config: Config, run_dir: Path) -> dict[str, str]:
    """Variables that put each task into the site's container; empty without one.

    Home stays outside; what the run reads and writes is bound at the same path. The environment
    goes in whole: without the launcher's variables each process would be the only one of its step.
    """
    container = config.site.container
    if container is None:
        return {}
    upper = container.kind.upper()
    binds = (*needed_binds(config, run_dir), *container.binds)
    values = {
        "TEAMS_HPC_IMAGE": str(container.image),
        "TEAMS_HPC_CONTAINER": container.kind,
        # Caches have to be writable, and an image isn't: they always get a folder.
        "TEAMS_HPC_SCRATCH": str(config.site.slurm.scratch or DEFAULT_SCRATCH),
        f"{upper}_BIND": ",".join(binds),
        f"{upper}_NO_HOME": "1",
        f"{upper}_PWD": str(run_dir),
    }
    if container.nv and config.site.gpus_per_node:
        values[f"{upper}_NV"] = "1"
    inside = {f"{upper}ENV_{name}": value for name, value in container.environment.items()}
    return {**values, **inside}


def needed_binds(config: Config, run_dir: Path) -> list[str]:
    """Folders that each task needs inside, whatever else is bound."""
    return list(dict.fromkeys(str(path) for path in _needed_paths(config, run_dir)))


def _needed_paths(config: Config, run_dir: Path) -> Iterator[Path]:
    yield run_dir
    yield config.site.slurm.scratch or DEFAULT_SCRATCH
    for _, path in named_data(config):
        yield path if path.is_dir() else path.parent
    for _, folder in named_models(config):
        yield from _with_targets(folder)


def _with_targets(folder: Path) -> Iterator[Path]:
    """A model folder, and where its links lead: in a Hugging Face cache all files are links."""
    yield folder
    links = (path for path in folder.iterdir() if path.is_symlink()) if folder.is_dir() else ()
    for link in links:
        target = Path(os.path.normpath(folder / link.readlink()))
        if not target.is_relative_to(folder):
            yield target.parent
