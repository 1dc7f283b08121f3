"""Two generations side by side: right counts, equal calls, honest intervals, and a page."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from teams_hpc.cli import app
from teams_hpc.config import Config, dump_yaml, load_config, load_resolved
from teams_hpc.errors import UsageError
from teams_hpc.evaluation import comparison
from teams_hpc.evaluation.comparison import compare_generations
from teams_hpc.generation.worker import generate
from teams_hpc.pipeline.graph import find_stage
from teams_hpc.pipeline.inputs import prepare_stage
from teams_hpc.report import policy_section
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.run_dir import RunDir, read_manifest
from teams_hpc.storage.shards import Finish, Status, Table

Runs = dict[str, RunDir]


def generated(folder: Path, name: str, *words: str) -> RunDir:
    path = folder / f"{name}.yaml"
    path.write_text("name: c\n")
    config: Config = load_config(
        path, [f"run_dir={folder / name}", "seeds.limit=50", "generate.num_steps=3", *words]
    )
    run_dir = RunDir(config.resolved_run_dir)
    prepare_stage(run_dir, config, find_stage(config, "generate"))
    run_dir.config.write_text(dump_yaml(config))
    generate(run_dir, config, 0, StopFlag())
    return run_dir


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("comparison")
    return {
        name: generated(folder, name, f"generate.policy={name}")
        for name in ("uniform", "round_robin")
    }


def compared(ours: RunDir, other: RunDir, seed: int = 1) -> dict[str, Any]:
    return compare_generations(ours, other, num_bootstrap=300, seed=seed)


def test_counts_are_those_of_manifests_and_rows(runs: Runs) -> None:
    found = compared(runs["round_robin"], runs["uniform"])
    assert found["policies"] == ["round_robin", "uniform"]
    assert found["num_seeds"] == 50
    for place, name in enumerate(("round_robin", "uniform")):
        manifest = read_manifest(runs[name], "generate")
        assert manifest is not None
        counts = manifest["counts"]
        assert found["kept"][place] == counts["kept"]
        assert found["attempted"][place] == counts["attempted"] == 150
        asked = {row["role"]: row["calls"] for row in manifest["usage"]}
        assert found["expert_calls"][place] == asked["expert"]
        side = ("ours", "other")[place]
        measures = found["measures"]
        rate = measures["kept rows for 100 expert calls"][side]["value"]
        assert rate == pytest.approx(100 * counts["kept"] / asked["expert"])
        shares = [m[side]["value"] for key, m in measures.items() if key.endswith("% of steps")]
        assert sum(shares) == pytest.approx(100)
        equal = measures["equal, % of steps"][side]["value"]
        assert equal == pytest.approx(100 * counts["eliminated"]["equal"] / 150)


def test_a_run_against_itself_differs_in_nothing_and_sides_mirror_each_other(runs: Runs) -> None:
    same = compared(runs["uniform"], runs["uniform"])
    for name, measure in same["measures"].items():
        assert list(measure["difference"].values()) == pytest.approx([0, 0, 0], abs=1e-12), name
        assert measure["ours"] == measure["other"]
        assert measure["ours"]["low"] <= measure["ours"]["value"] <= measure["ours"]["high"], name
    one, other = compared(*runs.values()), compared(*list(runs.values())[::-1])
    for name, measure in one["measures"].items():
        mirrored = other["measures"][name]
        assert measure["ours"] == mirrored["other"]
        assert measure["difference"]["value"] == pytest.approx(-mirrored["difference"]["value"])
        assert measure["difference"]["low"] == pytest.approx(-mirrored["difference"]["high"])


def test_round_robin_keeps_more_and_the_interval_says_so(runs: Runs) -> None:
    """Three operations in a row, all different, are fruitful more often than three at random."""
    kept = compared(runs["round_robin"], runs["uniform"])["measures"]["kept, % of steps"]
    assert kept["difference"]["low"] > 0


def test_diversity_is_of_texts_that_equally_many_calls_made(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    paid: list[tuple[int, int]] = []
    real = comparison._Texts.measure

    def measure(texts: Any, chains: Any, budget: int) -> dict[str, float]:
        left, used = budget, 0
        for chain in chains:
            left -= texts._calls[chain]
            if left < 0:
                break
            used += texts._calls[chain]
        paid.append((budget, used))
        return real(texts, chains, budget)

    monkeypatch.setattr(comparison._Texts, "measure", measure)
    monkeypatch.setattr(comparison, "_HALVES", 5)
    compared(runs["round_robin"], runs["uniform"])
    assert len(paid) == 12
    for (budget, used), (same, others) in zip(paid[::2], paid[1::2], strict=True):
        assert budget == same
        assert max(used, others) == budget
        assert budget - min(used, others) < 6  # less than a chain's calls are left


def test_measures_of_texts_are_those_of_their_definition(runs: Runs) -> None:
    rows = comparison._Rows.read(runs["uniform"])
    chains = list(rows.attempted)
    texts = comparison._Texts(rows, chains, None)
    found = texts.measure(chains, 10**9)
    kept = [text for chain in chains for text in rows.texts[chain]]
    with_tables = []
    for path in sorted(runs["uniform"].shards.glob("*.h5")):
        with Table.open(path) as table:
            columns = table.read(0, table.num_rows, ["instruction", "status", "answer_finish"])
        with_tables += [
            text
            for text, status, finish in zip(*columns.values(), strict=True)
            if status == Status.KEPT and finish != Finish.NONE
        ]
    assert kept == with_tables
    from teams_hpc.evaluation.diversity import distinct_n, self_similarity

    for n in (1, 2, 3):
        assert found[f"distinct-{n}"] == pytest.approx(distinct_n(kept, n))
    assert len(kept) < 400
    assert found["self-similarity"] == pytest.approx(self_similarity(kept))


def test_the_spread_of_hidden_states_is_a_mean_cosine_distance(runs: Runs) -> None:
    class Eyes:
        content_id = "eyes"

        def embed(self, texts: list[str]) -> Any:
            return np.array([[1.0, len(text) % 7, len(text) % 3] for text in texts], np.float32)

    found = compare_generations(
        runs["uniform"],
        runs["round_robin"],
        num_bootstrap=100,
        seed=1,
        eyes=Eyes(),  # type: ignore[arg-type]
    )
    assert found["eyes"] == "eyes"
    assert 0.0 < found["measures"]["embedding spread"]["ours"]["value"] < 1.0


def test_runs_that_differ_in_more_than_the_policy_are_not_compared(
    runs: Runs, tmp_path: Path
) -> None:
    other = generated(tmp_path, "other", "generate.policy=uniform", "seed=9")
    with pytest.raises(UsageError, match=r"can't be compared: seed differs"):
        compared(runs["uniform"], other)
    runs["uniform"].manifest("generate").rename(tmp_path / "manifest.json")
    try:
        with pytest.raises(UsageError, match="isn't done; run it first"):
            compared(runs["round_robin"], runs["uniform"])
    finally:
        (tmp_path / "manifest.json").rename(runs["uniform"].manifest("generate"))


def test_the_report_shows_it_once_it_was_asked_for(runs: Runs) -> None:
    ours, other = runs["round_robin"], runs["uniform"]
    again = CliRunner().invoke(app, ["report", str(ours.root)])
    assert again.exit_code == 0, again.output
    assert "round-robin against uniform" not in ours.report.read_text()
    asked = CliRunner().invoke(app, ["report", str(ours.root), "--against", str(other.root)])
    assert asked.exit_code == 0, asked.output
    page = ours.report.read_text()
    assert "Generation: round-robin against uniform" in page
    assert "kept rows for 100 expert calls" in page
    assert "rule 1: the reviewer says Equal, % of steps" in page
    assert CliRunner().invoke(app, ["report", str(ours.root)]).exit_code == 0
    assert ours.report.read_text() == page
    assert load_resolved(ours.config).generate.policy == "round_robin"


def test_without_a_comparison_there_is_no_section() -> None:
    assert policy_section.generations_section({}) == ""
