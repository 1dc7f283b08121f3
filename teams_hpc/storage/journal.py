"""The write-ahead log of a work unit: what engines returned, before anything depends on it.

Each writer has a file of its own, `unit-00012.<writer>.wal`, and only ever appends. A frame is
length, checksum and JSON; it holds one whole batch of results, as the engine returned it, and the
intents to send the requests that follow from it. So one fsync makes a batch durable, and a torn
frame, at the end of a file whose writer was killed, is a batch that never was.

Batches are a history: replayed in order they lead a unit to the very state its last writer was in,
with the same requests pending in the same order. A writer that takes over names in its first frame
which file it went on from and after how many batches (`parent`, `base`), so that files form a
tree. One path through it is replayed: of those worth it the longest, of equals the one whose name
is the greatest.
Branches come about only when a holder that was thought dead writes on; they cost calls, which are
counted, and nothing else.
"""

import errno
import hashlib
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from teams_hpc.errors import CorruptFileError
from teams_hpc.storage.atomic import fsync_folder, naming_disk_faults
from teams_hpc.storage.lease import Holder

SCHEMA = 1
_LENGTH_BYTES = 8
_CHECKSUM_BYTES = 16
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_to_json = msgspec.json.Encoder().encode

log = logging.getLogger(__name__)


class Result(NamedTuple):
    """What one call returned; journals hold its values in this order.

    Attributes:
        key: Identity of the call: record id, purpose, attempt.
        digest: Of everything that decides the result (model, prompt, sampling).
        value: The result, as JSON takes it (without NaN); a named tuple is a list there.
    """

    key: str
    digest: str
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Calls and tokens of a batch; `lost` are further tries, without a usable reply."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Results that one engine returned together, in its order.

    Attributes:
        role: Whose engine: `expert` or `reviewer`.
        source: File it was read from; empty if it is not written yet.
    """

    role: str
    results: tuple[Result, ...]
    tokens: Tokens
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first frame of a file.

    Attributes:
        unit: The work unit.
        digest: Input digest of the stage.
        models: Content id of each role's engine.
        parent: File this writer went on from, or empty.
        base: How many batches it had replayed by then.
    """

    unit: int
    digest: str
    models: Mapping[str, str]
    parent: str = ""
    base: int = 0


@dataclass(slots=True, kw_only=True)
class Spent:
    """What one writer asked of one role: results it made durable, requests and tries without."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_doubt: int = 0


Expenses = dict[tuple[str, str], Spent]
"""What was spent by role and model."""


def _count(
    spent: Expenses,
    models: Mapping[str, str],
    batch: Batch | None,
    intents: Mapping[str, Sequence[str]],
) -> None:
    """Add what a batch and intents say was spent."""
    for role, keys in intents.items():
        spent.setdefault((role, models[role]), Spent()).in_doubt += len(keys)
    if batch is not None:
        one = spent.setdefault((batch.role, models[batch.role]), Spent())
        one.calls += batch.tokens.calls
        one.prompt_tokens += batch.tokens.prompt_tokens
        one.completion_tokens += batch.tokens.completion_tokens
        one.in_doubt += batch.tokens.lost - len(batch.results)


def _checksum(length: bytes, payload: bytes) -> bytes:
    state = hashlib.blake2b(length, digest_size=_CHECKSUM_BYTES)
    state.update(payload)
    return state.digest()


def frame(value: Any) -> bytes:
    """One frame: length of the payload, checksum over length and payload, payload."""
    try:
        payload = _to_json(value)  # a tenth of the time of `json`
    except UnicodeEncodeError:  # half a surrogate pair, which is no UTF-8
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        payload = text.encode("utf-8", "surrogatepass")
    length = len(payload).to_bytes(_LENGTH_BYTES, "little")
    return length + _checksum(length, payload) + payload


def frames(content: bytes) -> Iterator[tuple[Any, int]]:
    """The whole frames at the start of `content`, each with the place where it ends."""
    at = 0
    while True:
        start = at + _LENGTH_BYTES + _CHECKSUM_BYTES
        length = content[at : at + _LENGTH_BYTES]
        end = start + int.from_bytes(length, "little")
        if start > len(content) or end > len(content):
            return
        payload = content[start:end]
        if content[at + _LENGTH_BYTES : start] != _checksum(length, payload):
            return
        at = end
        yield json.loads(payload), end  # which lets such halves pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """One writer's file as far as it is whole; a torn tail is left out.

    Attributes:
        path: The file.
        header: None if not even the first frame is whole: then nothing was ever sent.
        batches: In order.
        intents: Keys of the requests announced, by role, in order.
    """

    path: Path
    header: Header | None
    batches: tuple[Batch, ...]
    intents: Mapping[str, Sequence[str]]

    @property
    def in_doubt(self) -> set[str]:
        """Keys that were announced and have no result: sent, or about to be."""
        keys = {key for keys in self.intents.values() for key in keys}
        return keys - {result.key for batch in self.batches for result in batch.results}

    @property
    def spent(self) -> Expenses:
        """What it cost, by role and model."""
        spent: Expenses = {}
        if self.header is not None:
            _count(spent, self.header.models, None, self.intents)
            for batch in self.batches:
                _count(spent, self.header.models, batch, {})
        return spent


def read_journal(path: Path) -> Journal:
    """Read one writer's file; a torn tail is passed over.

    Raises:
        CorruptFileError: A whole frame isn't what a frame should be.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # its unit was published just now
        content = b""
    header: Header | None = None
    batches = []
    intents: dict[str, list[str]] = defaultdict(list)
    end = 0
    try:
        for value, end in frames(content):  # noqa: B007 (the last place is reported)
            if header is None:
                header = _parse_header(value)
                continue
            for role, keys in value["intents"].items():
                intents[role] += keys
            if value["role"]:
                batches.append(_parse_batch(value, path.name))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(f"{path} is not a journal of schema {SCHEMA}: {error}") from None
    if end < len(content):
        log.info("%s: %d bytes of a torn tail are left out", path, len(content) - end)
    return Journal(path=path, header=header, batches=tuple(batches), intents=intents)


def _parse_header(value: Any) -> Header:
    if value.pop("schema") != SCHEMA:
        raise ValueError("another schema")
    return Header(**value)


def _parse_batch(value: Any, source: str) -> Batch:
    results = tuple(Result(key=key, digest=d, value=v) for key, d, v in value["results"])
    calls, prompt_tokens, completion_tokens = value["tokens"]
    tokens = Tokens(
        calls=calls,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        lost=value.get("lost", 0),
    )
    return Batch(role=value["role"], results=results, tokens=tokens, source=source)


def history(
    journals: Sequence[Journal], is_of_use: Callable[[Sequence[Batch]], bool] = bool
) -> tuple[list[Batch], str]:
    """The batches to replay, and the file whose last batch is the last of them.

    Args:
        journals: All files of a unit.
        is_of_use: Whether a path's batches are worth a replay; the longest that is gets taken.

    Raises:
        CorruptFileError: A file goes on from batches that its parent has lost: damage, not a kill.
    """
    by_name = {journal.path.name: journal for journal in journals if journal.header}
    paths = {name: _path_to(name, by_name) for name in by_name}
    useful = (name for name in paths if is_of_use(paths[name]))
    best = max(useful, key=lambda name: (len(paths[name]), name), default="")
    return (paths[best], best) if best else ([], "")


def _path_to(name: str, by_name: Mapping[str, Journal]) -> list[Batch]:
    batches: list[Batch] = []
    wanted: int | None = None
    while name:
        journal = by_name.get(name)
        header = journal.header if journal else None
        own = list(journal.batches) if journal else []
        base = header.base if header else 0
        if wanted is not None:
            if header is None or base + len(own) < wanted:
                raise CorruptFileError(
                    f"journal {name} is damaged: later files go on from {wanted} batches, it holds "
                    f"{base + len(own)}; remove this unit's files in the journal folder to ask "
                    "its calls again"
                )
            own = own[: max(0, wanted - base)]
        batches = own + batches
        wanted = base if wanted is None else min(base, wanted)
        name = header.parent if header else ""
    return batches


def journal_paths(folder: Path, unit: int | None = None) -> list[Path]:
    """Files of one unit, or of all, in the order of their names."""
    return sorted(folder.glob("unit-*.wal" if unit is None else f"unit-{unit:05d}.*.wal"))


def unit_of(path: Path) -> int:
    """The unit whose file this is."""
    return int(path.name.partition(".")[0].removeprefix("unit-"))


def new_writer_name() -> str:
    """A name no other writer has: host, process and a random token."""
    me = Holder.me()
    return f"{_UNSAFE.sub('-', me.host)}-{me.pid}-{me.token[:12]}"


@dataclass(slots=True)
class JournalWriter:
    """Appends to a new file of its own, which appears with the first commit.

    Args:
        path: The file; it must not exist.
        header: Its first frame.

    Attributes:
        spent: What was asked for through it, as `read_journal` would find it; empty before the
            first commit. The batches themselves aren't kept.
    """

    path: Path
    header: Header
    spent: Expenses = field(init=False, default_factory=dict)
    _descriptor: int | None = None

    def commit(self, batch: Batch | None, intents: Mapping[str, Sequence[str]]) -> None:
        """Make one batch and the intents to send what follows from it durable, by one fsync.

        Args:
            batch: What an engine returned, if anything.
            intents: Keys of the requests about to be sent, by role.

        Raises:
            WorkError: The disk is full or failed; nothing that follows may be sent.
        """
        announced = {role: list(keys) for role, keys in intents.items() if keys}
        value: dict[str, Any] = {"role": "", "intents": announced}
        if batch is not None:
            tokens = batch.tokens
            value |= {
                "role": batch.role,
                "results": batch.results,
                "tokens": [tokens.calls, tokens.prompt_tokens, tokens.completion_tokens],
            }
            if tokens.lost:
                value["lost"] = tokens.lost
        with naming_disk_faults(self.path):
            self._append(frame(value))
        _count(self.spent, self.header.models, batch, announced)

    def _append(self, content: bytes) -> None:
        is_new = self._descriptor is None
        if self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            self._descriptor = os.open(self.path, flags, 0o600)
            names = ("unit", "digest", "models", "parent", "base")
            header = {name: getattr(self.header, name) for name in names}
            content = frame({"schema": SCHEMA, **header}) + content
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fdatasync(self._descriptor)
        if is_new:
            fsync_folder(self.path.parent)

    @property
    def is_there(self) -> bool:
        """Whether the file still has its name; it loses it when another publishes the unit."""
        try:
            return self._descriptor is None or os.fstat(self._descriptor).st_nlink > 0
        except OSError as error:
            if error.errno == errno.ESTALE:  # NFS: another node has removed it
                return False
            raise

    def close(self) -> None:
        """Close the file; it stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
