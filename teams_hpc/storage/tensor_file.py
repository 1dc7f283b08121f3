"""safetensors files that are equal byte for byte where their content is."""

import json


def in_fixed_order(data: bytes) -> bytes:
    """The same safetensors file with its header's metadata sorted.

    safetensors writes metadata in the order of a hash table, which differs between processes; a
    file whose SHA-256 stands in a manifest must not.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text + b" " * (-len(text) % 8)
    return len(padded).to_bytes(8, "little") + padded + data[8 + size :]
