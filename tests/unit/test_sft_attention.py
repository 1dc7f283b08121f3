"""Packed sequences are kept apart, and the check at the start notices when they aren't."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from teams_hpc.config.schema import SftConfig
from teams_hpc.dataset.packing import Sequences, fill_rows
from teams_hpc.errors import WorkError
from teams_hpc.sft.attention import check_isolation, choose_attention, packed_logits
from teams_hpc.sft.data import PackedRows

LENGTH, VOCABULARY = 32, 96
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _llama(dtype: str) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                attn_implementation="sdpa",
            )
        )
    return model.to(DTYPES[dtype]).eval()


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> PackedRows:
    """Row 0 holds one sequence and row 1 four, so the check has to look for a crowded one."""
    path: Path = tmp_path_factory.mktemp("packed") / "packed.h5"
    lengths = [30, 9, 11, 5, 6]
    sequences = Sequences(
        np.random.default_rng(0).integers(1, VOCABULARY, sum(lengths)).astype(np.int32),
        np.cumsum([0, *lengths]),
        np.ones(5, np.int64),
        np.arange(5),
    )
    columns = fill_rows(sequences, [[0], [1, 2, 3, 4]], LENGTH, 0)
    with h5py.File(path, "w") as file:
        file.attrs.update(pad_token_id=0, vocab_size=VOCABULARY)
        for name, values in columns.items():
            file.create_dataset(f"train/{name}", data=values)
    return PackedRows.open(path, "train", LENGTH)


def _forward(model, **changes):
    @torch.no_grad()
    def forward(input_ids, position_ids):
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        inputs |= {name: change(input_ids) for name, change in changes.items()}
        return model(**inputs).logits

    return forward


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sequences_are_apart(packed, dtype):
    model = _llama(dtype)

    @torch.no_grad()
    def forward(input_ids, position_ids):
        return packed_logits(model, input_ids, position_ids, "sdpa")

    assert check_isolation(forward, packed, dtype) < {"float32": 1e-6, "bfloat16": 0.02}[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            {"position_ids": lambda ids: torch.arange(ids.shape[1]).expand_as(ids)},
            id="positions that don't restart",
        ),
        pytest.param({"position_ids": lambda ids: None}, id="no positions"),
        pytest.param({"attention_mask": torch.ones_like}, id="an attention mask"),
    ],
)
def test_broken_isolation_is_noticed(packed, dtype, change):
    with pytest.raises(WorkError, match=r"see each other.*sft\.attention=sdpa"):
        check_isolation(_forward(_llama(dtype), **change), packed, dtype)


def test_a_model_that_answers_nan_is_not_taken_as_isolated(packed):
    def forward(input_ids, position_ids):
        return torch.full((*input_ids.shape, VOCABULARY), float("nan"))

    with pytest.raises(WorkError, match="see each other"):
        check_isolation(forward, packed, "float32")


def test_rows_are_joined_for_flash_attention():
    """It looks at position ids only where there is one row (transformers 5.23)."""
    seen = []

    class Model:
        def __call__(self, input_ids, position_ids, use_cache):
            seen.append((input_ids.tolist(), position_ids.tolist(), use_cache))
            logits = torch.nn.functional.one_hot(input_ids, 5).float()
            return type("Output", (), {"logits": logits})

    ids, positions = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0, 1], [0, 0]])
    logits = packed_logits(Model(), ids, positions, "flash_attention_2")
    assert seen == [([[1, 2, 3, 4]], [[0, 1, 0, 0]], False)]
    assert logits.argmax(-1).tolist() == ids.tolist()


def test_choice_of_attention():
    assert choose_attention(SftConfig(attention="sdpa"), "cpu") == "sdpa"
    assert choose_attention(SftConfig(attention="auto"), "cpu") == "sdpa"
    with pytest.raises(WorkError, match=r"no CUDA device.*sft\.attention=sdpa"):
        choose_attention(SftConfig(attention="flash_attention_2"), "cpu")
