"""Names and random numbers that depend on what a record is, never on when or where it was made.

A record's id is a hash over the length-prefixed tuple that makes it; its random numbers come from
a counter-based function of that id and a purpose.
"""

import hashlib
from collections.abc import Iterable

from teams_hpc.storage.length_prefixed import joined

_TWO_53 = float(1 << 53)


def length_prefixed(parts: Iterable[str | int]) -> bytes:
    """The parts as bytes that no other parts give, each after its length."""
    return joined([str(part).encode("utf-8", "surrogatepass") for part in parts])


def _digest(parts: tuple[str | int, ...], size: int) -> bytes:
    return hashlib.blake2b(length_prefixed(parts), digest_size=size).digest()


def seed_id(instruction: str, input_text: str) -> str:
    """Identity of a seed: 32 hexadecimal digits over instruction and input."""
    return _digest((instruction, input_text), 16).hex()


def record_id(run_seed: int, instruction: str, input_text: str, trajectory: int, step: int) -> str:
    """Identity of one attempted step: 32 hexadecimal digits.

    `instruction` and `input_text` are the seed's, so the id is known before any call is made.
    """
    return _digest((run_seed, instruction, input_text, trajectory, step), 16).hex()


def keyed_seed(*key: str | int) -> int:
    """A 63-bit seed that is a function of `key` (ids and a purpose) alone."""
    return int.from_bytes(_digest(key, 8), "little") >> 1


def keyed_uniform(*key: str | int) -> float:
    """A uniform number in [0, 1) that is a function of `key` alone."""
    return (int.from_bytes(_digest(key, 8), "little") >> 11) / _TWO_53
