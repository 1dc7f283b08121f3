"""Decontamination: what counts as repeating a benchmark, and which files it is read from."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teams_hpc.dataset.decontamination import Benchmarks, read_passages
from teams_hpc.errors import WorkError

FOX = "The quick brown fox jumps over the lazy dog while nobody looks."


def benchmarks(folder: Path, text: str, n: int = 8, name: str = "bench.txt") -> Benchmarks:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return Benchmarks.read([path], n)


def test_n_words_in_a_row_match_wherever_they_stand(tmp_path: Path) -> None:
    found = benchmarks(tmp_path, FOX)
    eight = "QUICK, brown -- fox? (jumps) over THE lazy\ndog"
    assert not found.contaminates("quick brown fox jumps", "over the lazy", "cat dog"), "a gap"
    assert not found.contaminates("", "", "quick brown fox jumps over the lazy"), "seven"
    assert found.contaminates("quick brown fox jumps", "over the", "lazy dog"), "over fields"
    assert found.contaminates("", "", f"As they say: {eight.replace(' -- ', ' ')}!")
    assert found.contaminates(FOX, "", "")


def test_a_short_passage_matches_a_whole_instruction_only(tmp_path: Path) -> None:
    found = benchmarks(tmp_path, "Who wrote Hamlet?\n")
    assert found.contaminates("who wrote HAMLET", "", "")
    assert not found.contaminates("Say who wrote Hamlet?", "", "")
    assert not found.contaminates("Something else", "", "Who wrote Hamlet?")


def test_a_wrapped_sentence_is_one_passage(tmp_path: Path) -> None:
    wrapped = FOX.replace(" over ", "\nover ")
    assert benchmarks(tmp_path, f"Title\n\n{wrapped}\n\nEnd\n").contaminates("", "", FOX)
    assert not benchmarks(tmp_path, wrapped.replace("\n", "\n\n")).contaminates("", "", FOX)


def test_strings_of_json_however_deep(tmp_path: Path) -> None:
    value = {"ignored key": 3, "choices": {"text": ["first", [{"deep": FOX}]]}}
    lines = json.dumps({"a": None}) + "\n\n" + json.dumps(value) + "\n"
    assert benchmarks(tmp_path, "\ufeff" + lines, name="b.jsonl").contaminates("", "", FOX)
    assert benchmarks(tmp_path, json.dumps([value], indent=1), name="b.json").contaminates(
        FOX, "", ""
    )
    assert list(read_passages(tmp_path / "b.json")) == ["first", FOX]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"a": "b"}\n{"a": \n', "line 2 of .*bad.jsonl is not valid JSON"),
        ("deep.json", b"[" * 200_000, "deep.json is not valid JSON"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "latin.txt is not UTF-8"),
        ("empty.txt", b" \n ... \n", "empty.txt holds no text"),
        ("numbers.jsonl", b"[1, 2]\n", "numbers.jsonl holds no text"),
    ],
)
def test_a_file_that_protects_from_nothing_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WorkError, match=rf"dataset\.decontaminate: .*{message}"):
        Benchmarks.read([tmp_path / name], 8)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"dataset\.decontaminate: can't read .*none\.txt"):
        Benchmarks.read([tmp_path / "none.txt"], 8)


def test_without_files_nothing_is_contaminated() -> None:
    assert not Benchmarks.read([], 1).contaminates("a", "b", "c")


ALPHABET = st.lists(st.sampled_from("abc"), max_size=12)


@given(passage=ALPHABET, row=ALPHABET, n=st.integers(1, 4))
def test_it_agrees_with_a_plain_search(
    tmp_path_factory: pytest.TempPathFactory, passage: list[str], row: list[str], n: int
) -> None:
    if len(passage) < n:
        return
    path = tmp_path_factory.getbasetemp() / "plain.txt"
    path.write_text(" ".join(passage), encoding="utf-8")
    grams = {tuple(passage[i : i + n]) for i in range(len(passage) - n + 1)}
    expected = any(tuple(row[i : i + n]) in grams for i in range(len(row) - n + 1))
    assert Benchmarks.read([path], n).contaminates("", "", " ".join(row)) == expected
