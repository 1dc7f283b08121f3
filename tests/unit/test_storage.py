"""Atomic files, leases and manifests."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from teams_hpc.errors import CorruptFileError
from teams_hpc.storage.atomic import publishing, read_json, replacing, write_json
from teams_hpc.storage.lease import Lease, read_holder
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_who_publishes_second_discards(tmp_path: Path) -> None:
    path = tmp_path / "unit.h5"
    for text in ("first", "second"):
        with publishing(path) as temporary:
            temporary.write_text(text)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(CorruptFileError, match=r"x\.json"):
        read_json(path)


def test_a_lease_has_one_holder(tmp_path: Path) -> None:
    first, second = Lease(tmp_path / "run"), Lease(tmp_path / "run")
    with first, second:
        assert first.acquire()
        assert not second.acquire()
        first.release()
        assert second.acquire()
        assert second.is_held()
        assert not first.is_held()
    assert list(tmp_path.iterdir()) == []


def test_a_claim_cleared_away_while_it_is_written_is_not_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who ends a stage removes temporary files of dead workers, and may meet a living one's."""

    link = os.link

    def cleared(temporary: Path, path: Path) -> None:
        temporary.unlink()
        link(temporary, path)

    with monkeypatch.context() as patch:
        patch.setattr("teams_hpc.storage.lease.os.link", cleared)
        assert not Lease(tmp_path / "leases" / "claim").acquire()
    with Lease(tmp_path / "leases" / "claim") as lease:
        assert lease.acquire()


def test_a_link_that_was_made_and_refused_is_a_claim_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS sends a link again whose reply was lost, and is told that the name is taken."""
    link = os.link

    def made_twice(temporary: Path, path: Path) -> None:
        link(temporary, path)
        link(temporary, path)

    with monkeypatch.context() as patch, Lease(tmp_path / "claim") as lease:
        patch.setattr("teams_hpc.storage.lease.os.link", made_twice)
        assert lease.acquire()
        assert lease.is_held()
        assert not Lease(tmp_path / "claim").acquire()
    assert list(tmp_path.iterdir()) == []


def test_of_many_threads_one_gets_the_lease(tmp_path: Path) -> None:
    leases = [Lease(tmp_path / "run") for _ in range(8)]
    start = threading.Barrier(len(leases))
    won: list[Lease] = []

    def race(lease: Lease) -> None:
        start.wait(timeout=10)
        if lease.acquire():
            won.append(lease)

    threads = [threading.Thread(target=race, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(won) == 1
    won[0].release()


def test_a_killed_holder_is_found_dead_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from teams_hpc.storage.lease import Lease\n"
        "assert Lease(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "run"
    with subprocess.Popen(
        (sys.executable, "-c", code, str(path)), stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        lease = Lease(path, lease_s=3600)
        assert not lease.acquire()
        holder.kill()
        holder.wait(timeout=10)
        assert lease.acquire()
        lease.release()


def _foreign_claim(path: Path, beat: int) -> None:
    holder = {"host": "n1", "boot_id": "b", "pid": 1, "process_start": "1", "token": "t"}
    path.write_text(json.dumps({"holder": holder, "beat": beat}))


def test_a_foreign_holder_is_judged_by_its_heartbeat_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("teams_hpc.storage.lease.time.monotonic", lambda: now[0])
    path = tmp_path / "run"
    os.utime(tmp_path, (0, 0))  # clocks of files mean nothing
    _foreign_claim(path, 1)
    lease = Lease(path, lease_s=10)
    assert not lease.acquire()
    now[0] += 9
    _foreign_claim(path, 2)
    assert not lease.acquire()
    now[0] += 9
    assert not lease.acquire()
    now[0] += 2
    assert lease.acquire()
    lease.release()


def test_a_holder_here_that_stands_still_is_judged_by_its_heartbeat_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped or suspended process is alive, but nobody knows for how long it sleeps."""
    path = tmp_path / "run"
    holder = Lease(path, lease_s=3600)  # its next heartbeat is far away
    assert holder.acquire()
    now = [100.0]
    monkeypatch.setattr("teams_hpc.storage.lease.time.monotonic", lambda: now[0])
    other = Lease(path, lease_s=10)
    assert not other.acquire()
    now[0] += 9
    assert not other.acquire()
    now[0] += 2
    assert other.acquire()
    assert not holder.is_held()
    holder.release()
    assert other.is_held()
    other.release()


def test_a_garbled_claim_is_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("???")
    found = read_holder(path)
    assert found is not None
    assert not Lease(path).acquire()


def test_a_manifest_makes_a_stage_exist(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert read_manifest(run_dir, "dataset") is None
    write_json(run_dir.inputs("dataset"), {"digest": "d", "inputs": {}})
    write_manifest(run_dir, "dataset", {"counts": {"read": 3}})
    manifest = read_manifest(run_dir, "dataset")
    assert manifest is not None
    assert (manifest["digest"], manifest["counts"]) == ("d", {"read": 3})
    write_json(run_dir.manifest("dataset"), {"schema": 99})
    with pytest.raises(CorruptFileError, match="--rerun-from dataset"):
        read_manifest(run_dir, "dataset")
