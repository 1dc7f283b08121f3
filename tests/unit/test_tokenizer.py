"""From texts to tokens: the trained tokenizer, Alpaca prompts, chat templates, special tokens."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teams_hpc.config import ModelShape
from teams_hpc.dataset.templates import (
    AlpacaFormat,
    ChatFormat,
    Example,
    Row,
    alpaca_prompt,
    choose_format,
)
from teams_hpc.dataset.tokenizer import PreparedTokenizer, prepare_tokenizer
from teams_hpc.errors import WorkError

SHAPE = ModelShape(vocab_size=420, max_position_embeddings=64)
ROWS = [
    Row("Name three rivers.", "", "The Nile, the Amazon and the Danube."),
    Row("Translate to French.", "Good morning", "Bonjour\n"),
    Row("Sort the numbers.", "3 1 2", "1 2 3"),
    Row("Write it in C++.", "", "::x ::y ::z ::f"),
]
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "[INST] {{ message['content'] | trim }} [/INST]{% else %} {{ message['content'] | trim }} "
    "{{ eos_token }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "<|turn|>system\nToday is {{ date_string }}<|done|>\n"
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|done|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedTokenizer, Path]:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    return prepare_tokenizer(SHAPE, ROWS * 20, folder), folder


def loaded(folder: Path, saved_to: Path, **changes: Any) -> Any:
    """A copy of the trained tokenizer with another template or other special tokens, as loaded."""
    tokenizer = prepare_tokenizer(folder, [], saved_to / "copy").tokenizer
    special = changes.pop("special", [])
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": special})
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(saved_to / "model")
    return prepare_tokenizer(saved_to / "model", [], saved_to / "prepared")


def test_a_trained_tokenizer_loads_and_learned_from_the_rows(
    trained: tuple[PreparedTokenizer, Path], tmp_path: Path
) -> None:
    prepared, folder = trained
    assert prepared.is_trained
    assert prepared.vocab_size <= SHAPE.vocab_size
    again = prepare_tokenizer(folder, [], tmp_path / "again")
    assert (again.pad_token_id, again.vocab_size) == (prepared.pad_token_id, prepared.vocab_size)
    assert not again.is_trained
    tokenizer = again.tokenizer
    assert tokenizer.model_max_length == 64
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    header = alpaca_prompt("", "")
    assert len(tokenizer(header)["input_ids"]) < len(header) / 2, "it merged what it saw often"
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
TRICKY = st.sampled_from(["<s>", "</s>", "<pad>", "{input}", "### Response:", "\n", " ", "[INST]"])
MIXED = st.lists(TEXT | TRICKY, max_size=4).map("".join)


@settings(max_examples=60)
@given(st.lists(st.builds(Row, MIXED, MIXED, MIXED), min_size=1, max_size=3))
def test_alpaca_examples_decode_to_prompt_and_response(
    trained: tuple[PreparedTokenizer, Path], rows: list[Row]
) -> None:
    tokenizer = trained[0].tokenizer
    for row, example in zip(rows, AlpacaFormat(tokenizer).encode(rows), strict=True):
        prompt = example.tokens[: example.prompt_length]
        response = example.tokens[example.prompt_length :]
        assert (prompt[0], response[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.decode(prompt[1:]) == alpaca_prompt(row.instruction, row.input)
        assert tokenizer.decode(response[:-1]) == row.response
        inside = {*prompt[1:], *response[:-1]}
        assert not inside & set(tokenizer.all_special_ids), "text became a special token"


def test_a_prompt_is_tokenised_as_it_will_be_without_the_response(
    trained: tuple[PreparedTokenizer, Path],
) -> None:
    """Together `Response:` and `:` would give the token `::`, which no prompt will end with."""
    tokenizer = trained[0].tokenizer
    assert len(tokenizer("::", add_special_tokens=False)["input_ids"]) == 1
    [example] = AlpacaFormat(tokenizer).encode([Row("Begin.", "", ":x")])
    prompt = tokenizer(alpaca_prompt("Begin.", ""))["input_ids"]
    assert example.tokens[: example.prompt_length] == prompt
    assert tokenizer.decode(example.tokens[example.prompt_length :]) == ":x</s>"


def test_the_alpaca_prompt_is_the_published_one() -> None:
    assert alpaca_prompt("Do {this}.", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nDo {this}.\n\n### Response:"
    )
    assert alpaca_prompt("Do it.", "to that") == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo it.\n\n### Input:\nto that\n\n### Response:"
    )


def test_a_llama_chat_template_is_followed_to_the_token(
    trained: tuple[PreparedTokenizer, Path], tmp_path: Path
) -> None:
    prepared = loaded(trained[1], tmp_path, chat_template=LLAMA_TEMPLATE)
    tokenizer = prepared.tokenizer
    for row, example in zip(ROWS, choose_format(tokenizer).encode(ROWS), strict=True):
        messages = [
            {"role": "user", "content": row.user_message},
            {"role": "assistant", "content": row.response},
        ]
        whole = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:1], return_dict=False)
        assert example == Example(whole, len(prompt))
        assert whole[-1] == tokenizer.eos_token_id


def test_html_in_a_chat_is_text_and_not_a_turn(
    trained: tuple[PreparedTokenizer, Path], tmp_path: Path
) -> None:
    prepared = loaded(trained[1], tmp_path, chat_template=LLAMA_TEMPLATE)
    tokenizer = prepared.tokenizer
    row = Row("Strike <s>this</s> out.", "", "</s> Done: <s>this</s>")
    [example] = ChatFormat(tokenizer).encode([row])
    assert example.tokens.count(tokenizer.eos_token_id) == 1
    assert example.tokens.count(tokenizer.bos_token_id) == 1
    response = example.tokens[example.prompt_length :]
    assert tokenizer.decode(response) == f" {row.response} </s>"
    prompt = tokenizer.decode(example.tokens[: example.prompt_length])
    assert prompt == f"<s>[INST] {row.instruction} [/INST]"


def test_a_turn_ends_with_its_token_and_every_day_is_the_same(
    trained: tuple[PreparedTokenizer, Path], tmp_path: Path
) -> None:
    tokenizer = loaded(
        trained[1], tmp_path, special=["<|turn|>", "<|done|>"], chat_template=CHATML_TEMPLATE
    ).tokenizer
    [example] = ChatFormat(tokenizer).encode([ROWS[1]])
    prompt, response = (
        tokenizer.decode(part)
        for part in (
            example.tokens[: example.prompt_length],
            example.tokens[example.prompt_length :],
        )
    )
    assert prompt == (
        "<|turn|>system\nToday is 26 Jul 2024<|done|>\n"
        "<|turn|>user\nTranslate to French.\n\nGood morning<|done|>\n<|turn|>assistant\n"
    )
    assert response == "Bonjour\n<|done|>", "nothing is learned after the end of the turn"


def test_a_template_without_an_end_gets_one(
    trained: tuple[PreparedTokenizer, Path], tmp_path: Path
) -> None:
    tokenizer = loaded(trained[1], tmp_path, chat_template=PLAIN_TEMPLATE).tokenizer
    [example] = ChatFormat(tokenizer).encode([ROWS[0]])
    response = example.tokens[example.prompt_length :]
    assert tokenizer.decode(response) == f"{ROWS[0].response}\n</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only in threes') }}", "only in threes"),
        ("{{ messages[-1]['content'] }}", "can't be told apart"),
    ],
)
def test_a_template_that_does_not_do_is_refused(
    trained: tuple[PreparedTokenizer, Path], tmp_path: Path, template: str, message: str
) -> None:
    tokenizer = loaded(trained[1], tmp_path, chat_template=template).tokenizer
    with pytest.raises(WorkError, match=rf"sft\.model: .*{message}.*Alpaca"):
        ChatFormat(tokenizer).encode(ROWS)


def test_without_a_padding_token_the_end_token_pads(
    trained: tuple[PreparedTokenizer, Path], tmp_path: Path
) -> None:
    prepared = loaded(trained[1], tmp_path, pad_token=None)
    assert prepared.pad_is_eos
    assert prepared.pad_token_id == prepared.tokenizer.eos_token_id
    assert choose_format(prepared.tokenizer).name == "alpaca"


def test_a_model_without_a_usable_tokenizer_is_refused(
    trained: tuple[PreparedTokenizer, Path], tmp_path: Path
) -> None:
    with pytest.raises(WorkError, match=r"no end token.*eos_token in its tokenizer_config\.json"):
        loaded(trained[1], tmp_path, eos_token=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorkError, match=r"sft\.model: can't load the tokenizer in .*empty"):
        prepare_tokenizer(tmp_path / "empty", [], tmp_path / "out")
    assert not (tmp_path / "out").exists()
