"""What torch says when memory or a peer is lost, in words that help."""

import pytest
import torch

from teams_hpc.errors import UsageError, WorkError
from teams_hpc.runtime.ranks import Ranks
from teams_hpc.sft import world


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_out_of_memory_says_what_to_change(error: RuntimeError) -> None:
    with pytest.raises(WorkError) as caught, world.naming_failures():
        raise error
    for key in ("micro_batch_rows", "activation_checkpointing", "offload_optimizer"):
        assert f"sft.{key}" in str(caught.value)


def test_a_lost_peer_waits_to_be_ended_and_then_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(world.time, "sleep", waited.append)
    with pytest.raises(WorkError, match="another process"), world.naming_failures():
        raise RuntimeError("[/pytorch/third_party/gloo/...] Connection closed by peer [127.0.0.1]")
    assert waited


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="a bug"), world.naming_failures():
        raise RuntimeError("a bug")


def test_several_processes_must_know_where_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "1")
    ranks = Ranks(rank=0, world_size=2)
    with pytest.raises(UsageError, match="MASTER_ADDR"), world.joined_world(ranks, "cpu"):
        pass


class Counted:
    """What a collective of a world would give."""

    def __init__(self, size: int, *found: float) -> None:
        self.size, self.ranks, self._found = size, Ranks(rank=0, world_size=size), found

    def sum(self, *_: float) -> list[float]:
        return list(self._found)


def test_a_world_is_counted_before_it_computes() -> None:
    world._check_all_are_there(Counted(4, 4.0, 6.0))  # type: ignore[arg-type]
    for found in ((1.0, 0.0), (4.0, 0.0)):  # each alone; all with the same rank
        with pytest.raises(UsageError, match=f"{found[0]:.0f} processes met, with ranks that sum"):
            world._check_all_are_there(Counted(4, *found))  # type: ignore[arg-type]
