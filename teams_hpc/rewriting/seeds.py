"""Reading seed instructions from whatever file they come in.

The format is told from the content: a JSON list, JSON lines, or plain text with one instruction a
line. A record is a string, an Alpaca record (`instruction`, `input`, `output`) or a Self-Instruct
task (`instruction`, `instances`); other keys are ignored. A Self-Instruct task is one seed: its
instruction with the input and output of its first instance, because the other instances are
further examples of the same instruction, not further instructions.
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from teams_hpc.errors import SeedError
from teams_hpc.rewriting import identity

SHIPPED_SEEDS = Path(__file__).resolve().parent.parent / "data" / "seeds.jsonl"

_REMEDY = (
    "seeds.path must name a JSON list, JSON lines, or a text with one instruction a line, in "
    "UTF-8; seeds.path=null takes the seeds shipped with the package"
)
_RECORD_REMEDY = (
    'a record is a string or an object such as {"instruction": "...", "input": "...", '
    '"output": "..."}'
)
_JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
_OPENS_LIST = re.compile(r'\s*\[\s*(["{\]]|$)')
_OPENS_OBJECT = re.compile(r'\s*\{\s*(["}]|$)')
_NO_INPUT = frozenset({"<noinput>", "<no input>", "<no_input>", "noinput", "no input"})
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
_INVISIBLE_CATEGORIES = "ZC"


@dataclass(frozen=True, slots=True)
class Seed:
    """An instruction, the input that belongs to it, and the answer it came with (if any)."""

    instruction: str
    input: str = ""
    output: str = ""

    @property
    def id(self) -> str:
        """Identity of the seed, over instruction and input: 32 hexadecimal digits."""
        return identity.seed_id(self.instruction, self.input)


@dataclass(frozen=True, slots=True)
class SeedSet:
    """Distinct seeds in file order.

    `num_read` counts the records of the whole file and `num_duplicates` those that repeat an
    earlier one; `seeds` are the first `limit` of the others.
    """

    seeds: tuple[Seed, ...]
    num_read: int
    num_duplicates: int


def read_seeds(path: Path | None, limit: int | None) -> SeedSet:
    """Read a seed file, all of it, and keep the first `limit` distinct seeds.

    Texts are brought to Unicode NFC and trimmed of white space around them; two seeds whose
    instruction and input are then equal are one, and the first stays.

    Args:
        path: JSON list, JSON lines or text in UTF-8; None for the seeds shipped with the package.
        limit: Most seeds to keep; None for all.

    Raises:
        SeedError: The file can't be read or a record is wrong; says where and what would be right.
    """
    path = SHIPPED_SEEDS if path is None else path
    distinct: dict[tuple[str, str], Seed] = {}
    num_read = 0
    for where, record in _records(path, _read_text(path)):
        seed = _to_seed(record, where)
        distinct.setdefault((seed.instruction, seed.input), seed)
        num_read += 1
    if not distinct:
        raise SeedError(f"{path} holds no seeds; {_REMEDY}")
    return SeedSet(
        seeds=tuple(distinct.values())[:limit],
        num_read=num_read,
        num_duplicates=num_read - len(distinct),
    )


def _read_text(path: Path) -> str:
    """The file's text, with line ends made equal and a byte-order mark removed."""
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "not a regular file"
            raise SeedError(f"the seed file {path} is {kind}; {_REMEDY}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise SeedError(f"no seed file {path}; {_REMEDY}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SeedError(f"can't read the seed file {path}: {reason}; {_REMEDY}") from None
    data = data.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SeedError(
            f"{path}, line {line}: not valid UTF-8 ({error.reason}); save the file as UTF-8"
        ) from None
    if not text.strip():
        state = "holds only blank lines" if text else "is empty"
        raise SeedError(f"the seed file {path} {state}; {_REMEDY}")
    return text


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Each record with the place it stands at, for messages."""
    # Not splitlines: a JSON string may hold U+2028, which is no line end to an editor.
    lines = [(f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1)]
    lines = [(where, line) for where, line in lines if line.strip()]
    is_json_file = path.suffix.lower() in _JSON_SUFFIXES
    if _OPENS_LIST.match(text) or (is_json_file and text.lstrip().startswith("[")):
        for number, item in enumerate(_parse_list(path, text), 1):
            yield f"{path}, item {number}", item
    elif _is_one_object(text):
        yield lines[0][0], json.loads(text)
    elif is_json_file or _OPENS_OBJECT.match(text) or _are_json_strings(lines):
        for where, line in lines:
            yield where, _parse_line(where, line)
    else:
        yield from lines


def _parse_list(path: Path, text: str) -> list[Any]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise SeedError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}); "
            "the file opens with [, so it must be one whole JSON list"
        ) from None
    except (ValueError, RecursionError) as error:
        raise SeedError(f"{path} is not a usable JSON list: {error}; {_RECORD_REMEDY}") from None
    return cast(list[Any], items)


def _is_one_object(text: str) -> bool:
    """Whether the text is one JSON object, which may be spread over lines."""
    if not _OPENS_OBJECT.match(text):
        return False
    stripped = text.strip()
    try:
        _, end = json.JSONDecoder().raw_decode(stripped)
    except (ValueError, RecursionError):
        return False
    return end == len(stripped)


def _are_json_strings(lines: Iterable[tuple[str, str]]) -> bool:
    """Whether each line is a JSON string; a text whose first line merely quotes someone is not."""
    for _, line in lines:
        try:
            if not line.lstrip().startswith('"') or not isinstance(json.loads(line), str):
                return False
        except ValueError:
            return False
    return True


def _parse_line(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = (
            f"{error.msg}, column {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else error
        )
        raise SeedError(
            f"{where}: not valid JSON ({reason}); each line must hold one whole record, and "
            f"{_RECORD_REMEDY}; plain text belongs in a .txt file"
        ) from None


def _to_seed(record: Any, where: str) -> Seed:
    """Check one record and bring it to the form seeds have."""
    if isinstance(record, str):
        record = {"instruction": record}
    if not isinstance(record, dict):
        raise SeedError(f"{where}: {_json_type(record)}, not a record; {_RECORD_REMEDY}")
    if record.get("instruction") is None:
        keys = ", ".join(list(record)[:6]) or "none"
        raise SeedError(f"{where}: no instruction (its keys: {keys[:80]}); {_RECORD_REMEDY}")
    instruction = _text(record, "instruction", where)
    if all(unicodedata.category(char)[0] in _INVISIBLE_CATEGORIES for char in instruction):
        raise SeedError(f"{where}: the instruction is blank; write one or remove the record")
    answered = _first_instance(record, where) if "instances" in record else record
    input_text = _text(answered, "input", where)
    return Seed(
        instruction=instruction,
        input="" if input_text.casefold() in _NO_INPUT else input_text,
        output=_text(answered, "output", where),
    )


def _first_instance(task: dict[str, Any], where: str) -> dict[str, Any]:
    """What holds input and output of a Self-Instruct task; a task without instances has neither."""
    instances = task["instances"]
    if not isinstance(instances, list) or not all(isinstance(item, dict) for item in instances):
        raise SeedError(
            f'{where}: instances must be a list of {{"input": "...", "output": "..."}} objects'
        )
    return instances[0] if instances else {}


def _text(record: dict[str, Any], key: str, where: str) -> str:
    """A text of a record in NFC without white space around it; null or no key is the empty text."""
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise SeedError(f"{where}: {key} is {_json_type(value)}; it must be a string")
    if _NOT_TEXT.search(value):
        raise SeedError(
            f"{where}: {key} holds a NUL or half a surrogate pair, which is not text; "
            "remove it, or save the file as UTF-8"
        )
    return unicodedata.normalize("NFC", value).strip()


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
