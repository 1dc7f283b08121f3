"""From files and `key.path=value` to a `Config`.

Layers, later ones win: schema defaults < files under `extends:` < the file < overrides.
A relative path is relative to the file that names it, on the command line to the current folder.
`shipped:NAME` is a folder that the package itself brings along, wherever it is installed.
Setting another `kind` of engine drops the settings only the old kind has.
"""

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError

from teams_hpc.config.schema import Config, EngineBase, EngineConfig, ReviewerConfig
from teams_hpc.errors import ConfigError

_ROLES = ("instructor", "reviewer", "expert")
_PATH_KEYS = (
    "run_dir",
    "seeds.path",
    "sft.model",
    "evaluate.lm_eval_path",
    "site.slurm.scratch",
    "site.container.image",
)
_WITH_FOLDER = ("transformers", "vllm")
_MOST_FAULTS = 10
_DEFAULT_KIND = "template"
_SHARED_ENGINE_KEYS = frozenset(EngineBase.model_fields)
_SHIPPED = "shipped:"
_DATA = Path(__file__).resolve().parent.parent / "data"


class _Located(str):
    """A string that remembers which folder a relative path in it starts from."""

    base: Path

    @classmethod
    def make(cls, text: str, base: Path) -> "_Located":
        located = cls(text)
        located.base = base
        return located

    def resolve(self) -> Path:
        if "\0" in self:
            raise ConfigError(f"{str(self)!r} is no path: it has a NUL character in it")
        if self.startswith(_SHIPPED):
            return _shipped(self.removeprefix(_SHIPPED))
        try:
            return _normal(Path(self.base, Path(self).expanduser()))
        except RuntimeError:
            raise ConfigError(f"{self}: there is no such home; write the whole path") from None


def _shipped(name: str) -> Path:
    """A folder below the package's data."""
    folders = sorted(path.name for path in _DATA.iterdir() if path.is_dir())
    if name not in folders:
        raise ConfigError(
            f"{_SHIPPED}{name}: the package brings no such folder; there are: {', '.join(folders)}"
        )
    return _DATA / name


def _normal(path: Path) -> Path:
    """Absolute and without `..`; symbolic links stay as they are."""
    return Path(os.path.normpath(path.absolute()))


class _Loader(yaml.SafeLoader):
    """YAML without its traps: a key twice is an error; 010, 24:00:00, 1e-3 are what they seem."""


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands twice", key_node.start_mark
            )
        seen.add(key)
    return cast(dict[Any, Any], loader.construct_mapping(node, deep=True))


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":int", ":float"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader`, or any other YAML reader, would take for a number."""


_Dumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_Loader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{where} is not valid YAML: {problem}") from None


def _read_yaml_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}; configs/ has examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read the config file {path}: {error}") from None
    values = _parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold keys and values, such as 'name: my-run'")
    return values


def _locate(value: Any, base: Path) -> Any:
    if isinstance(value, str):
        return _Located.make(value, base)
    if isinstance(value, dict):
        return {key: _locate(item, base) for key, item in value.items()}
    if isinstance(value, list):
        return [_locate(item, base) for item in value]
    return value


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _put_layer(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two layers; a role whose `kind` changes loses what only its old kind has."""
    below = dict(below)
    for role in _ROLES:
        old, new = below.get(role), above.get(role)
        if not isinstance(old, dict) or not isinstance(new, dict):
            continue
        kind = old.get("kind", _DEFAULT_KIND)
        if new.get("kind", kind) != kind:
            below[role] = {name: old[name] for name in old if name in _SHARED_ENGINE_KEYS}
    return _merge(below, above)


def _read_layers(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    path = _normal(path)
    if path in seen:
        raise ConfigError(f"{path} extends itself: {' -> '.join(map(str, (*seen, path)))}")
    values = _read_yaml_file(path)
    parents = values.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(name, str) for name in parents):
        raise ConfigError(f"{path}: extends must be a file name or a list of them")
    merged: dict[str, Any] = {}
    for name in parents:
        merged = _put_layer(merged, _read_layers(path.parent / name, (*seen, path)))
    return _put_layer(merged, _locate(values, path.parent))


def parse_overrides(overrides: Iterable[str], base: Path) -> dict[str, Any]:
    """Turn `key.path=value` words into one layer; the last of two for a key wins.

    Args:
        overrides: Words as typed; the value is YAML (`null`, `[a, b]`, `1e-3`).
        base: Folder that relative paths start from.

    Raises:
        ConfigError: A word without `=`, or a key that is both a value and a section.
    """
    layer: dict[str, Any] = {}
    for word in overrides:
        dotted, equals, text = word.partition("=")
        keys = dotted.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"{word!r} is not KEY=VALUE; for instance seeds.limit=20")
        value = _locate(_parse_yaml(text, f"the value of {dotted}"), base)
        nested: Any = value
        for key in reversed(keys):
            nested = {key: nested}
        layer = _merge(layer, nested)
    return layer


def _complete(values: dict[str, Any]) -> None:
    """Set default kinds and make every path absolute, in place: now `kind` tells what is a path."""
    for role in _ROLES:
        if isinstance(values.get(role), dict):
            values[role].setdefault("kind", _DEFAULT_KIND)
    keys = [key.split(".") for key in _PATH_KEYS]
    keys += [
        [role, "model"]
        for role in _ROLES
        if isinstance(values.get(role), dict) and values[role].get("kind") in _WITH_FOLDER
    ]
    for *sections, last in keys:
        holder: Any = values
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(holder.get(last), _Located):
            holder[last] = holder[last].resolve()
    dataset = values.get("dataset")
    if isinstance(dataset, dict) and isinstance(dataset.get("decontaminate"), list):
        dataset["decontaminate"] = [
            item.resolve() if isinstance(item, _Located) else item
            for item in dataset["decontaminate"]
        ]


def _section_keys(location: Sequence[str | int]) -> list[str]:
    """Names of the keys allowed where `location` stands, for a suggestion."""
    model: Any = Config
    for part in location:
        if part in _ROLES:
            union = get_args(ReviewerConfig if part == "reviewer" else EngineConfig)[0]
            return sorted({name for kind in get_args(union) for name in kind.model_fields})
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        candidates = [field.annotation, *get_args(field.annotation)]
        model = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None
        )
    return sorted(getattr(model, "model_fields", {}))


def _describe(fault: Mapping[str, Any]) -> str:
    kinds = {"template", "transformers", "vllm", "http", "folder", "shape"}
    location = [part for i, part in enumerate(fault["loc"]) if not (i and part in kinds)]
    dotted = ".".join(str(part) for part in location) or "the file"
    if fault["type"] == "extra_forbidden":
        allowed = _section_keys(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(allowed)}"
        return f"{dotted}: no such key; {hint}"
    if fault["type"].startswith("union_tag"):
        return f"{dotted}.kind: must be one of {fault['ctx']['expected_tags']}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{dotted}: is missing; set it in the file or as {dotted}=VALUE"
    if isinstance(fault["input"], str | int | float | bool | None.__class__):
        return f"{dotted}: {message} (it is {fault['input']!r})"
    return f"{dotted}: {message}"


def _validate(values: dict[str, Any], where: str) -> Config:
    try:
        return Config.model_validate(_plain(values))
    except ValidationError as error:
        faults = [_describe(fault) for fault in error.errors(include_url=False)]
        faults = list(dict.fromkeys(faults))
        lines = [f"  {fault}" for fault in faults[:_MOST_FAULTS]]
        if len(faults) > _MOST_FAULTS:
            lines[-1] = f"  ... and {len(faults) - _MOST_FAULTS + 1} more"
        raise ConfigError("\n".join([f"{where} is not a valid configuration:", *lines])) from None


def _plain(value: Any) -> Any:
    if isinstance(value, _Located):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Load a configuration file with overrides; every path in the result is absolute.

    Raises:
        ConfigError: With all faults at once, each with its dotted key and the remedy.
    """
    values = _put_layer(_read_layers(path), parse_overrides(overrides, Path.cwd()))
    _complete(values)
    config = _validate(values, str(path))
    if config.run_dir is None:
        config = config.model_copy(update={"run_dir": Path.cwd() / "runs" / config.name})
    return config


def load_resolved(path: Path) -> Config:
    """Load the `config.yaml` that a run directory keeps: complete, absolute, no layers."""
    return _validate(_read_yaml_file(path), str(path))


def dump_yaml(config: Config) -> str:
    """The whole configuration as YAML that `load_resolved` reads back to an equal `Config`."""
    return dump_values(config.model_dump(mode="json"))


def dump_values(values: Mapping[str, Any]) -> str:
    """YAML in which a text never looks like a number, to our reader or any other."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=100)
    return text
