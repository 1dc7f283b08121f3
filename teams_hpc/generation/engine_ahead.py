"""An engine that goes on stepping while its caller makes the last results durable.

The caller journals a batch, has it judged and announces what follows, all before that is sent; an
engine with enough other requests need not stand still meanwhile. What it returns early is looked at
by nobody until the caller asks for it, so results become durable in the order they are acted on.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from teams_hpc.llm.base import Completion, Engine, Exactness, Request, Score, ScoreRequest

_MOST_UNREAD = 2
"""Steps whose results nobody has taken yet: a kill loses them."""


@dataclass(slots=True, eq=False)
class EngineAhead:
    """An engine whose steps run in a thread, and there alone.

    A step begins early only if the requests that are there by then fill it: what the caller is
    about to add would have had to wait anyway.

    Args:
        engine: The engine; nobody else may use it.
        slots: Requests that it works on together.
    """

    engine: Engine
    slots: int
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _added: list[Request] = field(default_factory=list)
    _done: "deque[list[Completion] | BaseException]" = field(default_factory=deque)
    _num_unread: int = 0
    _num_open: int = 0
    _is_running: bool = False
    _is_closed: bool = False
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))

    @property
    def content_id(self) -> str:
        return self.engine.content_id

    @property
    def exactness(self) -> Exactness:
        return self.engine.exactness

    @property
    def is_model(self) -> bool:
        return self.engine.is_model

    @property
    def num_pending(self) -> int:
        with self._changed:
            return self._num_open + self._num_unread

    def add(self, request: Request) -> None:
        """Queue a request; a step that has begun goes on without it."""
        with self._changed:
            self._added.append(request)
            self._num_open += 1

    def step(self) -> list[Completion]:
        with self._changed:
            if not self._done:
                self._run()
            self._changed.wait_for(lambda: self._done)
            reply = self._done.popleft()
            if isinstance(reply, BaseException):
                raise reply
            self._num_unread -= len(reply)
            if self._goes_on():
                self._run()
            return reply

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return self._thread.submit(self.engine.score, requests).result()

    def close(self) -> None:
        """Wait for the step that has begun, and close the engine."""
        with self._changed:
            self._is_closed = True
        self._thread.shutdown()
        self.engine.close()

    def _run(self) -> None:
        if not self._is_running:
            self._is_running = True
            self._thread.submit(self._step_on)

    def _goes_on(self) -> bool:
        """Whether a step may begin that nobody waits for."""
        is_full = self._num_open >= self.slots
        return is_full and len(self._done) < _MOST_UNREAD and not self._is_closed

    def _step_on(self) -> None:
        """In the thread: without a pause between steps, which on a busy machine would be long."""
        goes_on = True
        while goes_on:
            reply = self._step()
            with self._changed:
                self._done.append(reply)
                if not isinstance(reply, BaseException):
                    self._num_open -= len(reply)
                    self._num_unread += len(reply)
                goes_on = not isinstance(reply, BaseException) and self._goes_on()
                self._is_running = goes_on
                self._changed.notify()

    def _step(self) -> "list[Completion] | BaseException":
        with self._changed:
            added, self._added = self._added, []
        try:
            for request in added:
                self.engine.add(request)
            return self.engine.step()
        except BaseException as error:  # noqa: BLE001 (the caller's to handle)
            return error
