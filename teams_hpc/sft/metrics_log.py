"""The numbers of each step: `metrics.jsonl`, and event files where TensorBoard is installed."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teams_hpc.runtime.metrics import append_metrics, read_metrics
from teams_hpc.storage.atomic import replacing


class MetricsLog:
    """Where the first process writes; in the others nothing happens.

    Args:
        folder: Of the stage; holds `metrics.jsonl` and `tensorboard/`.
        step: Steps done so far: what was written of later ones will be written again, and goes.
        enabled: This is the first process.
    """

    def __init__(self, folder: Path, step: int, *, enabled: bool) -> None:
        self._path = folder / "metrics.jsonl"
        self._enabled = enabled
        self._events: Any = None
        if not enabled:
            return
        self._forget_after(step)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # fails without that package

            # Readers drop what earlier files say of this step and later ones.
            first = step + 1 if step else 0
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line; it has a `step`."""
        if not self._enabled:
            return
        append_metrics(self._path, line)
        if self._events is not None:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, line["step"])
            self._events.flush()

    def close(self) -> None:
        """Nothing more will come."""
        if self._events is not None:
            self._events.close()

    def _forget_after(self, step: int) -> None:
        """Drop lines beyond the checkpoint, and a last one that is torn."""
        if not self._path.exists():
            return
        kept = [line for line in read_metrics(self._path) if line["step"] <= step] if step else []
        with replacing(self._path) as temporary:
            temporary.touch()
            for line in kept:
                append_metrics(temporary, line)
