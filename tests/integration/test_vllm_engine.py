"""The vllm engine on a double with vLLM's interface; on vLLM itself where that and a GPU are there.

The double computes with transformers, so what the engine makes of prompts, replies and likelihoods
can be compared with the transformers engine.
"""

import importlib.metadata
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.test_generation import make_run, usage_of

from teams_hpc.config import Config, TransformersEngineConfig, VllmEngineConfig, load_resolved
from teams_hpc.config.check import input_faults
from teams_hpc.config.digest import model_content_id, stage_inputs
from teams_hpc.errors import EngineError
from teams_hpc.generation.worker import generate
from teams_hpc.llm.base import Completion, Message, Request, ScoreRequest, Task, complete_all
from teams_hpc.llm.load import load_engines
from teams_hpc.llm.transformers_engine import TransformersEngine
from teams_hpc.llm.vllm_engine import VllmEngine
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.run_dir import read_manifest

DOUBLES = Path(__file__).parents[1] / "doubles"
TASK = Task(kind="answer", instruction="")
TEXTS = [f"Say something about {'very ' * (n % 7)}large number {n}." for n in range(10)]
OPTIONS = ("Equal", "Not Equal")


def has_real_vllm() -> bool:
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def forget_vllm() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The double instead of vLLM, as a module."""
    forget_vllm()
    monkeypatch.syspath_prepend(str(DOUBLES))
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"):
        monkeypatch.delenv(name, raising=False)
    import vllm

    yield vllm
    forget_vllm()


def settings(folder: Path, **values: Any) -> VllmEngineConfig:
    values = {"dtype": "float32", "max_tokens": 12, "temperature": 0.0} | values
    return VllmEngineConfig(model=folder, **values)


def plain(folder: Path, **values: Any) -> TransformersEngine:
    values = {"dtype": "float32", "max_tokens": 12, "temperature": 0.0} | values
    config = TransformersEngineConfig(model=folder, device="cpu", threads=1, **values)
    return TransformersEngine(config)


def request(number: int, text: str) -> Request:
    message = Message(role="user", content=text)
    return Request(id=f"r{number:03d}", messages=(message,), task=TASK, seed=2**62 + number)


REQUESTS = [request(number, text) for number, text in enumerate(TEXTS)]
SCORES = [ScoreRequest(messages=one.messages, task=TASK, options=OPTIONS) for one in REQUESTS]


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_llama_chat"])
def test_greedy_replies_and_likelihoods_are_those_of_the_transformers_engine(
    model: str, request: pytest.FixtureRequest, double: Any
) -> None:
    folder = request.getfixturevalue(model)
    engine, other = VllmEngine(settings(folder)), plain(folder)
    assert complete_all(engine, REQUESTS) == complete_all(other, REQUESTS)
    assert engine.num_pending == 0
    for found, expected in zip(engine.score(SCORES), other.score(SCORES), strict=True):
        assert found.prompt_tokens == expected.prompt_tokens
        assert found.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-4)
    assert engine.content_id == other.content_id == model_content_id(folder)
    assert engine.exactness == "statistical"
    assert engine.is_model


def test_a_request_is_sampled_by_its_own_seed(tiny_llama: Path, double: Any) -> None:
    engine = VllmEngine(settings(tiny_llama, temperature=1.0, top_p=0.9))
    first = complete_all(engine, REQUESTS)
    assert complete_all(engine, REQUESTS[::-1])[::-1] == first
    again = [
        Request(id=one.id, messages=one.messages, task=TASK, seed=one.seed + 99) for one in REQUESTS
    ]
    assert [one.text for one in complete_all(engine, again)] != [one.text for one in first]


def test_replies_end_at_the_limit_or_at_a_stop_token(tiny_llama: Path, double: Any) -> None:
    engine = VllmEngine(settings(tiny_llama, max_tokens=200, temperature=1.0))
    done = complete_all(engine, REQUESTS)
    assert {completion.finish_reason for completion in done} == {"stop", "length"}
    for completion in done:
        assert (completion.finish_reason == "length") == (completion.completion_tokens == 200)
        assert "</s>" not in completion.text


def test_what_vllm_is_told(tiny_llama: Path, double: Any) -> None:
    import os

    config = settings(
        tiny_llama, max_model_len=300, tensor_parallel_size=2, gpu_memory_utilization=0.4
    )
    engine = VllmEngine(config)
    args = engine._engine.args
    assert (args.model, args.dtype) == (str(tiny_llama), "float32")
    assert (args.max_model_len, args.tensor_parallel_size) == (300, 2)
    assert args.gpu_memory_utilization == 0.4
    assert not args.trust_remote_code
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    core = engine._engine.engine_core
    engine.close()
    engine.close()
    assert core.is_shut_down


def test_a_prompt_that_is_too_long_fails_alone(tiny_llama: Path, double: Any) -> None:
    engine = VllmEngine(settings(tiny_llama, max_model_len=200))
    done = complete_all(engine, [request(0, "word " * 900), REQUESTS[1]])
    assert done[0].finish_reason == "error"
    assert "200 positions" in done[0].error
    assert done[1].finish_reason != "error"
    message = (Message(role="user", content="word " * 900),)
    with pytest.raises(EngineError, match="use a reviewer with a longer context"):
        engine.score([ScoreRequest(messages=message, task=TASK, options=OPTIONS)])
    # At the very limit: a reply of one token; a judged prompt needs room for one that nobody reads.
    length = len(engine._chat.encode(REQUESTS[0].messages))
    short = VllmEngine(settings(tiny_llama, max_model_len=length + 1))
    (one,) = complete_all(short, REQUESTS[:1])
    assert (one.finish_reason, one.completion_tokens) == ("length", 1)


def test_a_request_that_vllm_drops_is_an_error_of_its_own(
    tiny_llama: Path, double: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(double.LLMEngine, "aborts", frozenset({"1"}))
    done = complete_all(VllmEngine(settings(tiny_llama)), REQUESTS[:3])
    assert [one.finish_reason == "error" for one in done] == [False, True, False]
    assert done[1].error == "vLLM ended the request: abort"


def test_faults_of_vllm_say_what_to_change(
    tiny_llama: Path, double: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=r"can't load the model in .*is more than 1024"):
        VllmEngine(settings(tiny_llama, max_model_len=5000))
    with pytest.raises(EngineError, match="is no folder"):
        VllmEngine(settings(tmp_path / "none"))
    engine = VllmEngine(settings(tiny_llama))
    engine.add(REQUESTS[0])

    def dies(_: object) -> None:
        raise RuntimeError("CUDA out of memory\nand more")

    monkeypatch.setattr(double.LLMEngine, "step", dies)
    with pytest.raises(EngineError, match=r"CUDA out of memory \(where memory is short, lower"):
        engine.step()


def test_scoring_leaves_replies_in_flight_to_their_owner(tiny_llama: Path, double: Any) -> None:
    engine = VllmEngine(settings(tiny_llama, max_tokens=1))
    expected = complete_all(engine, REQUESTS[:3])
    for one in REQUESTS[:3]:
        engine.add(one)
    scores = engine.score(SCORES[:2])
    assert len(scores) == 2
    assert engine.num_pending == 3
    done: list[Completion] = []
    while engine.num_pending:
        done += engine.step()
    assert sorted(done, key=lambda one: one.id) == expected
    assert engine.step() == []


def test_equal_settings_share_one_model_and_a_run_goes_through(
    tiny_llama: Path, double: Any, tmp_path: Path
) -> None:
    model: dict[str, Any] = {"kind": "vllm", "model": str(tiny_llama), "dtype": "float32"}
    model |= {"max_tokens": 150, "temperature": 1.0}
    changes: dict[str, Any] = {
        "seeds": {"limit": 6},
        "generate": {"unit_size": 6, "num_steps": 2, "equal_threshold": 0.0},
        "expert": model,
        "reviewer": {**model, "verdict": "likelihood"},
    }
    config = load_resolved(make_run(tmp_path / "x", **changes).config)
    expert, reviewer = load_engines(config.expert, config.reviewer)
    assert expert is reviewer
    double.LLMEngine.num_loaded = 0
    for verdict in ("likelihood", "generated"):
        changes["reviewer"] = {**model, "verdict": verdict}
        run_dir = make_run(tmp_path / verdict, **changes)
        generate(run_dir, load_resolved(run_dir.config), 0, StopFlag())
        manifest = read_manifest(run_dir, "generate")
        assert manifest is not None
        assert manifest["counts"]["attempted"] == 12
        assert manifest["counts"]["failed"] == 0
        assert manifest["exactness"] == "statistical"
        assert usage_of(manifest)["expert", "completion_tokens"] > 0
    assert double.LLMEngine.num_loaded == 2


def make_config(folder: Path, **values: Any) -> Config:
    return Config(
        name="a", run_dir=folder / "run", expert={"kind": "vllm", "model": folder, **values}
    )


def test_a_missing_package_is_said_before_anything_starts(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (fault,) = input_faults(make_config(tiny_llama))
    assert fault.startswith("expert.kind: vllm needs the package vllm, which is not installed")
    assert "extra 'vllm'" in fault
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match="extra 'vllm'"):
        VllmEngine(settings(tiny_llama))


def test_it_is_found_and_gpus_are_counted(tiny_llama: Path, double: Any) -> None:
    assert input_faults(make_config(tiny_llama)) == []
    (fault,) = input_faults(make_config(tiny_llama, tensor_parallel_size=4))
    assert fault.startswith("expert.tensor_parallel_size: 4 GPUs, but a node has 0 here")
    (fault,) = input_faults(make_config(tiny_llama / "none"))
    assert fault.startswith("expert.model: no model folder")


def test_how_it_is_split_is_outside_the_digest_what_fits_is_inside(tiny_llama: Path) -> None:
    before = stage_inputs(make_config(tiny_llama), "generate")
    split = make_config(tiny_llama, tensor_parallel_size=8, gpu_memory_utilization=0.5)
    assert stage_inputs(split, "generate") == before
    shorter = make_config(tiny_llama, max_model_len=512)
    assert stage_inputs(shorter, "generate") != before
    assert split.gpus_of_process("generate") == 8
    assert split.gpus_of_process("policy") == split.gpus_of_process("sft") == 1


@pytest.mark.skipif(not has_real_vllm(), reason="vllm is not installed (extra 'vllm')")
def test_vllm_takes_what_the_double_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_vllm()
    import vllm

    taken = {
        "EngineArgs": "model dtype tensor_parallel_size gpu_memory_utilization max_model_len "
        "trust_remote_code load_format disable_log_stats",
        "SamplingParams": "temperature top_p seed stop_token_ids max_tokens prompt_logprobs "
        "detokenize output_kind",
    }
    for name, words in taken.items():
        assert set(words.split()) <= inspect.signature(getattr(vllm, name)).parameters.keys()
    parameters = inspect.signature(vllm.LLMEngine.add_request).parameters
    assert {"request_id", "prompt", "params"} <= parameters.keys()


@pytest.mark.gpu
@pytest.mark.skipif(not has_real_vllm(), reason="vllm is not installed (extra 'vllm')")
def test_vllm_itself_agrees_with_the_transformers_engine(tiny_llama_chat: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("vLLM needs a GPU; torch sees none")
    forget_vllm()
    engine = VllmEngine(settings(tiny_llama_chat, gpu_memory_utilization=0.2))
    try:
        other = plain(tiny_llama_chat)
        found, expected = complete_all(engine, REQUESTS), complete_all(other, REQUESTS)
        assert [one.prompt_tokens for one in found] == [one.prompt_tokens for one in expected]
        assert sum(a.text == b.text for a, b in zip(found, expected, strict=True)) >= 8
        for score, plain_score in zip(engine.score(SCORES), other.score(SCORES), strict=True):
            assert score.log_probabilities == pytest.approx(plain_score.log_probabilities, abs=0.05)
        assert complete_all(engine, REQUESTS) == found
    finally:
        engine.close()
