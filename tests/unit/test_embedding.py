"""Instructions in a model's hidden states: fixed, bounded, and no matter what is beside them."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from teams_hpc.config import TransformersEngineConfig
from teams_hpc.config.schema import TemplateEngineConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.load import as_embedding_engine, load_engine
from teams_hpc.rewriting.embedding import InstructionEmbedding
from teams_hpc.rewriting.observation import History, Observer, observe
from teams_hpc.rewriting.seeds import read_seeds

TEXTS = [seed.instruction for seed in read_seeds(None, 40).seeds]


class Hashed:
    """Hidden states from a hash of the text, all with a large part in common."""

    content_id = "hashed"

    def __init__(self, width: int = 48) -> None:
        self.width = width
        self.asked: list[list[str]] = []

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked.append(list(texts))
        rows = []
        for text in texts:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
            rows.append(np.random.default_rng(seed).normal(30.0, 0.2, self.width))
        return np.array(rows, dtype=np.float32)


def test_embeddings_are_on_the_grid_bounded_and_tell_texts_apart() -> None:
    embedding = InstructionEmbedding(Hashed(), 16)  # type: ignore[arg-type]
    found = np.stack([embedding.of(text) for text in TEXTS])
    assert found.shape == (40, 16)
    assert found.dtype == np.float32
    assert np.array_equal(found * 64, np.rint(found * 64))
    assert np.abs(found).max() <= 1.0
    # What all texts share is gone, and the spread is that of the fixed texts.
    assert np.abs(found.mean()) < 0.1
    assert 0.35 < np.sqrt((found**2).mean()) < 0.6
    assert len({row.tobytes() for row in found}) == 40


def test_the_last_bits_of_a_hidden_state_do_not_matter() -> None:
    class Shaky(Hashed):
        def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return np.nextafter(super().embed(texts), np.float32(1e9))

    calm, shaky = (InstructionEmbedding(one(), 16) for one in (Hashed, Shaky))  # type: ignore[arg-type]
    same = [np.array_equal(calm.of(text), shaky.of(text)) for text in TEXTS]
    assert sum(same) >= 38


def test_a_text_is_asked_for_once_and_the_oldest_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("teams_hpc.rewriting.embedding._REMEMBERED", 2)
    engine = Hashed()
    embedding = InstructionEmbedding(engine, 4)  # type: ignore[arg-type]
    for text in ("a", "b", "a", "c", "a", "b"):
        embedding.of(text)
    assert engine.asked[1:] == [["a"], ["b"], ["c"], ["b"]]


def test_hidden_states_that_are_all_alike_are_refused() -> None:
    class Blind(Hashed):
        def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return np.ones((len(texts), self.width), dtype=np.float32)

    with pytest.raises(EngineError, match=r"same for all texts.*policy\.observation=features"):
        InstructionEmbedding(Blind(), 4)  # type: ignore[arg-type]


def test_only_an_engine_with_hidden_states_will_do() -> None:
    with pytest.raises(EngineError, match=r"only instructor\.kind=transformers"):
        as_embedding_engine(load_engine(TemplateEngineConfig()))


def tiny_engine(folder: Path):  # type: ignore[no-untyped-def]
    config = TransformersEngineConfig(model=folder, dtype="float32", device="cpu", threads=1)
    return as_embedding_engine(load_engine(config))


def test_the_engine_gives_the_mean_of_the_last_hidden_states(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    engine = tiny_engine(tiny_llama)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    found = engine.embed(TEXTS[:5])
    assert found.dtype == np.float32
    for text, row in zip(TEXTS[:5], found, strict=True):
        with torch.inference_mode():
            output = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        expected = output.hidden_states[-1][0].mean(0).numpy()
        assert np.abs(row - expected).max() < 1e-5


def test_what_is_beside_a_text_does_not_change_its_embedding(tiny_llama: Path) -> None:
    engine = tiny_engine(tiny_llama)
    together = engine.embed(TEXTS[:12])
    for number in reversed(range(12)):
        assert np.array_equal(engine.embed([TEXTS[number]])[0], together[number])
    assert np.isfinite(engine.embed(["", "word " * 3000])).all()


def test_an_observation_holds_history_and_embedding() -> None:
    embedding = InstructionEmbedding(Hashed(), 8)  # type: ignore[arg-type]
    observer = Observer(kind="embedding", episode_length=6, embedding=embedding)
    history = History.start().after(3).after(5)
    seen = observer.observe(TEXTS[0], "", history)
    assert seen.shape == (observer.size,) == (19 + 8,)
    assert np.array_equal(seen[19:], embedding.of(TEXTS[0]))
    assert np.array_equal(seen[:19], observe("features", TEXTS[0], "", history, 6)[:19])
    assert observer.metadata() == {
        "observation": "embedding",
        "embedding_schema": "1",
        "embedding_size": "8",
        "embedding_model": "hashed",
    }
