"""Let a program that was linked against glibc 2.38 load on an older one, where that is safe.

Since 2.38 a compiler turns strtol and its kind into __isoc23_strtol@GLIBC_2.38, which reads binary
literals too and is the same otherwise. Here such a reference becomes strtol@GLIBC_2.2.5 again. A
program that takes anything else from 2.38 or later is refused.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PREFIX = b"__isoc23_"
NEW, OLD = b"GLIBC_2.38", b"GLIBC_2.2.5"
DYNSYM, VERNEED, VERSYM = 11, 0x6FFFFFFE, 0x6FFFFFFF  # SHT_DYNSYM, SHT_GNU_verneed, SHT_GNU_versym
SYMBOL_SIZE = 24


class NotSafeError(RuntimeError):
    """The program needs more of a newer glibc."""


@dataclass(frozen=True, slots=True)
class _Need:
    """A version that a program needs of libc: where its record stands, and what it holds."""

    at: int
    hash: int
    index: int
    name_at: int
    name: bytes


class _Elf:
    """The parts of a 64-bit little-endian ELF file that matter here."""

    def __init__(self, data: bytearray) -> None:
        if data[:6] != b"\x7fELF\x02\x01":
            raise NotSafeError("no 64-bit little-endian ELF file")
        self.data = data
        [start] = struct.unpack_from("<Q", data, 0x28)
        size, count, _ = struct.unpack_from("<HHH", data, 0x3A)
        # type, offset, size, link of each section
        self.sections = []
        for number in range(count):
            _, kind, _, _, offset, length, link = struct.unpack_from(
                "<IIQQQQI", data, start + number * size
            )
            self.sections.append((kind, offset, length, link))

    def section(self, kind: int) -> tuple[int, int, int]:
        """Offset, size and linked section of the one section of this type."""
        return next((o, n, link) for k, o, n, link in self.sections if k == kind)

    def text(self, at: int) -> bytes:
        return bytes(self.data[at : self.data.index(b"\0", at)])

    def symbols(self) -> Iterator[tuple[int, bytes, int]]:
        """Where each dynamic symbol stands, its name, the index of its version."""
        offset, size, link = self.section(DYNSYM)
        versions, names = self.section(VERSYM)[0], self.sections[link][1]
        for number in range(size // SYMBOL_SIZE):
            at = offset + number * SYMBOL_SIZE
            [name_at] = struct.unpack_from("<I", self.data, at)
            [version] = struct.unpack_from("<H", self.data, versions + 2 * number)
            yield at, self.text(names + name_at), version & 0x7FFF

    def needs_of_libc(self) -> Iterator[_Need]:
        at, _, link = self.section(VERNEED)
        names = self.sections[link][1]
        while True:
            _, count, file_at, first, following = struct.unpack_from("<HHIII", self.data, at)
            if self.text(names + file_at) == b"libc.so.6":
                entry = at + first
                for _ in range(count):
                    code, _, index, name_at, further = struct.unpack_from(
                        "<IHHII", self.data, entry
                    )
                    yield _Need(entry, code, index, name_at, self.text(names + name_at))
                    entry += further
            if not following:
                return
            at += following


def reach_back(path: Path) -> int:
    """Change the program at `path`; the number of references that now reach an older glibc.

    Raises:
        NotSafeError: It takes something from glibc 2.38, or later, that has no older name.
    """
    elf = _Elf(bytearray(path.read_bytes()))
    needs = list(elf.needs_of_libc())
    late = [need.name for need in needs if _number(need.name) > _number(NEW)]
    if late:
        raise NotSafeError(f"{path.name} needs {b', '.join(late).decode()}")
    of_new = {need.index for need in needs if need.name == NEW}
    changed = 0
    for at, name, version in elf.symbols():
        if version not in of_new:
            continue
        if not name.startswith(PREFIX):
            raise NotSafeError(f"{path.name} needs {name.decode()} of {NEW.decode()}")
        # The old name is the end of the new one, so its text is in the file already.
        [name_at] = struct.unpack_from("<I", elf.data, at)
        struct.pack_into("<I", elf.data, at, name_at + len(PREFIX))
        changed += 1
    old = next(need for need in needs if need.name == OLD)
    for need in needs:
        if need.name == NEW:
            struct.pack_into("<I", elf.data, need.at, old.hash)
            struct.pack_into("<I", elf.data, need.at + 8, old.name_at)
    path.write_bytes(elf.data)
    return changed


def _number(version: bytes) -> tuple[int, ...]:
    """GLIBC_2.38 as (2, 38); names without a number, such as GLIBC_PRIVATE, as ()."""
    digits = version.removeprefix(b"GLIBC_").split(b".")
    return tuple(map(int, digits)) if all(part.isdigit() for part in digits) else ()
