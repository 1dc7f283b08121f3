"""Any server that speaks the OpenAI chat protocol: a hosted expert, or one on another node.

Requests run in an event loop on a thread of their own, so that a caller sees an ordinary engine.
Both sides hand over what they have all at once: waking the other for every single request would
cost more than the requests. The key is read from the environment and appears in no message.
"""

import asyncio
import email.utils
import json
import math
import queue
import re
import threading
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import aiohttp

from teams_hpc.config.schema import HttpEngineConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Completion, Exactness, FinishReason, Request, Score, ScoreRequest
from teams_hpc.llm.http_address import authorities, chat_url, proxy_for, read_key

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
_LONGEST_ASKED_S = 600.0
_KEPT_OPEN_S = 4.0
"""An idle connection; many servers close theirs after 5 s, and a request on it then is lost."""
_LONGEST_CONNECT_S = 30.0
_NEVER_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ClientHttpProxyError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.InvalidURL,
    UnicodeError,  # no name of a host
)
"""There was no connection to send the request on; with any other fault it may have arrived."""
_REFUSED_FOR_NOW = frozenset({408, 429, 503, 529})
"""The server has not begun; before any other status from 500 on, a model may have worked."""
_NOT_REPEATED = (
    "the call may have been made and paid for, and is not made again because "
    "budget.max_expert_calls is set; generate.retry_failed=true makes it again"
)
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class _Retry(Exception):
    """This attempt failed in a way that may pass.

    Attributes:
        after_s: What the server asks to wait.
        is_lost: The server may have worked on it all the same, and it may have been paid for.
    """

    def __init__(self, why: str, after_s: float | None = None, *, is_lost: bool = False) -> None:
        super().__init__(why)
        self.after_s = after_s
        self.is_lost = is_lost


class HttpEngine:
    """See `llm.base.Engine`. Calls are in flight from `add` on, at most `max_concurrency`.

    Args:
        config: Server, model and limits.
        is_limited: Calls are under a limit, which repeats of lost ones would exceed: such a call
            ends as an error. What the server refuses is repeated all the same: nothing was made.

    Raises:
        EngineError: The environment variable for the key is not set or holds no key, or the
            address is none.
    """

    def __init__(self, config: HttpEngineConfig, *, is_limited: bool = False) -> None:
        self._config = config
        self._is_limited = is_limited
        self._url = chat_url(config.base_url)
        self._server = self._url.raw_authority
        self._key = read_key(config.api_key_env)
        self._options = proxy_for(self._url)
        if self._key is not None:
            # For each call: what a session sends with all, aiohttp tells the proxy too.
            headers = self._options.get("headers", {})
            self._options["headers"] = {**headers, "Authorization": f"Bearer {self._key}"}
        self._num_pending = 0
        self._added: deque[Request] = deque()
        self._calls: set[asyncio.Task[Completion]] = set()
        self._ended: list[Completion | BaseException] = []
        self._done: queue.SimpleQueue[list[Completion | BaseException]] = queue.SimpleQueue()
        self._failures: deque[BaseException] = deque()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._session: aiohttp.ClientSession = self._wait(self._open())
        self._slots = asyncio.Semaphore(config.max_concurrency)

    @property
    def content_id(self) -> str:
        return f"http:{self._config.model}"

    @property
    def exactness(self) -> Exactness:
        return "statistical"

    @property
    def is_model(self) -> bool:
        return True

    @property
    def num_pending(self) -> int:
        return self._num_pending

    def add(self, request: Request) -> None:
        self._num_pending += 1
        self._added.append(request)
        if len(self._added) == 1:  # else the loop has been told, and takes this one along
            self._loop.call_soon_threadsafe(self._start)

    def step(self) -> list[Completion]:
        """Wait for a reply and take along all that are there.

        Raises:
            EngineError: The server refuses us altogether: wrong key, wrong address, wrong model.
        """
        done: list[Completion] = []
        is_waiting = self._num_pending > 0 and not self._failures
        while is_waiting or not self._done.empty():
            for reply in self._done.get():
                if isinstance(reply, BaseException):
                    self._failures.append(reply)
                else:
                    done.append(reply)
            is_waiting = False
        # What was paid for is handed out first; the next step raises.
        if not done and self._failures:
            self._num_pending -= 1
            raise self._failures.popleft()
        self._num_pending -= len(done)
        return done

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        """Not possible over the chat protocol."""
        raise EngineError("an http engine can't score; set reviewer.verdict=generated")

    def close(self) -> None:
        """End open calls, the client and the thread."""
        if not self._thread.is_alive():
            return
        self._wait(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _open(self) -> aiohttp.ClientSession:
        config = self._config
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=config.max_concurrency, keepalive_timeout=_KEPT_OPEN_S, ssl=authorities()
            ),
            # In total, since a server that drips would never be over. Connecting has less, so that
            # a server that can't be reached isn't taken for one that doesn't answer.
            timeout=aiohttp.ClientTimeout(
                total=config.timeout_s, connect=min(_LONGEST_CONNECT_S, config.timeout_s / 2)
            ),
        )

    async def _shut(self) -> None:
        calls = tuple(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self._session.close()

    async def _answer(self, request: Request) -> Completion:
        async with self._slots:
            return await self._with_retries(request)

    def _start(self) -> None:
        while self._added:
            call = self._loop.create_task(self._answer(self._added.popleft()))
            self._calls.add(call)
            call.add_done_callback(self._keep)

    def _keep(self, call: "asyncio.Task[Completion]") -> None:
        self._calls.discard(call)
        if call.cancelled():
            return
        if not self._ended:  # together with those that end in this turn of the loop
            self._loop.call_soon(self._hand_over)
        # Whatever went wrong must reach `step`, or it would wait for ever.
        self._ended.append(call.exception() or call.result())

    def _hand_over(self) -> None:
        self._done.put(self._ended)
        self._ended = []

    async def _with_retries(self, request: Request) -> Completion:
        num_lost = 0
        for attempt in range(self._config.max_retries + 1):
            try:
                return _with_lost(await self._attempt(request), num_lost)
            except _Retry as failure:
                reason = str(failure)
                num_lost += failure.is_lost
                if failure.is_lost and self._is_limited:
                    return _failed(request, f"{reason}; {_NOT_REPEATED}")
                if attempt < self._config.max_retries:
                    await asyncio.sleep(_pause_s(request.seed, attempt, failure.after_s))
        tries = self._config.max_retries + 1
        failed = _failed(request, f"{reason} ({tries} attempts; max_retries allows more)")
        return _with_lost(failed, num_lost)

    async def _attempt(self, request: Request) -> Completion:
        """One call.

        Raises:
            _Retry: It may go better next time.
            EngineError: No call to this server can go well.
        """
        config = self._config
        body = {
            "model": config.model,
            "messages": [{"role": m.role, "content": m.content} for m in request.messages],
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": request.seed % 2**31,
        }
        status = 200  # until it is known
        try:
            async with self._session.post(
                self._url, json=body, allow_redirects=False, **self._options
            ) as reply:
                status = reply.status
                content = await reply.read()
        except _NEVER_SENT as error:
            raise _Retry(self._no_reply(error)) from None
        except TimeoutError:
            why = f"no reply from {self._server} in {config.timeout_s:g} s"
            raise _Retry(why, is_lost=_may_be_made(status)) from None
        except aiohttp.ClientError as error:
            raise _Retry(self._no_reply(error), is_lost=_may_be_made(status)) from None
        return self._read(request, status, reply.headers, content)

    def _no_reply(self, error: Exception) -> str:
        what = self._hidden(str(error)) or type(error).__name__
        return f"no reply from {self._server}: {what}"

    def _read(
        self, request: Request, status: int, headers: Mapping[str, str], content: bytes
    ) -> Completion:
        """What came back; raises as `_attempt`."""
        if status in _REFUSED_FOR_NOW or status >= 500:
            after_s, is_lost = _seconds(headers.get("Retry-After")), _may_be_made(status)
            raise _Retry(f"{self._server} answered {status}", after_s, is_lost=is_lost)
        if status in (401, 403, 404) or 300 <= status < 400:
            raise EngineError(self._refusal(status))
        if status >= 400:
            return _failed(request, f"{self._server} answered {status}: {self._words(content)}")
        return _parse(request, content)

    def _refusal(self, status: int) -> str:
        config = self._config
        if status in (401, 403):
            key = config.api_key_env or "none: set api_key_env"
            return f"{self._server} refuses the key ({status}); environment variable: {key}"
        return (
            f"{self._server} has no chat completions for the model {config.model} ({status}); "
            "check base_url (it usually ends in /v1) and model"
        )

    def _words(self, content: bytes) -> str:
        """What the server says, in short; it may have quoted the key."""
        return self._hidden(" ".join(content.decode(errors="replace").split()))[:200]

    def _hidden(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "[key]")


def _may_be_made(status: int) -> bool:
    """Whether a call that came to nothing with this status may have cost something."""
    return status < 400 or (status >= 500 and status not in _REFUSED_FOR_NOW)


def _pause_s(seed: int, attempt: int, asked_s: float | None) -> float:
    """Exponential back-off with jitter keyed by the request, after what the server asks for."""
    jitter = 0.5 + (seed * 2654435761 + attempt) % 1000 / 1000
    pause: float = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**attempt) * jitter
    return pause + min(max(asked_s or 0.0, 0.0), _LONGEST_ASKED_S)


def _seconds(header: str | None) -> float | None:
    """`Retry-After`, which is a number of seconds or a date; anything else is passed over."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = (date.astimezone(UTC) - datetime.now(UTC)).total_seconds()
    return seconds if math.isfinite(seconds) else None


def _failed(request: Request, why: str) -> Completion:
    return Completion(
        id=request.id,
        text="",
        finish_reason="error",
        prompt_tokens=0,
        completion_tokens=0,
        error=why,
    )


def _with_lost(completion: Completion, num_lost: int) -> Completion:
    """Say of a completion how many tries were lost; of an error, one of them is the call itself."""
    if completion.finish_reason == "error":
        num_lost -= 1
    return completion._replace(lost=num_lost) if num_lost > 0 else completion


def _parse(request: Request, content: bytes) -> Completion:
    try:
        value = json.loads(content)
        choice = value["choices"][0]
        text = choice["message"]["content"]
        usage = value.get("usage") or {}
        if text is None and choice.get("finish_reason"):
            text = ""  # a filter, or a model that only thought: a whole reply, and paid for
        if not isinstance(text, str):
            raise TypeError("content is not text")
        if not text.isascii():  # JSON may hold half a surrogate pair; UTF-8 can't
            text = _LONE_SURROGATE.sub("\ufffd", text)
        return Completion(
            id=request.id,
            text=text,
            finish_reason=_FINISH.get(choice.get("finish_reason"), "stop"),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise _Retry(f"a reply that is no chat completion: {error}", is_lost=True) from None
