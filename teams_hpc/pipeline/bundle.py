"""What a cluster without a way out needs for one run, gathered in a folder that can be carried.

config.yaml   the resolved configuration; its paths lead into the bundle, wherever that lies
software/     the image, or wheels
models/ data/ what the configuration names
bundle.json   every file's size and SHA-256, and where it came from; written last
SHA256SUMS    the same for `sha256sum --check`, on a machine that has nothing yet
"""

import hashlib
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from teams_hpc import __version__
from teams_hpc.config import Config
from teams_hpc.config.check import model_faults, named_data, named_models, refuse_faults
from teams_hpc.config.digest import file_digest
from teams_hpc.config.load import dump_values
from teams_hpc.errors import UsageError
from teams_hpc.pipeline.provenance import git_commit
from teams_hpc.storage.atomic import naming_disk_faults, read_json, write_json, write_text

MANIFEST, SUMS = "bundle.json", "SHA256SUMS"
_PIECE = 8 << 20
_LEFT_OUT = frozenset({"__pycache__", ".git", ".cache"})
_VERSIONS = ("torch", "transformers", "deepspeed", "h5py", "numpy")


@dataclass(frozen=True, slots=True)
class _Item:
    """One file or folder that is carried.

    Attributes:
        key: What names it: a dotted key of the configuration, or an option.
        source: Where it is here.
        target: Where it goes, relative to the bundle.
    """

    key: str
    source: Path
    target: Path

    def files(self) -> Iterator[tuple[Path, Path]]:
        """Each file and its place in the bundle; links are followed, as hub caches need."""
        if self.source.is_file():
            yield self.source, self.target
            return
        for folder, names, files in os.walk(self.source, followlinks=True):
            names[:] = sorted(set(names) - _LEFT_OUT)
            inside = self.target / Path(folder).relative_to(self.source)
            yield from ((Path(folder, name), inside / name) for name in sorted(files))


@dataclass(slots=True)
class Bundle:
    """A bundle that was made.

    Attributes:
        folder: Where it lies.
        absent: What the configuration names and this machine hasn't: key and path.
        items: What was carried: key, source, target, files, bytes.
        num_files: All of them.
        num_bytes: All of them.
    """

    folder: Path
    absent: list[tuple[str, Path]]
    items: list[dict[str, Any]] = field(default_factory=list)
    num_files: int = 0
    num_bytes: int = 0


def make_bundle(config: Config, folder: Path, *, wheels: Path | None = None) -> Bundle:
    """Copy everything a run needs into a new folder.

    Args:
        config: The run. What it names and this machine hasn't keeps its path: the cluster may
            have it.
        folder: Must not exist; it appears whole or not at all.
        wheels: A folder of packages to carry too.

    Raises:
        ConfigError: A model folder is here, but holds no model that can be loaded.
        UsageError: The folder exists, there isn't room enough, or the image is no file.
        WorkError: The disk is full.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists already; remove it, or choose another --output")
    named = list(_named(config, wheels))
    absent = [(key, path) for key, path, _ in named if not path.exists()]
    gone = tuple(f"{key}: " for key, _ in absent)
    refuse_faults([fault for fault in model_faults(config) if not fault.startswith(gone or "\0")])
    items = list(_items(named))
    files = [(item, *pair) for item in items for pair in item.files()]
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _require_room(partial, sum(source.stat().st_size for _, source, _ in files))
        bundle = Bundle(folder, absent)
        with naming_disk_faults(partial):
            _fill(partial, config, bundle, items, files)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return bundle


def _named(config: Config, wheels: Path | None) -> Iterator[tuple[str, Path, str]]:
    """Key, path and kind of everything that is to be carried."""
    yield from ((key, path, "models") for key, path in named_models(config))
    yield from ((key, path, "data") for key, path in named_data(config))
    if config.site.container is not None:
        if config.site.container.image.is_dir():
            raise UsageError(
                f"site.container.image: {config.site.container.image} is a folder; make one file "
                "of it (apptainer build IMAGE.sif FOLDER), or take another with --image"
            )
        yield "site.container.image", config.site.container.image, "software"
    if wheels is not None:
        if not wheels.is_dir():
            raise UsageError(f"--wheels: no folder {wheels}")
        yield "--wheels", wheels, "software"


def _fill(
    partial: Path,
    config: Config,
    bundle: Bundle,
    items: list[_Item],
    files: list[tuple[_Item, Path, Path]],
) -> None:
    entries: dict[str, dict[str, Any]] = {}
    for _, source, target in files:
        entries[str(target)] = _copy(source, partial / target)
    text = _portable_yaml(config, items)
    write_text(partial / "config.yaml", text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    entries["config.yaml"] = {"bytes": len(text.encode()), "sha256": digest}
    for item in items:
        own = [entries[str(target)]["bytes"] for one, _, target in files if one is item]
        line = {"key": item.key, "from": str(item.source), "to": str(item.target)}
        bundle.items.append({**line, "files": len(own), "bytes": sum(own)})
    bundle.num_files, bundle.num_bytes = len(entries), sum(e["bytes"] for e in entries.values())
    sums = "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(entries.items()))
    write_text(partial / SUMS, sums)
    write_json(partial / MANIFEST, _manifest(config, bundle, entries))


def _manifest(
    config: Config, bundle: Bundle, entries: dict[str, dict[str, Any]]
) -> dict[str, object]:
    return {
        "schema": 1,
        "name": config.name,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "teams_hpc": __version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "packages": dict(_versions()),
        "items": bundle.items,
        "absent": {key: str(path) for key, path in bundle.absent},
        "files": dict(sorted(entries.items())),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in _VERSIONS:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def bundle_lines(bundle: Bundle) -> Iterator[str]:
    """What was gathered, for people."""
    for item in bundle.items:
        yield f"{item['to']}  {item['files']} files, {item['bytes'] / 1e9:.2f} GB  ({item['key']})"
    for key, path in bundle.absent:
        yield f"not here, left as it is: {key} {path}"
    yield f"{bundle.num_files} files, {bundle.num_bytes / 1e9:.2f} GB in {bundle.folder}"


def verify_bundle(folder: Path) -> tuple[list[str], int]:
    """What of an unpacked bundle isn't as it was made, one line each; and how many files it has."""
    faults = []
    files = read_json(folder / MANIFEST)["files"]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing; carry it again")
        elif path.stat().st_size != entry["bytes"]:
            found = path.stat().st_size
            faults.append(f"{name} has {found} of {entry['bytes']} bytes; carry it again")
        elif file_digest(path) != entry["sha256"]:
            faults.append(f"{name} has changed on the way; carry it again")
    return faults, len(files)


def is_bundle(folder: Path) -> bool:
    """Whether a bundle was unpacked here."""
    return (folder / MANIFEST).is_file()


def _items(named: Iterable[tuple[str, Path, str]]) -> Iterator[_Item]:
    """What there is, once each: two roles may share a model. Equal names get a number."""
    targets: dict[Path, Path] = {}
    for key, path, kind in named:
        if path in targets or not path.exists():
            continue
        target, number = Path(kind, path.name), 1
        while target in targets.values():
            number += 1
            target = Path(kind, f"{path.stem}-{number}{path.suffix}")
        targets[path] = target
        yield _Item(key, path, target)


def _portable_yaml(config: Config, items: list[_Item]) -> str:
    """The configuration with paths relative to the file that holds them."""
    targets = {str(item.source): str(item.target) for item in items}
    values: dict[str, Any] = {**config.model_dump(mode="json"), "run_dir": None}
    for key, path, _ in _named(config, None):
        *sections, last = key.split(".")
        holder: Any = values
        for section in sections:
            holder = holder[section]
        holder[int(last) if isinstance(holder, list) else last] = targets.get(str(path), str(path))
    return dump_values(values)


def _copy(source: Path, target: Path) -> dict[str, Any]:
    """Copy a file; its size and SHA-256, of what was read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    whole, size = hashlib.sha256(), 0
    with source.open("rb") as stream, target.open("xb") as copy:
        while piece := stream.read(_PIECE):
            whole.update(piece)
            size += len(piece)
            copy.write(piece)
        copy.flush()
        os.fsync(copy.fileno())
    return {"bytes": size, "sha256": whole.hexdigest()}


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"the bundle needs {needed / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f} GB; "
            "choose another --output"
        )
