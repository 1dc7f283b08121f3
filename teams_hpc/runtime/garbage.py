"""How often Python looks for cycles among its objects."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_YOUNG_OBJECTS = 10_000
"""So many new objects make it look; by itself it does at 700 to 2,000."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look seldom while thousands of objects are in use that form no cycles; for the whole process.

    Where that is turned off, it stays so.
    """
    before = gc.get_threshold()
    if before[0]:
        gc.set_threshold(max(before[0], _YOUNG_OBJECTS), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
