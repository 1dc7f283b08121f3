"""Where an instruction lies among others, in the hidden states of a model.

A model's mean-pooled hidden states have hundreds of numbers, and all texts share most of their
size. So they are taken relative to the mean of some fixed texts, projected at random but always
alike, scaled by how far those texts lie apart, and rounded to a coarse grid.

Each text has a pass of its own, so that no batch can change it. Another number of threads or
another machine may still change the last bits of a hidden state; the grid takes those away, but
where a number lies within them of a rounding boundary (with single precision once in some 10,000
numbers).
"""

import hashlib
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from teams_hpc.errors import EngineError
from teams_hpc.llm.base import EmbeddingEngine

EMBEDDING_SCHEMA = 1
"""Stored with a policy: raise it when any embedding changes."""

_REFERENCE = (
    "Explain how a lock on a canal lifts a boat.",
    "Write a short letter to a neighbour about a lost cat.",
    "List six vegetables that grow well in the shade.",
    "Translate the following sentence into French.",
    "What is the difference between weather and climate?",
    "Write a Python function that counts the vowels of a text.",
    "A train travels 180 km in 2 hours and 15 minutes. What is its average speed?",
    "Summarise the following paragraph in one sentence.",
    "Which of these animals are mammals, and how can you tell?",
    "Suggest a name and a slogan for a small bakery by the sea.",
    "Classify each of the reviews below as positive or negative.",
    "Compare renting a flat with buying one for a young family.",
)
_GRID = 64
_SPREAD = 0.5
"""Root mean square of what the fixed texts come to."""

_REMEMBERED = 4096


class InstructionEmbedding:
    """Embeddings by one model, (size,), each number a multiple of 1/64 between -1 and 1.

    Args:
        engine: Whose hidden states; belongs to whoever loaded it.
        size: How many numbers to project to.

    Raises:
        EngineError: The model's hidden states don't tell texts apart.
    """

    def __init__(self, engine: EmbeddingEngine, size: int) -> None:
        self.size = size
        self.content_id = engine.content_id
        self._engine = engine
        self._remembered: OrderedDict[str, NDArray[np.float32]] = OrderedDict()
        fixed = engine.embed(_REFERENCE).astype(np.float64)
        self._centre = fixed.mean(axis=0)
        self._projection = _signs(size, fixed.shape[1])
        projected = np.stack([self._project(row) for row in fixed])
        spread = float(np.sqrt((projected**2).mean()))
        if not spread > 0.0 or not np.isfinite(spread):
            raise EngineError(
                f"the hidden states of model {engine.content_id} are the same for all texts; set "
                "policy.observation=features"
            )
        self._scale = _SPREAD / spread

    def of(self, instruction: str) -> NDArray[np.float32]:
        """The embedding of an instruction."""
        found = self._remembered.pop(instruction, None)
        if found is None:
            values = self._project(self._engine.embed([instruction])[0].astype(np.float64))
            grid = np.rint(values * self._scale * _GRID) / _GRID
            found = np.clip(grid, -1.0, 1.0).astype(np.float32)
        self._remembered[instruction] = found
        if len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)
        return found

    def _project(self, hidden: NDArray[np.float64]) -> NDArray[np.float64]:
        # A sum over rows, unlike BLAS, adds in one order on every machine.
        projected: NDArray[np.float64] = (self._projection * (hidden - self._centre)).sum(axis=1)
        return projected


def _signs(size: int, width: int) -> NDArray[np.float64]:
    """A random projection of signs (Achlioptas 2003), a function of its shape alone."""
    count = size * width
    stream = hashlib.shake_256(b"teams_hpc embedding").digest(-(-count // 8))
    bits = np.unpackbits(np.frombuffer(stream, dtype=np.uint8))[:count]
    return bits.reshape(size, width).astype(np.float64) * 2.0 - 1.0
