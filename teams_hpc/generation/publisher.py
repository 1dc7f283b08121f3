"""One unit is published while the next one runs: no engine waits for compression and disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field


@dataclass(slots=True)
class Publisher:
    """Publishes in a thread, one unit at a time; what fails there is raised by the next `wait`."""

    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(max_workers=1))
    _begun: Future[None] | None = None

    def begin(self, publish: Callable[[], None]) -> None:
        """Publish a unit; `wait` was called for the one before."""
        assert self._begun is None
        self._begun = self._thread.submit(publish)

    def wait(self) -> bool:
        """Wait for the unit that was begun; False if there was none.

        Raises:
            WorkError: It could not be published.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return False
        begun.result()
        return True

    def close(self) -> None:
        """Wait for the last unit, and end the thread.

        Raises:
            As `wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
