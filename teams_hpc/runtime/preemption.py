"""Being asked to stop, and not outliving the parent.

A signal only sets a flag; the work looks at it at safe points, checkpoints, and raises
`StopRequested`.
"""

import ctypes
import os
import signal
from dataclasses import dataclass
from types import FrameType

from teams_hpc.errors import StopRequested

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
PARENT_VARIABLE = "TEAMS_HPC_PARENT_PID"
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class StopFlag:
    """Whether somebody asked this process to stop."""

    reason: str | None = None

    def install(self) -> None:
        """Let the stop signals set this flag (main thread only)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    @property
    def is_set(self) -> bool:
        return self.reason is not None

    def raise_if_set(self, progress: str) -> None:
        """Stop here, at a safe point; `progress` says how far the work is.

        Raises:
            StopRequested: The flag is set.
        """
        if self.reason is not None:
            raise StopRequested(f"stopped on {self.reason} after {progress}; run again to go on")


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it dies (Linux).

    Does nothing unless the parent put its process id into `TEAMS_HPC_PARENT_PID`.
    """
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(1)
