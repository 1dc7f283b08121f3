"""What a member needs to go on: one safetensors file, replaced whole after every iteration."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch as th
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from teams_hpc.errors import CorruptFileError
from teams_hpc.llm.ledger import Ledger
from teams_hpc.storage.atomic import naming_disk_faults, replacing

CHECKPOINT_SCHEMA = 1
_REMEDY = "run again with --rerun-from policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A member after `iteration` iterations.

    Attributes:
        iteration: Iterations done; 0 before the first.
        tensors: Parameters and optimiser state.
        usage: Calls made so far, those in doubt included.
        sanity_accuracy: The reviewer's, measured before the first iteration.
    """

    iteration: int
    tensors: dict[str, th.Tensor]
    usage: Ledger
    sanity_accuracy: float

    def save(self, path: Path) -> None:
        """Replace the checkpoint at `path`, durably."""
        state = {
            "schema": CHECKPOINT_SCHEMA,
            "iteration": self.iteration,
            "usage": self.usage.to_json(),
            "sanity_accuracy": self.sanity_accuracy,
        }
        with naming_disk_faults(path), replacing(path) as temporary:
            temporary.write_bytes(save(self.tensors, metadata={"state": json.dumps(state)}))

    @classmethod
    def load(cls, path: Path) -> "Checkpoint | None":
        """Read what `save` wrote; None if there is none.

        Raises:
            CorruptFileError: The file is damaged or of another schema.
        """
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as stream:
                state = json.loads((stream.metadata() or {})["state"])
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError) as error:
            raise CorruptFileError(f"{path} is not a checkpoint: {error}; {_REMEDY}") from None
        if state["schema"] != CHECKPOINT_SCHEMA:
            raise CorruptFileError(
                f"{path} is a checkpoint of schema {state['schema']}, not {CHECKPOINT_SCHEMA}; "
                f"{_REMEDY}"
            )
        return cls(
            iteration=state["iteration"],
            tensors=tensors,
            usage=Ledger.from_json(state["usage"]),
            sanity_accuracy=state["sanity_accuracy"],
        )
