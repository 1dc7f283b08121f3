"""The processes of one job step, as far as they share work: numbers handed out once, and notes.

Only generation uses this, and only here is mpi4py imported. Memory for the numbers lies with rank
0; the others reach it by one-sided operations, so no rank is a mere dispatcher.
"""

import logging
import os
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from teams_hpc.errors import StopRequested, UsageError
from teams_hpc.runtime.ranks import Ranks

_LAUNCHED_BY_MPI = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE")
_PROGRESS_S = 0.01
NUM_NOTES = 1024
_log = logging.getLogger(__name__)


class Step(Protocol):
    """What the processes of a step share.

    Attributes:
        name: The same for all of them, and for nobody else ever.
        rank: Place of this process among them.
        size: Their number.
    """

    name: str
    rank: int
    size: int

    def take_number(self) -> int:
        """0, 1, 2, ...: each to one process only."""

    def write_note(self, number: int, value: int) -> None:
        """Leave a value for the others; notes are kept under their number modulo `NUM_NOTES`."""

    def read_note(self, number: int) -> int:
        """The value left last under this number or one that shares its place; 0 at first."""

    def show(self, value: int) -> None:
        """Let the others see what this process is at."""

    def shown(self) -> list[int]:
        """What each process is at, by rank; 0 at first."""

    def ask_to_stop(self) -> None:
        """Tell the others that this process was asked to stop."""

    def is_asked_to_stop(self) -> bool:
        """Whether any of them was."""


class SoloStep:
    """A step of one process."""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        self.rank, self.size = 0, 1
        self._next = 0
        self._notes: dict[int, int] = {}
        self._shown = 0
        self._stops = False

    def take_number(self) -> int:
        self._next += 1
        return self._next - 1

    def write_note(self, number: int, value: int) -> None:
        self._notes[number % NUM_NOTES] = value

    def read_note(self, number: int) -> int:
        return self._notes.get(number % NUM_NOTES, 0)

    def show(self, value: int) -> None:
        self._shown = value

    def shown(self) -> list[int]:
        return [self._shown]

    def ask_to_stop(self) -> None:
        self._stops = True

    def is_asked_to_stop(self) -> bool:
        return self._stops


class MpiStep:
    """Processes that MPI has joined; what they share is an RMA window in rank 0's memory.

    Its words: the counter, the wish to stop, what each rank shows, the notes.
    """

    _COUNTER, _STOP, _FIRST_SHOWN = 0, 1, 2

    def __init__(self, mpi: Any) -> None:
        import numpy as np

        self._mpi, self._np = mpi, np
        self._comm = mpi.COMM_WORLD.Dup()
        self.rank: int = self._comm.rank
        self.size: int = self._comm.size
        self._first_note = self._FIRST_SHOWN + self.size
        num_words = self._first_note + NUM_NOTES if self.rank == 0 else 0
        self._window = mpi.Win.Allocate(8 * num_words, 8, comm=self._comm)
        if num_words:
            np.frombuffer(self._window.tomemory(), dtype=np.int64)[:] = 0
        name = np.frombuffer(uuid.uuid4().bytes, dtype=np.int64).copy()
        self._comm.Bcast(name)  # that of rank 0
        self.name = name.tobytes().hex()
        self._comm.Barrier()
        self._ended = threading.Event()
        # A network without remote memory access serves others only while rank 0 is inside MPI.
        self._server = threading.Thread(target=self._serve, daemon=True)
        self._server.start()

    def take_number(self) -> int:
        return self._update(self._COUNTER, 1, self._mpi.SUM)

    def write_note(self, number: int, value: int) -> None:
        self._update(self._first_note + number % NUM_NOTES, value, self._mpi.REPLACE)

    def read_note(self, number: int) -> int:
        return self._update(self._first_note + number % NUM_NOTES, 0, self._mpi.NO_OP)

    def show(self, value: int) -> None:
        self._update(self._FIRST_SHOWN + self.rank, value, self._mpi.REPLACE)

    def shown(self) -> list[int]:
        places = range(self._FIRST_SHOWN, self._first_note)
        return [self._update(place, 0, self._mpi.NO_OP) for place in places]

    def ask_to_stop(self) -> None:
        self._update(self._STOP, 1, self._mpi.REPLACE)

    def is_asked_to_stop(self) -> bool:
        return self._update(self._STOP, 0, self._mpi.NO_OP) != 0

    def _update(self, place: int, value: int, operation: Any) -> int:
        """One atomic operation on a word of the window; returns what was there before."""
        new = self._np.array([value], dtype=self._np.int64)
        old = self._np.zeros(1, dtype=self._np.int64)
        self._window.Lock(0, self._mpi.LOCK_SHARED)
        self._window.Fetch_and_op(new, old, 0, place, operation)
        self._window.Unlock(0)
        return int(old[0])

    def _serve(self) -> None:
        while not self._ended.wait(_PROGRESS_S):
            self._comm.Iprobe()

    def close(self) -> None:
        """Part from the others; waits for all of them."""
        self._comm.Barrier()
        self._ended.set()
        self._server.join()
        self._window.Free()
        self._comm.Free()


def is_launched_by_mpi(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether an MPI launcher, or srun with a PMI, started this process."""
    return any(name in environment for name in _LAUNCHED_BY_MPI)


@contextmanager
def joined_step(ranks: Ranks, *, needs_mpi: bool) -> Iterator[Step]:
    """Meet the other processes of this step; part in order at the end, and when all stop.

    Args:
        ranks: What the launcher says.
        needs_mpi: The launcher was told to join the processes, so being alone is an error.

    Raises:
        UsageError: MPI found another number of processes than the launcher started.
    """
    if ranks.world_size == 1 or not (needs_mpi or is_launched_by_mpi()):
        yield SoloStep()
        return
    mpi = _initialised_mpi()
    found = mpi.COMM_WORLD.size
    if found != ranks.world_size:
        raise UsageError(
            f"MPI joined {found} of the {ranks.world_size} processes of this step: the launcher "
            "and this MPI don't speak the same PMI; see `srun --mpi=list`, set site.slurm.mpi, and "
            "let `teams-hpc doctor` try it (in a container: never --cleanenv or --containall)"
        )
    try:
        step = MpiStep(mpi)
    except mpi.Exception as error:
        raise UsageError(
            f"this MPI can't share memory between the processes of this step ({error}). Between "
            "nodes Open MPI 4 needs UCX for that: set OMPI_MCA_osc=ucx, OMPI_MCA_pml_ucx_tls=any "
            "and OMPI_MCA_pml_ucx_devices=any in site.slurm.environment, or unset site.slurm.mpi"
        ) from error
    _log.info("MPI joined %d processes", step.size)
    try:
        yield step
    except StopRequested:
        step.ask_to_stop()
        step.close()
        mpi.Finalize()
        raise
    step.close()
    mpi.Finalize()


def _initialised_mpi() -> Any:
    try:
        import mpi4py
    except ImportError:
        raise UsageError(
            "the processes of this step are joined by MPI, which needs the package mpi4py: install "
            "the extra 'mpi', or let them share work by claims alone (srun --mpi=none)"
        ) from None
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    if MPI.Init_thread(MPI.THREAD_MULTIPLE) != MPI.THREAD_MULTIPLE:
        raise UsageError(
            "this MPI has no MPI_THREAD_MULTIPLE, which the processes of this step need; use "
            "another, or let them share work by claims alone (srun --mpi=none)"
        )
    return MPI


def abort_step(code: int) -> None:
    """End the other processes of this step too, if MPI has joined them and they haven't parted."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        _log.error("ending all %d processes of this step", mpi.COMM_WORLD.size)
        mpi.COMM_WORLD.Abort(code)
