"""Pieces of bytes as one, so that no other pieces give the same."""

import struct
from collections.abc import Collection
from itertools import chain

_LENGTH = struct.Struct("<Q")


def joined(pieces: Collection[bytes]) -> bytes:
    """The pieces one after the other, each after its length (8 bytes, little-endian)."""
    lengths = map(_LENGTH.pack, map(len, pieces))
    return b"".join(chain.from_iterable(zip(lengths, pieces, strict=True)))
