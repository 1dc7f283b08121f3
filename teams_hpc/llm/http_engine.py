"""Any server that speaks the OpenAI chat protocol: a hosted expert, or one on another node.

Requests run in an event loop on a thread of their own, so that a caller sees an ordinary engine.
The key is read from the environment and appears in no message.
"""

import asyncio
import os
import queue
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

import httpx

from teams_hpc.config.schema import HttpEngineConfig
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import Completion, Exactness, FinishReason, Request, Score, ScoreRequest

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
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
        EngineError: The environment variable for the key is not set.
    """

    def __init__(self, config: HttpEngineConfig) -> None:
        self._config = config
        headers = {}
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env)
            if not key:
                raise EngineError(
                    f"the environment variable {config.api_key_env} is not set; export the key"
                )
            headers["Authorization"] = f"Bearer {key}"
        self._headers = headers
        self._num_pending = 0
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
        asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)

    def step(self) -> list[Completion]:
        """Wait for one reply and take along those that are there.

        Raises:
            EngineError: The server refuses us altogether: wrong key, wrong address, wrong model.
        """
        done: list[Completion] = []
        while self._num_pending and (not done or not self._done.empty()):
            reply = self._done.get()
            self._num_pending -= 1
            if isinstance(reply, BaseException):
                raise reply
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
        return httpx.AsyncClient(
            headers=self._headers, timeout=self._config.timeout_s, limits=limits
        )

    async def _shut(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    async def _answer(self, request: Request) -> None:
        try:
            async with self._slots:
                self._done.put(await self._with_retries(request))
        except (EngineError, ValueError, KeyError) as error:
            self._done.put(error)

    async def _with_retries(self, request: Request) -> Completion:
        for attempt in range(self._config.max_retries + 1):
            try:
                return await self._attempt(request)
            except _Retry as failure:
                reason = str(failure)
                if attempt < self._config.max_retries:
                    await asyncio.sleep(_pause_s(request.seed, attempt, failure.after_s))
        tries = self._config.max_retries + 1
        return _failed(request, f"{reason} ({tries} attempts; expert.max_retries allows more)")

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
            reply = await self._client.post(url, json=body)
        except httpx.TransportError as error:
            what = str(error) or type(error).__name__
            raise _Retry(f"no reply from {config.base_url}: {what}") from None
        if reply.status_code == 429 or reply.status_code >= 500:
            raise _Retry(
                f"{config.base_url} answered {reply.status_code}",
                _seconds(reply.headers.get("Retry-After")),
            )
        if reply.status_code in (401, 403, 404):
            raise EngineError(self._refusal(reply.status_code))
        if reply.status_code >= 400:
            return _failed(request, f"{config.base_url} answered {reply.status_code}")
        return _parse(request, reply)

    def _refusal(self, status: int) -> str:
        config = self._config
        if status == 404:
            return (
                f"{config.base_url} has no chat completions for the model {config.model} (404); "
                "check base_url (it usually ends in /v1) and model"
            )
        key = config.api_key_env or "none: set api_key_env"
        return f"{config.base_url} refuses the key ({status}); environment variable: {key}"


def _pause_s(seed: int, attempt: int, asked_s: float | None) -> float:
    """Exponential back-off with jitter keyed by the request; what the server asks for, at least."""
    jitter = 0.5 + (seed * 2654435761 + attempt) % 1000 / 1000
    pause: float = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**attempt) * jitter
    return max(pause, min(asked_s or 0.0, _LONGEST_PAUSE_S))


def _seconds(header: str | None) -> float | None:
    """`Retry-After` in seconds; a date is not understood and passed over."""
    try:
        return float(header) if header is not None else None
    except ValueError:
        return None


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
        if not isinstance(text, str):
            raise TypeError("content is not text")
        return Completion(
            id=request.id,
            text=text,
            finish_reason=_FINISH.get(choice.get("finish_reason"), "stop"),
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            completion_tokens=int(usage.get("completion_tokens", 0)),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Retry(f"a reply that is no chat completion: {error}") from None
