"""How often Python looks for cycles is changed for a while and put back."""

import gc
from collections.abc import Iterator
from contextlib import suppress

import pytest

from teams_hpc.runtime.garbage import seldom_collected


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize(("before", "within"), [(700, 10_000), (50_000, 50_000), (0, 0)])
def test_it_is_made_rarer_and_put_back_whatever_happens(before: int, within: int) -> None:
    gc.set_threshold(before, 10, 10)
    with suppress(KeyError), seldom_collected():
        found = gc.get_threshold()
        raise KeyError
    assert found == (within, 10, 10)
    assert gc.get_threshold() == (before, 10, 10)
