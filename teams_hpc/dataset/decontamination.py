"""Leaving out rows that repeat a benchmark.

A row is contaminated if it shares `n` words in a row with a benchmark passage. A passage of fewer
words can't be found that way: it contaminates the rows whose whole instruction it is.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teams_hpc.errors import WorkError
from teams_hpc.rewriting.near_duplicates import words

_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson"})
_KEY = "dataset.decontaminate"


def _hash(parts: Sequence[str]) -> int:
    """64 bits: among 10^7 benchmark n-grams a stranger matches by chance once in 10^12."""
    encoded = "\0".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little")


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, however deep; keys are not text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WorkError(
            f"{_KEY}: {where} is not valid JSON: {error}; "
            "give JSON lines as .jsonl, one JSON value as .json, anything else as .txt"
        ) from None


def _text_passages(text: str) -> Iterator[str]:
    """Each line, and each paragraph as a whole, since a sentence may be wrapped."""
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            yield line
            paragraph.append(line)
            continue
        if len(paragraph) > 1:
            yield "\n".join(paragraph)
        paragraph.clear()


def read_passages(path: Path) -> Iterator[str]:
    """The texts of one benchmark file.

    JSON lines (`.jsonl`, `.ndjson`) and JSON (`.json`): every string value. Any other file is text.

    Raises:
        WorkError: Not readable, not UTF-8, or a broken JSON line (with its number).
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise WorkError(f"{_KEY}: can't read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise WorkError(f"{_KEY}: {path} is not UTF-8 text: {error}") from None
    suffix = path.suffix.lower()
    if suffix in _LINES_SUFFIXES:
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield from _strings(_parse(line, f"line {number} of {path}"))
    elif suffix == ".json":
        yield from _strings(_parse(text, str(path)))
    else:
        yield from _text_passages(text)


@dataclass(frozen=True, slots=True)
class Benchmarks:
    """What must not be in the data set.

    Attributes:
        n: Words in a row that count as a match.
        ngrams: Hashes of all n-grams of the benchmarks.
        short: Hashes of whole passages of fewer than `n` words.
    """

    n: int
    ngrams: frozenset[int]
    short: frozenset[int]

    @classmethod
    def read(cls, paths: Sequence[Path], n: int) -> "Benchmarks":
        """Read benchmark files; about 100 bytes of memory for each distinct n-gram.

        Raises:
            WorkError: A file can't be read or holds no words: it would protect from nothing.
        """
        ngrams: set[int] = set()
        short: set[int] = set()
        for path in paths:
            is_empty = True
            for passage in read_passages(path):
                found = words(passage)
                is_empty = is_empty and not found
                if len(found) >= n:
                    ngrams.update(_ngrams(found, n))
                elif found:
                    short.add(_hash(found))
            if is_empty:
                raise WorkError(f"{_KEY}: {path} holds no text; take it out or correct the path")
        return cls(n, frozenset(ngrams), frozenset(short))

    def contaminates(self, instruction: str, input_text: str, response: str) -> bool:
        """Whether a row repeats a benchmark."""
        if not self.ngrams and not self.short:
            return False
        if self.short and _hash(words(instruction)) in self.short:
            return True
        found = words("\n".join((instruction, input_text, response)))
        return any(ngram in self.ngrams for ngram in _ngrams(found, self.n))


def _ngrams(parts: Sequence[str], n: int) -> Iterator[int]:
    for start in range(len(parts) - n + 1):
        yield _hash(parts[start : start + n])
