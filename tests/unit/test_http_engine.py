"""The http engine against a real server that misbehaves."""

import json
import logging
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from chat_server import ChatServer, chat_server

from teams_hpc.config import HttpEngineConfig
from teams_hpc.config.schema import HttpReviewerConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Message, Request, Task, complete_all
from teams_hpc.llm.http_engine import HttpEngine, _parse, _pause_s, _Retry, _seconds
from teams_hpc.llm.load import load_engines

TASK = Task(kind="answer", instruction="")
KEY = "sk-very-secret-4711"


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teams_hpc.llm.http_engine._FIRST_PAUSE_S", 0.005)


def requests(count: int) -> list[Request]:
    return [
        Request(
            id=f"r{n}", messages=(Message(role="user", content=f"prompt {n}"),), task=TASK, seed=n
        )
        for n in range(count)
    ]


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(2000):
        if is_so():
            return
        time.sleep(0.005)
    raise TimeoutError


@contextmanager
def engine_for(server: ChatServer, **values: Any) -> Iterator[HttpEngine]:
    values = {"max_concurrency": 4, "timeout_s": 5.0} | values
    is_limited = values.pop("is_limited", False)
    config = HttpEngineConfig(base_url=server.url, model="m", **values)
    engine = HttpEngine(config, is_limited=is_limited)
    try:
        yield engine
    finally:
        engine.close()


def test_every_request_is_answered_once_whatever_the_server_does() -> None:
    faults = ("429", "500", "torn", "ok", "drop", "503", "wrong", "gzip", "ok", "408")
    server = ChatServer(behave=lambda number: faults[number % 10] if number < 80 else "ok")
    with chat_server(server), engine_for(server, max_retries=20) as engine:
        done = complete_all(engine, requests(60))
        assert engine.num_pending == 0
    assert [c.text for c in done] == [f"echo: prompt {n}" for n in range(60)]
    assert sorted(server.answered) == sorted(f"prompt {n}" for n in range(60))
    assert {(c.finish_reason, c.prompt_tokens, c.completion_tokens) for c in done} == {
        ("stop", 7, 3)
    }
    num_refused = sum(faults[number % 10] in ("429", "503", "408") for number in range(80))
    assert len(server.bodies) - num_refused == sum(1 + c.lost for c in done)


LOST = ("torn", "drop", "wrong", "gzip", "drip", "slow", "504")


def misbehaving(*what: str) -> ChatServer:
    """Does one after the other, and then as it should; `slow` is later than any test waits."""

    def behave(number: int) -> str:
        one = what[number] if number < len(what) else "ok"
        if one != "slow":
            return one
        time.sleep(4.0)
        return "ok"

    return ChatServer(behave=behave)


@pytest.mark.parametrize(
    ("what", "finish_reason", "lost"),
    [
        (("429", "408", "503"), "stop", 0),
        (LOST, "stop", 7),
        (("drop", "429", "wrong"), "stop", 2),
        (("503",) * 11, "error", 0),
        (("503", "torn", *("503",) * 9), "error", 0),
        (("torn",) * 11, "error", 8),
        (("wrong", "400"), "error", 0),
        (("wrong", "torn", "400"), "error", 1),
    ],
    ids=["refused", "lost", "both", "always refused", "lost once", "always lost", "400", "twice"],
)
def test_a_call_says_how_often_else_it_may_have_been_made(
    what: tuple[str, ...], finish_reason: str, lost: int
) -> None:
    server = misbehaving(*what)
    with chat_server(server), engine_for(server, timeout_s=2.0, max_retries=8) as engine:
        (done,) = complete_all(engine, requests(1))
    assert (done.finish_reason, done.lost) == (finish_reason, lost)


@pytest.mark.parametrize("what", LOST)
def test_under_a_limit_a_call_that_may_have_been_made_is_not_made_again(what: str) -> None:
    server = misbehaving("429", what)
    limits = {"is_limited": True, "timeout_s": 2.0, "max_retries": 6}
    with chat_server(server), engine_for(server, **limits) as engine:
        (done,) = complete_all(engine, requests(1))
        wait_until(lambda: len(server.bodies) == 2)
    assert (done.finish_reason, done.text, done.lost) == ("error", "", 0)
    assert done.error.endswith(
        "; the call may have been made and paid for, and is not made again because "
        "budget.max_expert_calls is set; generate.retry_failed=true makes it again"
    )


@pytest.mark.parametrize(("scheme", "lost"), [("http", 2), ("https", 0)])
def test_a_request_that_found_no_connection_is_not_lost(scheme: str, lost: int) -> None:
    """A port that nobody answers on: a connection can be had there, an encrypted one can't."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        far = ChatServer(url=f"{scheme}://127.0.0.1:{silent.getsockname()[1]}/v1")
        with engine_for(far, timeout_s=0.8, max_retries=2) as engine:
            (done,) = complete_all(engine, requests(1))
        assert (done.finish_reason, done.lost) == ("error", lost)
        with engine_for(far, timeout_s=0.8, max_retries=2, is_limited=True) as engine:
            (done,) = complete_all(engine, requests(1))
    assert ("3 attempts" in done.error) == (lost == 0)


def test_what_is_one_engine_with_a_limited_one_is_limited_too() -> None:
    expert = HttpEngineConfig(base_url="http://x/v1", model="m")
    same = HttpReviewerConfig(base_url="http://x/v1", model="m")
    other = HttpReviewerConfig(base_url="http://x/v1", model="other")

    def limits(*configs: HttpEngineConfig, limited: HttpEngineConfig | None) -> list[bool]:
        engines = load_engines(*configs, limited=limited)
        for engine in engines:
            engine.close()
        return [engine._is_limited for engine in engines]  # type: ignore[attr-defined]

    assert limits(expert, other, limited=expert) == [True, False]
    assert limits(same, expert, limited=expert) == [True, True]
    assert limits(expert, same, limited=None) == [False, False]


def test_no_more_calls_at_a_time_than_allowed() -> None:
    server = ChatServer(delay_s=0.1)
    with chat_server(server), engine_for(server, max_concurrency=3) as engine:
        complete_all(engine, requests(12))
    assert server.peak == 3


def test_connections_are_kept_for_the_calls_that_follow() -> None:
    server = ChatServer()
    with chat_server(server), engine_for(server, max_concurrency=3) as engine:
        for _ in range(4):
            complete_all(engine, requests(10))
    assert server.num_connections <= 3


def test_a_step_returns_all_that_is_there_and_what_ends_together_wakes_it_once() -> None:
    reply, stands, go_on = threading.Event(), threading.Event(), threading.Event()
    server = ChatServer()

    def behave(number: int) -> str:
        reply.wait(timeout=10)
        return "ok"

    def stand_still() -> None:
        stands.set()
        go_on.wait(timeout=10)

    server.behave = behave
    with chat_server(server), engine_for(server, max_concurrency=8) as engine:
        for request in requests(8):
            engine.add(request)
        wait_until(lambda: len(server.bodies) == 8)
        engine._loop.call_soon_threadsafe(stand_still)
        assert stands.wait(timeout=10)
        reply.set()
        wait_until(lambda: len(server.answered) == 8 and server._now == 0)
        go_on.set()
        wait_until(lambda: not (engine._calls or engine._ended or engine._done.empty()))
        assert engine._done.qsize() == 1
        assert len(engine.step()) == 8
        assert engine.step() == []


def test_a_step_returns_replies_that_came_one_after_the_other() -> None:
    with chat_server(ChatServer()) as server, engine_for(server) as engine:
        for request in requests(3):
            num_before = engine._done.qsize()
            engine.add(request)
            wait_until(lambda before=num_before: engine._done.qsize() > before)
        assert [completion.id for completion in engine.step()] == ["r0", "r1", "r2"]
        assert engine.num_pending == 0


def test_requests_that_come_together_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wakes: list[object] = []
    go_on = threading.Event()
    with chat_server(ChatServer()) as server, engine_for(server) as engine:
        wake = engine._loop.call_soon_threadsafe
        wake(go_on.wait, 10)
        monkeypatch.setattr(
            engine._loop, "call_soon_threadsafe", lambda call: (wakes.append(call), wake(call))
        )
        for request in requests(30):
            engine.add(request)
        assert len(wakes) == 1
        go_on.set()
        done: list[str] = []
        drain(engine, done)
        monkeypatch.undo()
    assert sorted(done) == sorted(request.id for request in requests(30))


def test_a_proxy_is_not_asked_for_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(ChatServer()) as gone:
        pass
    monkeypatch.setenv("http_proxy", gone.url.replace("127.0.0.1", "me:secret@127.0.0.1"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with chat_server(ChatServer()) as server, engine_for(server, max_retries=0) as engine:
        (done,) = complete_all(engine, requests(1))
    assert done.text == "echo: prompt 0"
    with engine_for(ChatServer(url="http://far.invalid/v1"), max_retries=0) as engine:
        (done,) = complete_all(engine, requests(1))
    assert "no reply from far.invalid" in done.error
    assert "secret" not in done.error


@pytest.mark.parametrize("login", ["", "me:secret@"])
def test_a_proxy_hears_its_own_password_alone_and_no_message_does(
    login: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with chat_server(ChatServer()) as server:
        place = server.url.removeprefix("http://").removesuffix("/v1")
        for scheme in ("http", "https"):
            monkeypatch.setenv(f"{scheme}_proxy", f"{login}{place}")
        far = ChatServer(url="https://far.invalid/v1")
        with engine_for(far, max_retries=0, api_key_env="MY_KEY") as engine:
            (refused,) = complete_all(engine, requests(1))
        near = ChatServer(url="http://far.invalid/v1")
        with engine_for(near, api_key_env="MY_KEY") as engine:
            (passed_on,) = complete_all(engine, requests(1))
        assert server.keys == [None, f"Bearer {KEY}"]
    assert passed_on.text == "echo: prompt 0"
    assert "407" in refused.error
    assert "secret" not in refused.error
    own = f"Basic {b64encode(b'me:secret').decode()}" if login else None
    assert server.proxy_keys == [own, own]


@pytest.mark.parametrize("proxy", ["socks5://me:secret@host:1080", "http://me:se#cret@host:1"])
def test_what_is_no_http_proxy_is_refused_without_quoting_it(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(EngineError, match="http_proxy or all_proxy") as refused:
        HttpEngine(HttpEngineConfig(base_url="http://far.invalid/v1", model="any"))
    assert "cret" not in str(refused.value)


def test_sampling_and_key_are_sent_and_the_key_is_told_to_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server = ChatServer(behave=lambda number: "ok" if number < 2 else "401")
    with chat_server(server), engine_for(server, api_key_env="MY_KEY", top_p=0.5) as engine:
        complete_all(engine, requests(2))
        with pytest.raises(EngineError, match="refuses the key") as caught:
            complete_all(engine, requests(1))
    assert server.keys == [f"Bearer {KEY}"] * 3
    assert server.bodies[1]["seed"] in (0, 1)
    assert (server.bodies[0]["top_p"], server.bodies[0]["model"]) == (0.5, "m")
    assert "MY_KEY" in str(caught.value)
    assert KEY not in str(caught.value) + caplog.text


def test_a_missing_key_is_named() -> None:
    with pytest.raises(EngineError, match="NO_SUCH_KEY is not set"):
        HttpEngine(HttpEngineConfig(base_url="http://x/v1", model="m", api_key_env="NO_SUCH_KEY"))


@pytest.mark.parametrize("status", ["404", "307"])
def test_a_wrong_model_or_address_ends_the_work(status: str) -> None:
    server = ChatServer(behave=lambda number: status)
    with (
        chat_server(server),
        engine_for(server) as engine,
        pytest.raises(EngineError, match="check base_url"),
    ):
        complete_all(engine, requests(1))


def test_a_bad_request_fails_alone() -> None:
    server = ChatServer(behave=lambda number: "400" if number == 0 else "ok")
    with chat_server(server), engine_for(server, max_concurrency=1) as engine:
        done = complete_all(engine, requests(3))
    assert sorted(c.finish_reason for c in done) == ["error", "stop", "stop"]
    assert len(server.bodies) == 3


def test_retries_end_and_say_so() -> None:
    server = ChatServer(behave=lambda number: "500")
    with chat_server(server), engine_for(server, max_retries=2) as engine:
        (done,) = complete_all(engine, requests(1))
    assert done.finish_reason == "error"
    assert "answered 500 (3 attempts" in done.error
    assert len(server.bodies) == 3


def test_nobody_there_is_an_error_completion_not_a_hang() -> None:
    with chat_server(ChatServer()) as gone:
        pass
    with engine_for(gone, max_retries=1, timeout_s=1.0, is_limited=True) as engine:
        (done,) = complete_all(engine, requests(1))
    assert "no reply from" in done.error
    assert "2 attempts" in done.error
    assert done.lost == 0


def test_a_slow_server_times_out_and_is_asked_again() -> None:
    slow = iter([0.5, 0.0])
    server = ChatServer()

    def behave(number: int) -> str:
        time.sleep(next(slow))
        return "ok"

    server.behave = behave
    with chat_server(server), engine_for(server, timeout_s=0.2, max_retries=2) as engine:
        (done,) = complete_all(engine, requests(1))
    assert done.text == "echo: prompt 0"
    assert len(server.bodies) == 2


def test_a_server_that_drips_is_cut_off() -> None:
    server = ChatServer(behave=lambda number: "drip" if number == 0 else "ok")
    with chat_server(server), engine_for(server, timeout_s=0.2, max_retries=1) as engine:
        (done,) = complete_all(engine, requests(1))
    assert done.text == "echo: prompt 0"
    assert len(server.bodies) == 2


def test_a_reply_without_usage_counts_no_tokens() -> None:
    server = ChatServer(behave=lambda number: "unmeasured")
    with chat_server(server), engine_for(server) as engine:
        (done,) = complete_all(engine, requests(1))
    assert (done.finish_reason, done.prompt_tokens, done.completion_tokens) == ("stop", 0, 0)


@pytest.mark.parametrize("stray", ["\nx", "\rx", "é"])
def test_a_key_that_is_none_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, stray: str
) -> None:
    monkeypatch.setenv("MY_KEY", KEY + stray)
    with pytest.raises(EngineError, match="MY_KEY holds characters") as caught:
        HttpEngine(HttpEngineConfig(base_url="http://x/v1", model="m", api_key_env="MY_KEY"))
    assert KEY not in str(caught.value)


def test_a_key_is_sent_without_the_line_break_of_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\r\n")
    with chat_server(ChatServer()) as server, engine_for(server, api_key_env="MY_KEY") as engine:
        complete_all(engine, requests(1))
    assert server.keys == [f"Bearer {KEY}"]


def test_a_complaint_is_passed_on_without_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server = ChatServer(behave=lambda number: "400", complaint=f"too long, said {KEY}")
    with chat_server(server), engine_for(server, api_key_env="MY_KEY") as engine:
        (done,) = complete_all(engine, requests(1))
    assert "answered 400: too long, said [key]" in done.error


@pytest.mark.parametrize("address", ["http://[::1/v1", "http://node7:99999/v1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(EngineError, match="is no address"):
        HttpEngine(HttpEngineConfig(base_url=address, model="m"))


def drain(engine: HttpEngine, done: list[str]) -> None:
    while engine.num_pending:
        done += [completion.id for completion in engine.step()]


def test_replies_that_came_before_a_refusal_are_not_lost() -> None:
    server = ChatServer(behave=lambda number: "ok" if number < 5 else "401")
    done: list[str] = []
    with chat_server(server), engine_for(server, max_concurrency=1) as engine:
        for request in requests(6):
            engine.add(request)
        while len(server.answered) < 5 or len(server.bodies) < 6:
            time.sleep(0.005)
        with pytest.raises(EngineError, match="refuses the key"):
            drain(engine, done)
        assert engine.num_pending == 0
    assert done == [f"r{n}" for n in range(5)]


def test_a_server_that_asks_for_time_gets_it() -> None:
    now = datetime.now(UTC)
    assert _seconds("7") == 7.0
    assert 50 < (_seconds(format_datetime(now + timedelta(seconds=60), usegmt=True)) or 0) <= 60
    assert _seconds("soon") is _seconds("nan") is _seconds(None) is None
    for attempt in range(12):
        assert 7.0 < _pause_s(4711, attempt, 7.0) < 7.0 + 1.5 * 60
    assert len({_pause_s(seed, 0, 7.0) for seed in range(50)}) > 40


def test_closing_with_calls_in_flight_ends_the_thread() -> None:
    server = ChatServer(delay_s=0.2)
    with chat_server(server), engine_for(server) as engine:
        for request in requests(10):
            engine.add(request)
        engine.close()
        assert not engine._thread.is_alive()
        engine.close()


def test_a_whole_reply_without_content_is_empty_and_not_asked_again() -> None:
    value = {
        "choices": [{"message": {"content": None}, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7},
    }
    completion = _parse(requests(1)[0], json.dumps(value).encode())
    assert (completion.text, completion.finish_reason) == ("", "length")
    assert completion.completion_tokens == 7


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (rb"a \ud83d b \ude00", "a \ufffd b \ufffd"),
        (b"a \xed\xa0\xbd b", "a \ufffd b"),
        (rb"\ud83d\ude00 \u00e9", "\U0001f600 é"),
    ],
    ids=["escaped", "as bytes", "whole"],
)
def test_half_a_surrogate_pair_in_a_reply_is_replaced(content: bytes, text: str) -> None:
    reply = b'{"choices": [{"message": {"content": "%s"}}]}' % content
    completion = _parse(requests(1)[0], reply)
    assert completion.text == text
    assert completion.text.encode().decode() == text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": 7}}]}',
        b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": 1e999}}',
        b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": NaN}}',
        b"[" * 100_000,
    ],
    ids=["nothing", "no text", "a list", "no choice", "a number", "infinite", "no number", "deep"],
)
def test_what_is_no_reply_is_asked_for_again(content: bytes) -> None:
    with pytest.raises(_Retry, match="no chat completion"):
        _parse(requests(1)[0], content)
