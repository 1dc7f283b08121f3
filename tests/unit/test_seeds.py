"""Reading seeds: every format, every fault, and the seeds that ship."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teams_hpc.errors import SeedError
from teams_hpc.rewriting.near_duplicates import cluster
from teams_hpc.rewriting.seeds import SHIPPED_SEEDS, Seed, SeedSet, read_seeds

PAIR = (Seed("Name a river.", "", "The Rhine"), Seed("Sum up.", "One. Two.", "Both"))
ALPACA = [
    {"instruction": "Name a river.", "input": "", "output": "The Rhine"},
    {"instruction": "Sum up.", "input": "One. Two.", "output": "Both", "topic": "any"},
]
SELF_INSTRUCT = [
    {
        "id": "t0",
        "instruction": "Name a river.",
        "instances": [{"input": "<noinput>", "output": "The Rhine"}],
    },
    {
        "id": "t1",
        "instruction": "Sum up.",
        "instances": [{"input": "One. Two.", "output": "Both"}, {"input": "Three.", "output": "3"}],
    },
]


def read(folder: Path, data: str | bytes, name: str = "seeds", limit: int | None = None) -> SeedSet:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return read_seeds(path, limit)


def as_lines(records: list[dict[str, object]]) -> str:
    return "\n".join(json.dumps(record) for record in records)


@pytest.mark.parametrize("name", ["seeds", "seeds.txt", "seeds.json", "seeds.jsonl"])
@pytest.mark.parametrize("records", [ALPACA, SELF_INSTRUCT], ids=["alpaca", "self_instruct"])
def test_records_read_alike_from_any_json_under_any_name(
    tmp_path: Path, name: str, records: list[dict[str, object]]
) -> None:
    for text in (
        json.dumps(records),
        json.dumps(records, indent=2),
        as_lines(records),
        "\ufeff" + as_lines(records).replace("\n", "\r\n\r\n"),
    ):
        assert read(tmp_path, text, name).seeds == PAIR


@pytest.mark.parametrize(
    ("text", "instructions"),
    [
        ('["Name a river.", "Sum up."]', ["Name a river.", "Sum up."]),
        ('"Name a river."\n"Sum up."', ["Name a river.", "Sum up."]),
        ("\ufeffName a river.\r\n\r\n  Sum up.  \r", ["Name a river.", "Sum up."]),
        ('"To be" - who\nwrote it?', ['"To be" - who', "wrote it?"]),
        ("[1] Name a river.\n{x} Sum up.", ["[1] Name a river.", "{x} Sum up."]),
        ('{\n "instruction": "Sum up."\n}', ["Sum up."]),
        ('{"instruction": "a\u2028b"}\n{"instruction": "c\\nd"}', ["a\u2028b", "c\nd"]),
        ('[{"instruction": "Sum up.", "input": null, "instances": []}]', ["Sum up."]),
    ],
)
def test_strings_and_plain_text(tmp_path: Path, text: str, instructions: list[str]) -> None:
    seeds = read(tmp_path, text).seeds
    assert [seed.instruction for seed in seeds] == instructions
    assert {seed.input for seed in seeds} == {""}


@given(
    texts=st.lists(st.sampled_from(["caf\u00e9", "cafe\u0301", " caf\u00e9\t", "tea", "Tea"])),
    limit=st.none() | st.integers(1, 4),
)
def test_exact_duplicates_go_and_counts_balance(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], limit: int | None
) -> None:
    texts = ["first", *texts]
    seed_set = read(tmp_path_factory.mktemp("seeds"), json.dumps(texts), limit=limit)
    names = {"caf\u00e9": "caf\u00e9", "cafe\u0301": "caf\u00e9", " caf\u00e9\t": "caf\u00e9"}
    distinct = list(dict.fromkeys(names.get(text, text) for text in texts))
    assert [seed.instruction for seed in seed_set.seeds] == distinct[:limit]
    assert seed_set.num_read == len(texts)
    assert seed_set.num_duplicates == len(texts) - len(distinct)


def test_an_input_belongs_to_its_instruction(tmp_path: Path) -> None:
    records = [{"instruction": "Sum up.", "input": text} for text in ("a", "b", "a ")]
    seed_set = read(tmp_path, json.dumps(records))
    assert [seed.input for seed in seed_set.seeds] == ["a", "b"]
    assert seed_set.num_duplicates == 1
    assert len({seed.id for seed in seed_set.seeds}) == 2


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.json", b"", "is empty"),
        ("a.txt", b"\xef\xbb\xbf \n\t\n", "only blank lines"),
        ("a.json", b"[]", "holds no seeds"),
        ("a.txt", b"one\ntwo \xe9\n", "line 2: not valid UTF-8"),
        ("a.txt", "one".encode("utf-16"), "line 1: not valid UTF-8"),
        ("a.txt", "one".encode("utf-16-le"), "line 1: instruction holds a NUL"),
        ("a.jsonl", b'{"instruction": "x"}\n\n{"instruction": \n', "line 3: not valid JSON"),
        ("a", b'{"instruction": "x"', "line 1: not valid JSON"),
        ("a.json", b'["x",\n "y"\n "z"]', "line 3: not valid JSON"),
        ("a.json", b"Name a river.", "plain text belongs in a .txt file"),
        ("a.json", b"[" * 100_000, "not a usable JSON list"),
        ("a.json", b'["x", 7]', "item 2: a number, not a record"),
        ("a.jsonl", b'"x"\nnull', "line 2: null, not a record"),
        ("a.json", b'["x", {"prompt": "y"}]', r"item 2: no instruction \(its keys: prompt\)"),
        ("a.json", b'[{"instruction": "\\u200b "}]', "item 1: the instruction is blank"),
        ("a.json", b'[{"instruction": ["x"]}]', "item 1: instruction is a list"),
        ("a.json", b'[{"instruction": "x", "input": 3}]', "item 1: input is a number"),
        ("a.json", b'[{"instruction": "x", "instances": {}}]', "item 1: instances must be a list"),
        ("a.json", b'["\\ud83d"]', "half a surrogate pair"),
    ],
)
def test_a_fault_is_named_with_its_place(
    tmp_path: Path, name: str, data: bytes, expected: str
) -> None:
    with pytest.raises(SeedError, match=expected) as caught:
        read(tmp_path, data, name)
    message = str(caught.value)
    assert str(tmp_path / name) in message
    assert "\n" not in message


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SeedError, match=r"no seed file .*nowhere"):
        read_seeds(tmp_path / "nowhere", None)
    with pytest.raises(SeedError, match="is a folder"):
        read_seeds(tmp_path, None)


def test_shipped_seeds_are_varied_and_none_is_nearly_another() -> None:
    seed_set = read_seeds(None, None)
    seeds = seed_set.seeds
    assert len(seeds) >= 190
    assert seed_set.num_duplicates == 0
    instructions = [seed.instruction for seed in seeds]
    assert len(set(cluster(instructions, 0.7))) == len(seeds)
    assert instructions.count("Explain the process of photosynthesis.") == 1
    assert sum("photosynthesis" in text for text in instructions) == 1
    lengths = [len(text.split()) for text in instructions]
    assert min(lengths) >= 5
    assert 40 < max(lengths) <= 60
    assert 0.3 < sum(bool(seed.input) for seed in seeds) / len(seeds) < 0.4

    records = [json.loads(line) for line in SHIPPED_SEEDS.read_text("utf-8").splitlines()]
    assert len({record["kind"] for record in records}) >= 12
    assert len({record["domain"] for record in records}) >= 20
    assert max(Counter(record["kind"] for record in records[:24]).values()) <= 6


def test_reading_seeds_needs_the_standard_library_alone() -> None:
    program = (
        "import sys; from teams_hpc.rewriting.seeds import read_seeds; read_seeds(None, 3); "
        "print(sorted({'numpy', 'torch', 'pydantic', 'rensa'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
