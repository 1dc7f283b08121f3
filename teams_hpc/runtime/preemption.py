"""Being asked to stop, and not outliving the parent.

A signal only sets a flag, and so does a time limit that comes near; the work looks at the flag at
safe points, checkpoints, and raises `StopRequested`.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType

from teams_hpc.errors import StopRequested

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
PARENT_VARIABLE = "TEAMS_HPC_PARENT_PID"
DEADLINE_VARIABLE = "TEAMS_HPC_DEADLINE"
WARNING_VARIABLE = "TEAMS_HPC_WARNING_S"
_PR_SET_PDEATHSIG = 1
_ASK_EVERY_S = 0.3


def hold_stop_signals() -> None:
    """Keep stop signals waiting until `StopFlag.install`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


@dataclass(slots=True)
class StopFlag:
    """Whether somebody asked this process to stop, or its time is nearly over.

    Args:
        deadline: Unix time when this process will be ended; None: not known.
        warning_s: The flag is set by itself so long before that.
        others: Asked now and then: whether a process that works with this one stops.
    """

    reason: str | None = None
    deadline: float | None = None
    warning_s: float = 0.0
    others: Callable[[], bool] | None = None
    _asked: float = float("-inf")

    @classmethod
    def before_limit(cls, environment: Mapping[str, str] = os.environ) -> "StopFlag":
        """One that knows the deadline which the batch script has read, if it has."""
        deadline = environment.get(DEADLINE_VARIABLE)
        return cls(
            deadline=float(deadline) if deadline else None,
            warning_s=float(environment.get(WARNING_VARIABLE, 0)),
        )

    def need_before_limit(self, seconds: float) -> None:
        """Stop at least so long before the deadline: what has to be done then takes that."""
        self.warning_s = max(self.warning_s, seconds)

    def install(self) -> None:
        """Let the stop signals set this flag, those too that were kept waiting (main thread)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    @property
    def is_set(self) -> bool:
        if self.reason is None and self._is_late:
            self.reason = "the time limit"
        now = time.monotonic()
        if self.reason is None and self.others is not None and now - self._asked > _ASK_EVERY_S:
            self._asked = now
            if self.others():
                self.reason = "the wish of another process"
        return self.reason is not None

    @property
    def _is_late(self) -> bool:
        return self.deadline is not None and time.time() >= self.deadline - self.warning_s

    def raise_if_set(self, progress: str) -> None:
        """Stop here, at a safe point; `progress` says how far the work is.

        Raises:
            StopRequested: The flag is set.
        """
        if self.is_set:
            raise StopRequested(f"stopped on {self.reason} after {progress}; run again to go on")


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies (Linux).

    Does nothing unless the parent put its process id into `TEAMS_HPC_PARENT_PID`.
    """
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None:
        return
    _end_with_parent()
    if os.getppid() != int(parent):
        os._exit(1)


def die_with_launcher() -> None:
    """Have the kernel kill this process when the MPI launcher on its node dies.

    Launchers give each rank a process group of its own, so nothing else would.
    """
    _end_with_parent()
    if os.getppid() == 1:
        os._exit(1)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
