"""Any server that speaks the OpenAI chat protocol: a hosted expert, or one on another node.

Requests run in an event loop on a thread of their own, so that a caller sees an ordinary engine.
The key is read from the environment and appears in no message.
"""

import asyncio
import email.utils
import math
import os
import queue
import threading
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx

from teams_hpc.config.schema import HttpEngineConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Completion, Exactness, FinishReason, Request, Score, ScoreRequest

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
_LONGEST_ASKED_S = 600.0
_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class _Retry(Exception):
    """This attempt failed in a way that may pass."""

    def __init__(self, why: str, after_s: float | None = None) -> None:
        super().__init__(why)
        self.after_s = after_s


class HttpEngine:
    """See `llm.base.Engine`. Calls are in flight from `add` on, at most `max_concurrency`.

    Args:
        config: Server, model and limits.

    Raises:
        EngineError: The environment variable for the key is not set or holds no key, or the
            address is none.
    """

    def __init__(self, config: HttpEngineConfig) -> None:
        self._config = config
        self._server = _server_name(config.base_url)
        self._key = _read_key(config.api_key_env)
        self._num_pending = 0
        self._calls: set[asyncio.Task[Completion]] = set()
        self._done: queue.SimpleQueue[Completion | BaseException] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client: httpx.AsyncClient = self._wait(self._open())
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
        self._loop.call_soon_threadsafe(self._start, request)

    def step(self) -> list[Completion]:
        """Wait for one reply and take along those that are there.

        Raises:
            EngineError: The server refuses us altogether: wrong key, wrong address, wrong model.
        """
        done: list[Completion] = []
        while self._num_pending and (not done or not self._done.empty()):
            reply = self._done.get()
            if isinstance(reply, BaseException):
                if not done:
                    self._num_pending -= 1
                    raise reply
                # What was paid for is handed out first; the next step raises.
                self._done.put(reply)
                break
            self._num_pending -= 1
            done.append(reply)
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

    async def _open(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self._config.max_concurrency)
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        return httpx.AsyncClient(headers=headers, timeout=self._config.timeout_s, limits=limits)

    async def _shut(self) -> None:
        # Our calls alone: the tasks that httpx starts inside them end with them.
        calls = tuple(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await self._client.aclose()

    async def _answer(self, request: Request) -> Completion:
        async with self._slots:
            return await self._with_retries(request)

    def _start(self, request: Request) -> None:
        call = self._loop.create_task(self._answer(request))
        self._calls.add(call)
        call.add_done_callback(self._keep)

    def _keep(self, call: "asyncio.Task[Completion]") -> None:
        self._calls.discard(call)
        # Whatever went wrong must reach `step`, or it would wait for ever.
        if not call.cancelled():
            self._done.put(call.exception() or call.result())

    async def _with_retries(self, request: Request) -> Completion:
        for attempt in range(self._config.max_retries + 1):
            try:
                return await self._attempt(request)
            except _Retry as failure:
                reason = str(failure)
                if attempt < self._config.max_retries:
                    await asyncio.sleep(_pause_s(request.seed, attempt, failure.after_s))
        tries = self._config.max_retries + 1
        return _failed(request, f"{reason} ({tries} attempts; max_retries allows more)")

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
        url = f"{config.base_url.rstrip('/')}/chat/completions"
        try:
            # httpx limits each read; a server that drips would never be over.
            async with asyncio.timeout(config.timeout_s):
                reply = await self._client.post(url, json=body)
        except TimeoutError:
            raise _Retry(f"no reply from {self._server} in {config.timeout_s:g} s") from None
        except httpx.HTTPError as error:
            what = str(error) or type(error).__name__
            raise _Retry(f"no reply from {self._server}: {what}") from None
        status = reply.status_code
        if status in (408, 429) or status >= 500:
            raise _Retry(
                f"{self._server} answered {status}", _seconds(reply.headers.get("Retry-After"))
            )
        if status in (401, 403, 404) or reply.is_redirect:
            raise EngineError(self._refusal(status))
        if status >= 400:
            return _failed(request, f"{self._server} answered {status}: {self._words(reply)}")
        return _parse(request, reply)

    def _refusal(self, status: int) -> str:
        config = self._config
        if status in (401, 403):
            key = config.api_key_env or "none: set api_key_env"
            return f"{self._server} refuses the key ({status}); environment variable: {key}"
        return (
            f"{self._server} has no chat completions for the model {config.model} ({status}); "
            "check base_url (it usually ends in /v1) and model"
        )

    def _words(self, reply: httpx.Response) -> str:
        """What the server says, in short; it may have quoted the key."""
        text = " ".join(reply.text.split())
        return (text if self._key is None else text.replace(self._key, "[key]"))[:200]


def _server_name(base_url: str) -> str:
    """Host and port, for messages."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise EngineError(f"base_url {base_url} is no address: {error}") from None
    if not url.host or (url.port or 0) > 65535:
        raise EngineError(f"base_url {base_url} is no address; for instance http://node7:8000/v1")
    return url.netloc.decode()


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise EngineError(f"the environment variable {variable} is not set; export the key")
    if not (key.isascii() and key.isprintable()):
        # Checked here, since httpx quotes a header that it refuses.
        raise EngineError(
            f"the environment variable {variable} holds characters that no key has (a line break, "
            "or letters beyond ASCII); export the key alone"
        )
    return key


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


def _parse(request: Request, reply: httpx.Response) -> Completion:
    try:
        value = reply.json()
        choice = value["choices"][0]
        text = choice["message"]["content"]
        usage = value.get("usage") or {}
        if text is None and choice.get("finish_reason"):
            text = ""  # a filter, or a model that only thought: a whole reply, and paid for
        if not isinstance(text, str):
            raise TypeError("content is not text")
        return Completion(
            id=request.id,
            text=text,
            finish_reason=_FINISH.get(choice.get("finish_reason"), "stop"),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Retry(f"a reply that is no chat completion: {error}") from None
