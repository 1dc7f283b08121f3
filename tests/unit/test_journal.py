"""Framing, torn tails, history over several writers, and what was spent."""

import errno
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teams_hpc.errors import CorruptFileError, WorkError
from teams_hpc.rewriting.reviewer import Verdict
from teams_hpc.storage.journal import (
    Batch,
    Header,
    JournalWriter,
    Result,
    Tokens,
    frame,
    frames,
    history,
    journal_paths,
    new_writer_name,
    read_journal,
    unit_of,
)

MODELS = {"expert": "m", "reviewer": "r"}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("text", ["\ud800", "\ud83d\ude00", "é\udcff"])
def test_halves_of_surrogate_pairs_are_read_as_they_were_written(text: str) -> None:
    assert [value for value, _ in frames(frame([text, {text: 1}]))] == [[text, {text: 1}]]


@given(values=st.lists(json_values, max_size=6), data=st.data())
def test_whatever_is_cut_off_whole_frames_stay(values: list[object], data: st.DataObject) -> None:
    parts = [frame(value) for value in values]
    content = b"".join(parts)
    cut = data.draw(st.integers(0, len(content)))
    whole = [sum(map(len, parts[: n + 1])) for n in range(len(parts))]
    expected = [(value, end) for value, end in zip(values, whole, strict=True) if end <= cut]
    assert list(frames(content[:cut])) == expected


@given(values=st.lists(json_values, min_size=1, max_size=5), data=st.data())
def test_no_flipped_bit_passes(values: list[object], data: st.DataObject) -> None:
    parts = [frame(value) for value in values]
    content = bytearray(b"".join(parts))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    found = [value for value, _ in frames(bytes(content))]
    assert found == values[: len(found)]
    assert sum(map(len, parts[: len(found)])) <= place


def batch(*keys: str, role: str = "expert") -> Batch:
    results = tuple(Result(key=key, digest=f"d{key}", value=[key, 1]) for key in keys)
    return Batch(role=role, results=results, tokens=Tokens(calls=len(keys), prompt_tokens=5))


def writer(
    folder: Path, name: str, parent: str = "", base: int = 0, unit: int = 3
) -> JournalWriter:
    header = Header(unit=unit, digest="x", models=MODELS, parent=parent, base=base)
    return JournalWriter(folder / f"unit-{unit:05d}.{name}.wal", header)


def keys_of(batches: list[Batch]) -> list[list[str]]:
    return [[result.key for result in one.results] for one in batches]


def test_what_is_committed_is_read_back_with_what_is_in_doubt(tmp_path: Path) -> None:
    one = writer(tmp_path, "a")
    assert list(tmp_path.iterdir()) == []
    one.commit(None, {"expert": ["k1", "k2"]})
    one.commit(batch("k2"), {"reviewer": ["v2"]})
    one.commit(batch("v2", role="reviewer"), {"expert": ["k3"]})
    found = read_journal(one.path)
    assert found.header == one.header
    assert keys_of(list(found.batches)) == [["k2"], ["v2"]]
    assert found.in_doubt == {"k1", "k3"}
    spent = found.spent
    assert spent == one.spent
    expert = spent["expert", "m"]
    assert (expert.calls, expert.prompt_tokens, expert.in_doubt) == (1, 5, 2)
    assert spent["reviewer", "r"].in_doubt == 0
    assert one.is_there
    one.path.unlink()
    assert not one.is_there
    one.close()


def test_a_journal_that_another_node_has_removed_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(descriptor: int) -> os.stat_result:
        raise OSError(code, os.strerror(code))

    one = writer(tmp_path, "a")
    one.commit(None, {"expert": ["k1"]})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", stale)
        code = errno.ESTALE
        assert not one.is_there
        code = errno.EIO
        with pytest.raises(OSError, match="Input/output"):
            _ = one.is_there
    one.close()


def test_lost_tries_are_in_doubt_and_stand_in_a_frame_only_if_there_are_any(
    tmp_path: Path,
) -> None:
    one = writer(tmp_path, "a")
    one.commit(None, {"expert": ["k1", "k2"]})
    one.commit(batch("k1"), {})
    for key, role, lost in (("k2", "expert", 3), ("v2", "reviewer", 2)):
        tokens = Tokens(calls=1, lost=lost)
        one.commit(Batch(role=role, results=batch(key).results, tokens=tokens), {role: [key + "x"]})
    one.close()
    found = read_journal(one.path)
    assert [batch.tokens.lost for batch in found.batches] == [0, 3, 2]
    assert found.spent == one.spent
    assert (found.spent["expert", "m"].calls, found.spent["expert", "m"].in_doubt) == (2, 3 + 1)
    values = [value for value, _ in frames(one.path.read_bytes())][1:]
    assert [value.get("lost") for value in values] == [None, None, 3, 2]
    assert list(values[1]) == ["role", "intents", "results", "tokens"]


def test_one_commit_is_one_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = os.fdatasync
    one = writer(tmp_path, "a")
    one.commit(None, {"expert": ["k"]})
    monkeypatch.setattr(os, "fdatasync", lambda fd: (calls.append(fd), real(fd))[0])
    one.commit(batch("k"), {"reviewer": ["v"]})
    assert len(calls) == 1
    one.close()


@pytest.mark.parametrize("lost", [1, 20, 60])
def test_a_torn_frame_is_a_batch_that_never_was(tmp_path: Path, lost: int) -> None:
    one = writer(tmp_path, "a")
    one.commit(None, {"expert": ["k1", "k2"]})
    one.commit(batch("k1"), {})
    one.commit(batch("k2"), {"expert": ["k4"]})
    one.close()
    os.truncate(one.path, one.path.stat().st_size - lost)
    found = read_journal(one.path)
    assert keys_of(list(found.batches)) == [["k1"]]
    assert found.in_doubt == {"k2"}


def test_a_file_without_a_whole_first_frame_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "unit-00003.a.wal"
    path.write_bytes(b"\x05")
    found = read_journal(path)
    assert (found.header, found.batches, found.spent) == (None, (), {})
    assert history([found]) == ([], "")


def test_history_goes_on_over_writers_and_takes_the_longest_branch(tmp_path: Path) -> None:
    first = writer(tmp_path, "a")
    for key in ("1", "2", "3"):
        first.commit(batch(key), {})
    second = writer(tmp_path, "b", parent=first.path.name, base=2)
    second.commit(batch("3b"), {})
    third = writer(tmp_path, "c", parent=second.path.name, base=3)
    third.commit(batch("4b"), {})
    journals = [read_journal(path) for path in journal_paths(tmp_path, 3)]
    batches, last = history(journals)
    assert keys_of(batches) == [["1"], ["2"], ["3b"], ["4b"]]
    assert (last, batches[2].source) == (third.path.name, second.path.name)
    assert history(journals[::-1]) == (batches, last)
    first.commit(batch("4"), {})
    first.commit(batch("5"), {})
    journals = [read_journal(path) for path in journal_paths(tmp_path, 3)]
    assert keys_of(history(journals)[0]) == [["1"], ["2"], ["3"], ["4"], ["5"]]
    for one in (first, second, third):
        one.close()


def test_of_branches_that_are_worth_it_the_longest_is_taken(tmp_path: Path) -> None:
    outage = writer(tmp_path, "a")
    for key in ("down", "down again", "still down"):
        outage.commit(batch(key), {})
    first = writer(tmp_path, "b")
    first.commit(batch("reply"), {})
    second = writer(tmp_path, "c", parent=first.path.name, base=1)
    second.commit(batch("down once more"), {})
    journals = [read_journal(path) for path in journal_paths(tmp_path, 3)]
    found, last = history(journals, lambda batches: ["reply"] in keys_of(list(batches)))
    assert (keys_of(found), last) == ([["reply"], ["down once more"]], second.path.name)
    assert history(journals, lambda batches: False) == ([], "")
    for one in (outage, first, second):
        one.close()


def test_a_lost_parent_is_damage(tmp_path: Path) -> None:
    first = writer(tmp_path, "a")
    for key in ("1", "2"):
        first.commit(batch(key), {})
    first.close()
    second = writer(tmp_path, "b", parent=first.path.name, base=2)
    second.commit(batch("3"), {})
    second.close()
    os.truncate(first.path, first.path.stat().st_size - 1)
    journals = [read_journal(path) for path in journal_paths(tmp_path)]
    with pytest.raises(CorruptFileError, match=r"unit-00003\.a\.wal is damaged"):
        history(journals)


def test_a_foreign_frame_is_named(tmp_path: Path) -> None:
    path = tmp_path / "unit-00001.a.wal"
    path.write_bytes(frame({"schema": 99}))
    with pytest.raises(CorruptFileError, match=r"unit-00001\.a\.wal is not a journal"):
        read_journal(path)


@pytest.mark.parametrize("call", ["write", "fdatasync"])
@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "disk full"), (errno.EIO, "failed")])
def test_a_disk_that_fails_is_named_and_what_was_durable_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, words: str
) -> None:
    one = writer(tmp_path, "a")
    one.commit(batch("k1"), {})

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(WorkError, match=rf"{words} at .*unit-00003\.a\.wal"):
            one.commit(batch("k2"), {})
    one.close()
    assert keys_of(list(read_journal(one.path).batches))[:1] == [["k1"]]


def test_names_are_of_one_unit_and_writer(tmp_path: Path) -> None:
    names = {new_writer_name() for _ in range(3)}
    assert len(names) == 3
    for name in names:
        writer(tmp_path, name, unit=12).commit(None, {})
    paths = journal_paths(tmp_path, 12)
    assert [unit_of(path) for path in paths] == [12] * 3
    assert journal_paths(tmp_path, 1) == []


def test_frames_are_what_they_were() -> None:
    """Runs that have begun go on with later versions."""
    result = Result("k", "d", Verdict(0.5, False, "é"))
    written = frame({"results": [result]})
    assert written.hex() == (
        "2800000000000000cd4683a6ec110e810a2acb4745f1331a"
        + '{"results":[["k","d",[0.5,false,"é"]]]}'.encode().hex()
    )
    # A verdict with an error had NaN once.
    earlier = "2800000000000000fbdf9dade852696829a9bbfae020f897"
    content = bytes.fromhex(earlier) + '{"results":[["k","d",[NaN,false,"é"]]]}'.encode()
    [(value, _)] = frames(content)
    assert math.isnan(value["results"][0][2][0])
