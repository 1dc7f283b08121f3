"""The small network that training writes and generation reads, and the baselines beside it.

Numpy in float64, one row at a time: what is chosen for a record never depends on what else is in a
batch, nor on a library's threads.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal, Protocol, cast, get_args

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from teams_hpc.config.policy import ObservationKind
from teams_hpc.errors import CorruptFileError
from teams_hpc.rewriting.embedding import EMBEDDING_SCHEMA
from teams_hpc.rewriting.observation import History, observation_size
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.storage.atomic import replacing
from teams_hpc.storage.tensor_file import in_fixed_order

Floats = NDArray[np.float64]
_LAYERS = ("hidden_0", "hidden_1", "head")
_UNIFORM = np.full(len(OPERATIONS), 1.0 / len(OPERATIONS))
_UNIFORM.setflags(write=False)  # all get the same


class OperationPolicy(Protocol):
    """Anything that gives probabilities of the six operations."""

    def probabilities(self, observation: NDArray[np.floating], history: History) -> Floats:
        """Probabilities (6,) for one observation (n,)."""
        ...


@dataclass(frozen=True, slots=True)
class UniformPolicy:
    """Every operation alike: the random baseline."""

    def probabilities(self, observation: NDArray[np.floating], history: History) -> Floats:
        return _UNIFORM


@dataclass(frozen=True, slots=True)
class RoundRobinPolicy:
    """The operations in their order, again and again."""

    def probabilities(self, observation: NDArray[np.floating], history: History) -> Floats:
        chosen = np.zeros(len(OPERATIONS))
        chosen[history.step % len(OPERATIONS)] = 1.0
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpPolicy:
    """Two hidden layers with ReLU and a categorical head.

    Attributes:
        weights: `hidden_0.weight` (h, n), `hidden_0.bias` (h,), the same for `hidden_1` (h, h),
            `head.weight` (6, h) and `head.bias` (6,); float64.
        metadata: Text stored with them; `observation` names the kind of observation, and where
            that is `embedding`, `embedding_model` and `embedding_size` tell of what.
    """

    weights: Mapping[str, Floats]
    metadata: Mapping[str, str]

    @property
    def observation_kind(self) -> str:
        return self.metadata["observation"]

    def probabilities(self, observation: NDArray[np.floating], history: History) -> Floats:
        values = np.asarray(observation, dtype=np.float64)
        for layer in _LAYERS[:-1]:
            values = np.maximum(self._apply(layer, values), 0.0)
        logits = self._apply(_LAYERS[-1], values)
        exponents = np.exp(logits - logits.max())
        return np.asarray(exponents / exponents.sum())

    def _apply(self, layer: str, values: Floats) -> Floats:
        # A sum over rows, unlike BLAS, adds in one order on every machine.
        return np.asarray(
            (self.weights[f"{layer}.weight"] * values).sum(axis=1) + self.weights[f"{layer}.bias"]
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file, atomically; equal policies give equal bytes."""
        with replacing(path) as temporary:
            data = to_safetensors(dict(self.weights), metadata=dict(self.metadata))
            temporary.write_bytes(in_fixed_order(data))

    @classmethod
    def load(cls, path: Path) -> "MlpPolicy":
        """Read what `save` wrote.

        Raises:
            CorruptFileError: The file is missing or damaged, or its tensors are of other shapes,
                not numbers, or made for other observations than ours.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = dict(file.metadata() or {})
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CorruptFileError(f"{path} is not a policy: {error}") from None
        kind = metadata.get("observation")
        if kind not in get_args(ObservationKind):
            raise CorruptFileError(
                f"{path}: its policy takes observation {kind!r}, not one of "
                f"{', '.join(get_args(ObservationKind))}"
            )
        size = _embedding_size(path, metadata) if kind == "embedding" else 0
        _check_tensors(path, weights, observation_size(cast(ObservationKind, kind), size))
        return cls(
            weights={name: value.astype(np.float64) for name, value in weights.items()},
            metadata=metadata,
        )


def _embedding_size(path: Path, metadata: Mapping[str, str]) -> int:
    size = metadata.get("embedding_size", "")
    if not size.isdecimal() or metadata.get("embedding_schema") != str(EMBEDDING_SCHEMA):
        raise CorruptFileError(
            f"{path}: its policy takes embeddings of size {size or 'unknown'} and schema "
            f"{metadata.get('embedding_schema', 'unknown')}; this version makes schema "
            f"{EMBEDDING_SCHEMA}; run again with --rerun-from policy"
        )
    return int(size)


def _check_tensors(path: Path, weights: Mapping[str, Floats], size: int) -> None:
    expected = {f"{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias")}
    if weights.keys() != expected:
        raise CorruptFileError(f"{path} holds {sorted(weights)}, not {sorted(expected)}")
    width = weights["hidden_0.bias"].size
    shapes = {
        "hidden_0.weight": (width, size),
        "hidden_0.bias": (width,),
        "hidden_1.weight": (width, width),
        "hidden_1.bias": (width,),
        "head.weight": (len(OPERATIONS), width),
        "head.bias": (len(OPERATIONS),),
    }
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise CorruptFileError(f"{path}: {name} is {weights[name].shape}, not {shape}")
        if not np.isfinite(weights[name]).all():
            raise CorruptFileError(f"{path}: {name} holds numbers that are not finite")


def choose(probabilities: Floats, uniform: float, action: Literal["sample", "argmax"]) -> int:
    """Choose an operation by inverse CDF, or the likeliest (the first of equals).

    Args:
        probabilities: (6,), summing to one.
        uniform: A number in [0, 1) that belongs to the record.
        action: How to choose.
    """
    if action == "argmax":
        return int(np.argmax(probabilities))
    values = probabilities.tolist()  # of six numbers: numpy would take ten times as long
    chosen = bisect_right(list(accumulate(values)), uniform)
    if chosen < len(values):
        return chosen
    # Rounded, they may sum to less than one.
    return max(code for code, value in enumerate(values) if value)
