"""Numbers a running task leaves behind: how far it is, and metrics by step.

Both are files, so that a person, `status` and the process that started the task read the same
thing on a laptop and on a cluster.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Progress:
    """How far a task is, in `metrics/<task>.progress.json`; written at most twice a second.

    The rate is that of what this process has seen done since it began to measure. One that has
    measured nothing leaves the rate as it finds it: that of others, or of an earlier start.

    Args:
        path: The file; its folder must exist.
        unit: What is counted: rows, iterations, steps.
        enabled: False off rank 0: then nothing is written.
    """

    path: Path
    unit: str
    enabled: bool = True
    _start: float = field(default_factory=time.monotonic)
    _start_done: float | None = None
    _written: float = float("-inf")

    @property
    def has_begun(self) -> bool:
        return self._start_done is not None

    def begin(self, done: float) -> None:
        """Measure from now on, where `done` units are done; else the first update begins."""
        self._start, self._start_done = time.monotonic(), done

    def update(self, done: float, total: float, message: str = "") -> None:
        """Say that `done` of `total` units are done; `message` is shown beside the bar."""
        now = time.monotonic()
        if self._start_done is None:
            self.begin(done)
        if not self.enabled or (now - self._written < 0.5 and done < total):
            return
        self._written = now
        value = {
            "done": done,
            "total": total,
            "unit": self.unit,
            "rate_per_s": self._rate(done, now),
            "message": message,
            "pid": os.getpid(),
            "updated": time.time(),
        }
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(value), encoding="utf-8")
        temporary.replace(self.path)

    def _rate(self, done: float, now: float) -> float:
        assert self._start_done is not None
        if done > self._start_done:
            return (done - self._start_done) / max(now - self._start, 1e-9)
        if not self.path.exists():
            return 0.0
        return float(json.loads(self.path.read_text(encoding="utf-8"))["rate_per_s"])


def append_metrics(path: Path, values: Mapping[str, Any]) -> None:
    """Append one JSON line; a torn last line, left by a kill, is cut off first."""
    with path.open("a+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(max(0, size - (1 << 20)))
            tail = stream.read()
            if not tail.endswith(b"\n"):
                stream.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        stream.write(json.dumps(dict(values)).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines `append_metrics` wrote; a torn last line is passed over."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield json.loads(line)
