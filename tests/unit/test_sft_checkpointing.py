"""Checkpoints: there whole or not at all, and read only if they can be trusted."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from teams_hpc.errors import InputChangedError, UsageError, WorkError
from teams_hpc.runtime.ranks import Ranks
from teams_hpc.sft.checkpointing import CheckpointStore, RunState, checkpoint_for
from teams_hpc.sft.folders import replacing_folder


@dataclass(frozen=True)
class Alone:
    """A world of one process that says it is one of `size`."""

    size: int = 1
    ranks: Ranks = Ranks()  # noqa: RUF009 - frozen
    is_first: bool = True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None: ...


class Engine:
    """Saves two files, or is killed in between."""

    def __init__(self, dies: bool = False) -> None:
        self.dies = dies

    def save(self, folder: Path) -> None:
        (folder / "zero").mkdir()
        (folder / "zero" / "model.pt").write_bytes(b"weights")
        if self.dies:
            raise KeyboardInterrupt
        (folder / "zero" / "optimizer.pt").write_bytes(b"moments")


def open_store(folder: Path, *, size: int = 1, digest: str = "d", keep: int = 2) -> CheckpointStore:
    return CheckpointStore(folder / "checkpoints", digest, Alone(size=size), keep)


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    store = open_store(folder, keep=keep)
    for step in steps:
        store.save(Engine(), RunState(step=step, tokens=10 * step, last_loss=1.5))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_newest_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    assert open_store(tmp_path).latest() is None
    save(tmp_path, 5, 10, 15)
    assert names(tmp_path) == ["step-000010", "step-000015"]
    found = open_store(tmp_path).latest()
    assert found is not None
    assert found.state == RunState(step=15, tokens=150, last_loss=1.5)
    assert found.folder.name == "step-000015"
    assert sorted(found.files) == ["zero/model.pt", "zero/optimizer.pt"]


def test_the_slowest_save_is_remembered_over_starts(tmp_path: Path) -> None:
    class Slow(Engine):
        def save(self, folder: Path) -> None:
            time.sleep(0.2)
            Engine.save(self, folder)

    store = open_store(tmp_path)
    store.save(Slow(), RunState(step=1))
    assert store.slowest_save_s >= 0.2
    later = open_store(tmp_path)
    assert later.latest() is not None
    assert later.slowest_save_s >= 0.2
    later.save(Engine(), RunState(step=2))
    assert later.slowest_save_s >= 0.2


def test_a_killed_save_leaves_the_one_before_and_is_cleared_away(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path).save(Engine(dies=True), RunState(step=10))
    (tmp_path / "checkpoints" / "step-000020").mkdir()  # a name alone is no checkpoint
    assert ".step-000010.tmp" in names(tmp_path)
    found = open_store(tmp_path).latest()
    assert found is not None
    assert found.state.step == 5
    assert names(tmp_path) == ["step-000005", "step-000020"]


@pytest.mark.parametrize("name", ["zero/model.pt", "manifest.json"])
def test_a_damaged_one_is_passed_over_and_replaced(tmp_path: Path, name: str) -> None:
    save(tmp_path, 5, 10)
    victim = tmp_path / "checkpoints" / "step-000010" / name
    victim.write_bytes(b"X" + victim.read_bytes()[1:])
    found = open_store(tmp_path).latest()
    assert found is not None
    assert found.state.step == 5
    save(tmp_path, 7, keep=1)
    assert names(tmp_path) == ["step-000007"]  # what came after the one gone on from is gone


def test_one_of_other_inputs_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(InputChangedError, match="--rerun-from sft"):
        open_store(tmp_path, digest="other").latest()


def convert(source: Path, target: Path) -> None:
    (target / "zero").mkdir()
    (target / "zero" / "all.pt").write_bytes((source / "zero" / "optimizer.pt").read_bytes())


def test_another_number_of_processes_needs_it_reshaped(tmp_path: Path) -> None:
    save(tmp_path, 5)
    store = open_store(tmp_path)
    with pytest.raises(UsageError, match=r"by 1 processes; .*\n  teams-hpc reshape .* --ranks 4"):
        checkpoint_for(store, 4, tmp_path)
    checkpoint = store.latest()
    assert checkpoint is not None
    store.make_universal(checkpoint, convert)
    found = checkpoint_for(store, 4, tmp_path)
    assert found is not None
    assert found.world_size is None
    assert found.state == checkpoint.state
    assert (found.folder / "zero" / "all.pt").read_bytes() == b"moments"
    assert checkpoint_for(store, 1, tmp_path) == checkpoint


def test_what_was_reshaped_goes_with_its_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)
    store = open_store(tmp_path)
    checkpoint = store.latest()
    assert checkpoint is not None
    store.make_universal(checkpoint, convert)
    save(tmp_path, 6)
    assert names(tmp_path) == ["step-000005", "step-000006", "universal-000005"]
    save(tmp_path, 7)
    assert names(tmp_path) == ["step-000006", "step-000007"]


@pytest.mark.parametrize("fault", ["flipped", "newer checkpoint", "killed"])
def test_a_reshaped_one_that_does_not_fit_is_not_used(tmp_path: Path, fault: str) -> None:
    save(tmp_path, 5)
    store = open_store(tmp_path)
    checkpoint = store.latest()
    assert checkpoint is not None

    def killed(source: Path, target: Path) -> None:
        convert(source, target)
        raise KeyboardInterrupt

    if fault == "killed":
        with pytest.raises(KeyboardInterrupt):
            store.make_universal(checkpoint, killed)
    else:
        store.make_universal(checkpoint, convert)
    if fault == "flipped":
        (tmp_path / "checkpoints" / "universal-000005" / "zero" / "all.pt").write_bytes(b"Moments")
    if fault == "newer checkpoint":
        store.save(Engine(), RunState(step=5, tokens=11))
        checkpoint = store.latest()
        assert checkpoint is not None
    assert store.universal(checkpoint) is None
    store.make_universal(checkpoint, convert)
    assert store.universal(checkpoint) is not None


@pytest.mark.parametrize("name", ["", "step-000005", "step-000005/zero/model.pt"])
def test_one_that_others_can_write_is_not_loaded(tmp_path: Path, name: str) -> None:
    before = os.umask(0)
    try:
        save(tmp_path, 5)  # a careless umask does no harm
    finally:
        os.umask(before)
    assert open_store(tmp_path).latest() is not None
    path = tmp_path / "checkpoints" / name
    path.chmod(path.stat().st_mode | 0o020)
    with pytest.raises(WorkError, match="can be written by others"):
        open_store(tmp_path).latest()


def test_a_folder_replaces_another_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with replacing_folder(target) as folder:
        (folder / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing_folder(target) as folder:
        (folder / "new").write_text(str(1 // 0))
    assert [path.name for path in target.iterdir()] == ["old"]
    with replacing_folder(target) as folder:
        (folder / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
