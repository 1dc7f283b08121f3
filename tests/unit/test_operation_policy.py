"""The policy's file and its numbers."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

from teams_hpc.errors import CorruptFileError
from teams_hpc.rewriting.observation import History, observation_size
from teams_hpc.rewriting.operation_policy import MlpPolicy, choose

Weights = dict[str, NDArray[np.float64]]
SIZE = observation_size("features")


def weights_of(width: int = 8, size: int = SIZE) -> Weights:
    shapes = [(width, size), (width,), (width, width), (width,), (6, width), (6,)]
    names = [f"{layer}.{part}" for layer in ("hidden_0", "hidden_1", "head")
             for part in ("weight", "bias")]  # fmt: skip
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape) for name, shape in zip(names, shapes, strict=True)}


def test_probabilities_are_a_softmax_over_two_hidden_layers() -> None:
    weights = weights_of()
    policy = MlpPolicy(weights=weights, metadata={"observation": "features"})
    for seen in np.random.default_rng(4).random((5, SIZE)).astype(np.float32):
        values = seen.astype(np.float64)
        for layer in ("hidden_0", "hidden_1"):
            values = weights[f"{layer}.weight"] @ values + weights[f"{layer}.bias"]
            values = np.where(values > 0, values, 0)
        logits = weights["head.weight"] @ values + weights["head.bias"]
        expected = np.exp(logits) / np.exp(logits).sum()
        found = policy.probabilities(seen, History.start())
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_large_logits_do_not_overflow() -> None:
    weights = weights_of() | {"head.bias": np.array([1e5, 0, 0, 0, 0, -1e5])}
    policy = MlpPolicy(weights=weights, metadata={"observation": "features"})
    assert policy.probabilities(np.zeros(SIZE), History.start()).tolist() == [1, 0, 0, 0, 0, 0]


def test_equal_policies_have_equal_files(tmp_path: Path) -> None:
    metadata = {"observation": "features", "member": "3", "digest": "ab", "iteration": "9"}
    for name, items in (("a", metadata.items()), ("b", reversed(metadata.items()))):
        MlpPolicy(weights=weights_of(), metadata=dict(items)).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert MlpPolicy.load(tmp_path / "a").metadata == metadata


@pytest.mark.parametrize(
    ("changed", "observation", "told"),
    [
        ({}, "one_hot", "hidden_0.weight"),
        ({"hidden_0.weight": np.zeros((8, SIZE - 1))}, "features", "hidden_0.weight"),
        ({"hidden_0.bias": np.array(1.0)}, "features", "hidden_0"),
        ({"hidden_1.weight": np.zeros(64)}, "features", "hidden_1.weight"),
        ({"head.weight": np.full((6, 8), np.nan)}, "features", "not finite"),
        ({"extra": np.zeros(2)}, "features", "extra"),
        ({}, "smells", "smells"),
        ({}, None, "None"),
    ],
)
def test_a_policy_that_is_not_ours_is_refused(
    tmp_path: Path, changed: Weights, observation: str | None, told: str
) -> None:
    path = tmp_path / "policy.safetensors"
    save_file(weights_of() | changed, path, metadata=observation and {"observation": observation})
    with pytest.raises(CorruptFileError, match=r"policy\.safetensors") as caught:
        MlpPolicy.load(path)
    assert told in str(caught.value)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_torn_or_missing_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "policy.safetensors"
    with pytest.raises(CorruptFileError, match=r"policy\.safetensors"):
        MlpPolicy.load(path)
    MlpPolicy(weights=weights_of(), metadata={"observation": "features"}).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CorruptFileError, match=r"policy\.safetensors"):
        MlpPolicy.load(path)


@given(
    st.lists(st.sampled_from([0.0, 1e-300, 0.1, 0.3, 1.0]), min_size=6, max_size=6).filter(any),
    st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=2, max_size=2),
)
def test_a_choice_rises_with_its_uniform_and_is_always_possible(
    weights: list[float], uniforms: list[float]
) -> None:
    probabilities = np.array(weights) / np.sum(weights)
    low, high = (choose(probabilities, uniform, "sample") for uniform in sorted(uniforms))
    assert 0 <= low <= high <= 5
    assert probabilities[low] > 0
    assert probabilities[high] > 0
    assert choose(probabilities, 0.5, "argmax") == probabilities.tolist().index(max(probabilities))
