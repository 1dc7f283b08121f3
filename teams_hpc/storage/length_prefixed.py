"""Pieces of bytes as one, so that no other pieces give the same."""

import struct
from collections.abc import Iterable

_length = struct.Struct("<Q").pack


def joined(pieces: Iterable[bytes]) -> bytes:
    """The pieces one after the other, each after its length (8 bytes, little-endian)."""
    return b"".join([_length(len(piece)) + piece for piece in pieces])
