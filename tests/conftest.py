"""Small real models for tests: a random Llama with a tokenizer trained here."""

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is slow, not wrong.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the soak tests unless they are asked for."""
    if "chaos" in config.option.markexpr or os.environ.get("TEAMS_HPC_CHAOS") == "1":
        return
    for item in items:
        if item.get_closest_marker("chaos"):
            item.add_marker(pytest.mark.skip(reason="a soak: make test-chaos runs it"))


@contextmanager
def locked(paths: Iterable[Path]) -> Iterator[None]:
    """Hold the lock that HDF5 takes on a file it writes, so that nobody else gets any on it."""
    with ExitStack() as stack:
        for path in paths:
            stream = stack.enter_context(path.open("rb"))
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def without_hdf5_locks(how: str | None) -> dict[str, str]:
    """This environment with the variable by which sites with Lustre turn HDF5's locks off."""
    plain = {key: value for key, value in os.environ.items() if key != "HDF5_USE_FILE_LOCKING"}
    return plain if how is None else {**plain, "HDF5_USE_FILE_LOCKING": how}


def make_llama(
    folder: Path, chat_template: str | None = None, *, width: int = 32, num_layers: int = 2
) -> Path:
    """A Llama, by default of 2 layers, 32 wide, with random weights, and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Equal Not Equal the answer is one of these"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: no chat template."""
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_llama_chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model."""
    return make_llama(tmp_path_factory.mktemp("llama-chat"), CHAT_TEMPLATE)
