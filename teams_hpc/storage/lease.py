"""Exclusive claims that end when their holder does.

A claim is a small file, taken by an exclusive `link`. It is stale if its holder ran on this host
and is gone, or was an earlier start of the same Slurm job, or if its heartbeat has not moved for
`lease_s` on the observer's own monotonic clock. Clocks of two machines are never compared. A claim
saves work; correctness never hangs on it. Nor is it made durable: a machine that loses it has lost
its holder too, and one that comes back torn is a stranger's, without a heartbeat.
"""

import json
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from teams_hpc.errors import RunInUseError

_PATIENCE_S = 10.0


def _process_start(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot; None if gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a claim."""

    host: str
    boot_id: str
    pid: int
    process_start: str
    token: str
    job: str = ""
    job_start: str = ""

    @classmethod
    def me(cls, token: str = "") -> "Holder":
        """This process, with a token of its own if none is given."""
        return cls(
            host=socket.gethostname(),
            boot_id=_boot_id(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()) or "",
            token=token or uuid.uuid4().hex,
            job=os.environ.get("SLURM_JOB_ID", ""),
            job_start=os.environ.get("SLURM_RESTART_COUNT", "0"),
        )

    def is_an_earlier_start_of(self, other: "Holder") -> bool:
        """Whether it belongs to an earlier start of the other's Slurm job, which has ended."""
        same = self.job != "" and self.job == other.job
        return same and int(self.job_start) < int(other.job_start)

    def is_on_this_host(self) -> bool:
        return self.host == socket.gethostname() and self.boot_id == _boot_id()

    def is_alive_here(self) -> bool:
        return _process_start(self.pid) == self.process_start


def read_holder(path: Path) -> tuple[Holder, int] | None:
    """Holder and heartbeat of the claim at `path`; None if nobody holds it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return Holder(**value["holder"]), int(value["beat"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        unknown = Holder(host="?", boot_id="?", pid=0, process_start="?", token="?")
        return unknown, -1


@dataclass(slots=True)
class Lease:
    """One claim; use it as `if lease.acquire(): ... lease.release()` or in a `with`.

    Args:
        path: The claim's file.
        lease_s: A heartbeat that stood still for so long (observer's clock) ends the claim.
    """

    path: Path
    lease_s: float = 60.0
    _holder: Holder | None = None
    _beat: int = 0
    _seen: tuple[str, int, float] | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def acquire(self, token: str = "") -> bool:
        """Take the claim if it is free or stale; never waits.

        Args:
            token: What tells this claim from all others, where others have to know it too; it must
                never have been used before.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = read_holder(self.path)
        if found is not None:
            if not self._is_stale(*found):
                return False
            self._remove(found[0])
        holder = Holder.me(token)
        temporary = self._temporary(holder)
        try:
            temporary.write_text(self._content(holder), encoding="utf-8")
            os.link(temporary, self.path)
        except (FileExistsError, FileNotFoundError):
            # Taken; or who ends the stage cleared away what looked like a dead process's leftover.
            found = read_holder(self.path)
            if found is None or found[0] != holder:  # NFS may refuse a link that it has just made
                return False
        finally:
            temporary.unlink(missing_ok=True)
        self._holder = holder
        self._stop.clear()
        self._thread = threading.Thread(target=self._heartbeat, daemon=True)
        self._thread.start()
        return True

    def acquire_within(self, seconds: float) -> bool:
        """Try until the claim is ours or `seconds` have passed."""
        deadline = time.monotonic() + seconds
        while not self.acquire():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def outlast(self) -> bool:
        """Take the claim; waits as long as a holder that is gone may need to seem so."""
        found = read_holder(self.path)
        is_here = found is None or found[0].is_on_this_host()
        return self.acquire_within(_PATIENCE_S if is_here else self.lease_s + _PATIENCE_S)

    def is_held(self) -> bool:
        """Whether the claim is still ours; a holder asks before it publishes."""
        found = read_holder(self.path)
        return found is not None and self._holder is not None and found[0] == self._holder

    def refuse_if_lost(self, what: str) -> None:
        """Asked before something lasting is written.

        Raises:
            RunInUseError: Somebody who thought this holder gone works on `what` now.
        """
        if not self.is_held():
            raise RunInUseError(f"{what} was taken over by another process; this one ends")

    def release(self) -> None:
        """Give the claim back, if it is still ours."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.is_held():
            self.path.unlink(missing_ok=True)
        self._holder = None

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _temporary(self, holder: Holder) -> Path:
        return self.path.with_name(f".{self.path.name}.{holder.token}.tmp")

    def _content(self, holder: Holder) -> str:
        values = {name: getattr(holder, name) for name in Holder.__slots__}
        return json.dumps({"holder": values, "beat": self._beat}, indent=1) + "\n"

    def _is_stale(self, holder: Holder, beat: int) -> bool:
        if holder.is_an_earlier_start_of(Holder.me()):
            return True
        if holder.is_on_this_host() and not holder.is_alive_here():
            return True
        now = time.monotonic()
        if self._seen is None or self._seen[:2] != (holder.token, beat):
            self._seen = (holder.token, beat, now)
            return False
        return now - self._seen[2] > self.lease_s

    def _remove(self, holder: Holder) -> None:
        """Remove a stale claim by renaming it: of two who try, one gets it."""
        grave = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.tmp")
        try:
            self.path.rename(grave)
        except FileNotFoundError:
            return
        found = read_holder(grave)
        if found is not None and found[0] != holder:  # somebody took it in between: give it back
            try:
                os.link(grave, self.path)
            except FileExistsError:
                pass
        grave.unlink(missing_ok=True)

    def _heartbeat(self) -> None:
        while not self._stop.wait(self.lease_s / 4):
            try:
                if self._holder is None or not self.is_held():
                    return
                self._beat += 1
                temporary = self._temporary(self._holder)
                temporary.write_text(self._content(self._holder), encoding="utf-8")
                temporary.replace(self.path)
            except OSError:  # a full disk, a server away for a while: the next beat may pass
                continue
