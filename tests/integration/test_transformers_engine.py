"""The transformers engine on small random Llamas: exact in any batch, scored like a plain model."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_llama
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from teams_hpc.config import TransformersEngineConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Completion, Message, Request, ScoreRequest, Task, complete_all
from teams_hpc.llm.decoder import Decoder, Row
from teams_hpc.llm.load import load_engines
from teams_hpc.llm.local_model import enough_memory, longest_sequence
from teams_hpc.llm.transformers_engine import TransformersEngine

TASK = Task(kind="answer", instruction="")
TEXTS = [f"Say something about {'very ' * (n % 7)}large number {n}." for n in range(24)]


def settings(folder: Path, **values: Any) -> TransformersEngineConfig:
    values = {"dtype": "float32", "batching": "fixed", "max_tokens": 12, "threads": 1} | values
    return TransformersEngineConfig(model=folder, device="cpu", **values)


def request(number: int, text: str) -> Request:
    message = Message(role="user", content=text)
    return Request(id=f"r{number:03d}", messages=(message,), task=TASK, seed=number)


REQUESTS = [request(number, text) for number, text in enumerate(TEXTS)]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_llama_chat"])
def test_a_completion_does_not_depend_on_its_batch(
    model: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(model)
    alone: list[Completion] = []
    engine = TransformersEngine(settings(folder))
    assert engine.exactness == "exact"
    for one in REQUESTS:
        alone += complete_all(engine, [one])
    together = complete_all(engine, REQUESTS)
    small = TransformersEngine(settings(folder, batch_size=5, batching="refill"))
    refilled = complete_all(small, REQUESTS[::-1])[::-1]
    assert alone == together == refilled
    assert small.exactness == "statistical"
    assert len({completion.text for completion in alone}) > 20
    other_seeds = [request_with_seed(one, one.seed + 1000) for one in REQUESTS]
    assert [c.text for c in complete_all(engine, other_seeds)] != [c.text for c in alone]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As a launcher may have it, whatever this machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("batching", "threads", "expected"),
    [("fixed", None, 1), ("fixed", 3, 3), ("refill", None, 2), ("refill", 1, 1)],
)
@pytest.mark.usefixtures("two_threads")
def test_an_engine_has_threads_of_its_own(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    batching: str,
    threads: int | None,
    expected: int,
) -> None:
    """Whatever it does, and without leaving them behind."""
    engine = TransformersEngine(settings(tiny_llama, batching=batching, threads=threads))
    seen = []
    for of_class in (type(engine._model), type(engine._model.base_model)):
        forward = of_class.forward

        def noting(*arguments: Any, _forward: Any = forward, **options: Any) -> Any:
            seen.append(torch.get_num_threads())
            return _forward(*arguments, **options)

        monkeypatch.setattr(of_class, "forward", noting)
    options = ("Equal", "Not Equal")
    one = REQUESTS[0]
    for act in (
        lambda: complete_all(engine, REQUESTS[:2]),
        lambda: engine.score([ScoreRequest(messages=one.messages, task=TASK, options=options)]),
        lambda: engine.embed(TEXTS[:2]),
    ):
        seen.clear()
        act()
        assert set(seen) == {expected}
        assert torch.get_num_threads() == 2


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for threads to divide its sums."""
    return make_llama(tmp_path_factory.mktemp("wide"), width=1024, num_layers=1)


def test_what_is_exact_does_not_depend_on_the_threads_of_a_launcher(wide_llama: Path) -> None:
    """On a machine whose sums aren't divided, there is nothing to see."""
    asked = [
        ScoreRequest(messages=one.messages, task=TASK, options=("Equal", "Not Equal"))
        for one in REQUESTS[:15]
    ]
    before = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            engine = TransformersEngine(settings(wide_llama, threads=None))
            assert engine.exactness == "exact"
            found.append((engine.score(asked), engine.embed(TEXTS[:3]).tobytes()))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


def test_freed_rows_are_refilled_and_steps_return_early(tiny_llama: Path) -> None:
    """Replies of very different lengths, some asked for while others are under way."""
    values = {"max_tokens": 200, "temperature": 1.0, "top_p": 1.0}
    expected = complete_all(TransformersEngine(settings(tiny_llama, **values)), REQUESTS)
    assert len({completion.completion_tokens for completion in expected}) >= 8
    engine = TransformersEngine(settings(tiny_llama, **values, batch_size=8, batching="refill"))
    left = REQUESTS.copy()
    done: dict[str, Completion] = {}
    most_in_a_step = 0
    while left or engine.num_pending:
        for one in left[:5]:
            engine.add(one)
        left = left[5:]
        before = engine.num_pending
        returned = engine.step()
        most_in_a_step = max(most_in_a_step, len(returned))
        assert returned
        assert engine.num_pending == before - len(returned)
        done.update((completion.id, completion) for completion in returned)
    assert [done[one.id] for one in REQUESTS] == expected
    assert most_in_a_step < 8


def _count_passes(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Shapes of the token ids of each pass from now on."""
    forward = type(engine._model).forward
    shapes = []

    def counted(*arguments: Any, **options: Any) -> Any:
        shapes.append(tuple(options["input_ids"].shape))
        return forward(*arguments, **options)

    monkeypatch.setattr(type(engine._model), "forward", counted)
    return shapes


def test_guessing_ahead_saves_passes_and_changes_no_token(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model that is greedy goes in circles, which is foreseen."""
    values = {"max_tokens": 100, "temperature": 0.0}
    found, passes = [], []
    for num_tokens in (0, 8):
        engine = TransformersEngine(
            settings(tiny_llama, **values, prompt_lookup_num_tokens=num_tokens)
        )
        shapes = _count_passes(engine, monkeypatch)
        found.append([complete_all(engine, [one]) for one in REQUESTS[:6]])
        passes.append(len(shapes))
        monkeypatch.undo()
    assert found[0] == found[1]
    assert passes[1] < passes[0]


def test_nothing_is_guessed_before_a_reply_has_begun() -> None:
    row = Row(id="", prompt=[1, 2, 3, 4, 1, 2], seed=0, limit=10)
    assert row.draft(8) == []
    for token in (2, 3):
        row.take(token)
    assert row.draft(3) == [4, 1, 2]


@pytest.mark.parametrize("batching", ["fixed", "refill"])
def test_prompts_of_one_length_are_batched_together(
    batching: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row of a batch holds as many places as its longest prompt needs, so none is in vain."""
    lengths: list[list[int]] = []
    admit = Decoder.admit

    def noted(decoder: Decoder, rows: Sequence[Row]) -> None:
        lengths.append([len(row.prompt) for row in rows])
        admit(decoder, rows)

    monkeypatch.setattr(Decoder, "admit", noted)
    engine = TransformersEngine(settings(tiny_llama, batching=batching, batch_size=6, max_tokens=1))
    asked = [request(number, f"{'very ' * (number % 4)}large") for number in range(24)]
    done = complete_all(engine, asked)
    assert [completion.id for completion in done] == [one.id for one in asked]
    assert [len(batch) for batch in lengths] == [6] * 4
    assert [len(set(batch)) for batch in lengths] == [1] * 4
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[3]


def test_what_prompts_begin_with_is_computed_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two long templates; what comes after either is short."""
    heads = ("Add a constraint to this, and " * 8, "Now make it somewhat broader, " * 8)
    asked = [request(number, heads[number % 2] + text) for number, text in enumerate(TEXTS)]
    engine = TransformersEngine(settings(tiny_llama, batch_size=6, batching="refill"))
    alone = [complete_all(engine, [one])[0] for one in asked]
    shapes = _count_passes(engine, monkeypatch)
    assert complete_all(engine, asked) == alone
    num_tokens = sum(completion.prompt_tokens for completion in alone)
    assert sum(rows * width for rows, width in shapes if width > 1) < num_tokens / 2


def test_all_options_of_a_batch_are_scored_in_one_pass(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more is for what the prompts begin with."""
    engine = TransformersEngine(settings(tiny_llama))
    shapes = _count_passes(engine, monkeypatch)
    options = ("Equal", "Not Equal")
    for head, expected in (("", [24]), ("Are these two equal? Answer: " * 5, [1, 24])):
        asked = [request(number, head + text[:25]) for number, text in enumerate(TEXTS)]
        shapes.clear()
        together = engine.score(
            [ScoreRequest(messages=one.messages, task=TASK, options=options) for one in asked]
        )
        assert [rows for rows, _ in shapes] == expected
        for one, score in zip(asked, together, strict=True):
            (alone,) = engine.score(
                [ScoreRequest(messages=one.messages, task=TASK, options=options)]
            )
            assert score.log_probabilities == pytest.approx(alone.log_probabilities, abs=1e-4)


@pytest.mark.parametrize(
    ("kinds", "window", "expected"),
    [
        (None, None, 1024),
        (["full_attention"], 512, 1024),
        (None, 512, 512),
        (["full_attention", "sliding_attention"], 512, 512),
    ],
)
def test_a_sequence_stays_within_a_sliding_window(
    kinds: list[str] | None, window: int | None, expected: int
) -> None:
    config = SimpleNamespace(
        max_position_embeddings=1024, layer_types=kinds, sliding_window=window, model_type="x"
    )
    assert longest_sequence(SimpleNamespace(config=config)) == expected


def test_a_model_with_other_layers_is_refused() -> None:
    config = SimpleNamespace(
        max_position_embeddings=1024, layer_types=["linear_attention"], model_type="other"
    )
    with pytest.raises(EngineError, match="other is no Llama-family model"):
        longest_sequence(SimpleNamespace(config=config))


def request_with_seed(one: Request, seed: int) -> Request:
    return Request(id=one.id, messages=one.messages, task=one.task, seed=seed)


def test_greedy_equals_generate(tiny_llama_chat: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_chat)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_chat, dtype=torch.float32)
    engine = TransformersEngine(settings(tiny_llama_chat, temperature=0.0))
    for one, completion in zip(REQUESTS, complete_all(engine, REQUESTS), strict=True):
        turns = [{"role": "user", "content": one.messages[0].content}]
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        found = model.generate(**ids, do_sample=False, max_new_tokens=12, pad_token_id=2)
        text = tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert completion.text == text
        assert completion.prompt_tokens == ids["input_ids"].shape[1]


def test_sampling_follows_the_models_distribution(tiny_llama: Path) -> None:
    """First tokens of many seeds against the softmax of a plain forward pass."""
    engine = TransformersEngine(
        settings(tiny_llama, max_tokens=1, temperature=1.0, top_p=1.0, batch_size=500)
    )
    same = [Request(id=f"{n:05d}", messages=REQUESTS[0].messages, task=TASK, seed=n)
            for n in range(4000)]  # fmt: skip
    texts = [completion.text for completion in complete_all(engine, same)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = tokenizer(f"{TEXTS[0]}\n\nAnswer:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits[0, -1].softmax(-1)
    by_text: Counter[str] = Counter()
    for token, share in enumerate(expected.tolist()):  # several byte tokens read alike
        by_text[tokenizer.decode([token], skip_special_tokens=True)] += share
    for text, share in by_text.most_common(5):
        assert texts.count(text) / len(texts) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_llama_chat"])
def test_scores_equal_a_plain_forward_pass(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    engine = TransformersEngine(settings(folder, batch_size=4))
    options = ("Equal", "Not Equal")
    asked = [
        ScoreRequest(messages=one.messages, task=TASK, options=options) for one in REQUESTS[:9]
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for one, score in zip(asked, engine.score(asked), strict=True):
        content = one.messages[0].content
        prompt = f"<|user|>{content}</s><|assistant|>"
        separator = ""
        if tokenizer.chat_template is None:
            prompt, separator = f"{content}\n\nAnswer:", " "
        start = len(tokenizer(prompt)["input_ids"])
        for option, found in zip(options, score.log_probabilities, strict=True):
            ids = [*tokenizer(f"{prompt}{separator}{option}")["input_ids"], 1]
            with torch.no_grad():
                logits = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(float(logits[i - 1, ids[i]]) for i in range(start, len(ids)))
            assert found == pytest.approx(expected, abs=1e-4)


def test_replies_end_at_the_limit_or_at_a_stop_token(tiny_llama: Path) -> None:
    engine = TransformersEngine(settings(tiny_llama, max_tokens=400, temperature=1.0, top_p=1.0))
    done = complete_all(engine, REQUESTS)
    assert {completion.finish_reason for completion in done} == {"stop", "length"}
    for completion in done:
        assert completion.completion_tokens <= 400
        assert (completion.finish_reason == "length") == (completion.completion_tokens == 400)
        assert "</s>" not in completion.text


def test_a_prompt_that_is_too_long_fails_alone(tiny_llama: Path) -> None:
    engine = TransformersEngine(settings(tiny_llama))
    done = complete_all(engine, [request(0, "word " * 3000), REQUESTS[1]])
    assert done[0].finish_reason == "error"
    assert "1024 positions" in done[0].error
    assert done[1].finish_reason != "error"


def test_equal_settings_share_one_model(tiny_llama: Path) -> None:
    first, second, third = load_engines(
        settings(tiny_llama), settings(tiny_llama), settings(tiny_llama, max_tokens=3)
    )
    assert first is second
    assert third is not first


def test_prompts_with_other_options_are_scored_side_by_side(tiny_llama: Path) -> None:
    engine = TransformersEngine(settings(tiny_llama))
    options = (("Equal",), ("Equal", "Not Equal", "neither"), ("Not Equal", "Equal"))
    asked = [
        ScoreRequest(messages=one.messages, task=TASK, options=some)
        for one, some in zip(REQUESTS, options, strict=False)
    ]
    together = engine.score(asked)
    for one, score in zip(asked, together, strict=True):
        (alone,) = engine.score([one])
        assert score.log_probabilities == pytest.approx(alone.log_probabilities, abs=1e-4)
        assert len(score.log_probabilities) == len(one.options)


def test_a_pad_token_without_an_embedding_is_not_used(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<another pad>"})
    tokenizer.save_pretrained(folder)
    expected = complete_all(TransformersEngine(settings(tiny_llama)), REQUESTS)
    assert complete_all(TransformersEngine(settings(folder)), REQUESTS) == expected


def _tear_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])


def _drop_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _change_shape(folder: Path) -> None:
    config = folder / "config.json"
    text = config.read_text()
    assert '"intermediate_size": 64' in text
    config.write_text(text.replace('"intermediate_size": 64', '"intermediate_size": 128'))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "can't load the model in"),
        (_tear_weights, "can't load the model in"),
        (_change_shape, "can't load the model in"),
        (_drop_a_tensor, "lacks 1 weights, among them model.layers.1.mlp.up_proj.weight"),
        (lambda folder: (folder / "config.json").write_text('{"a'), "not a valid JSON"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "can't load the model in"),
        (shutil.rmtree, "is no folder"),
    ],
)
def test_a_folder_without_a_whole_model_is_refused(
    tiny_llama: Path, tmp_path: Path, spoil: Callable[[Path], object], says: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    spoil(folder)
    with pytest.raises(EngineError, match=says) as caught:
        TransformersEngine(settings(folder))
    assert "all weights as safetensors" in str(caught.value)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory: 9 bytes")]
)
def test_out_of_memory_says_what_to_lower(tiny_llama: Path, error: RuntimeError) -> None:
    with pytest.raises(EngineError, match="lower batch_size"), enough_memory(settings(tiny_llama)):
        raise error


def test_other_faults_are_not_called_out_of_memory(tiny_llama: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="a bug"),
        enough_memory(settings(tiny_llama)),
    ):
        raise RuntimeError("a bug")
