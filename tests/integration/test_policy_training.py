"""The stages `policy` and `select`: kill -9 at any point, and honest numbers."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from teams_hpc.config import Config, dump_yaml, load_config
from teams_hpc.config.schema import TemplateEngineConfig
from teams_hpc.errors import CorruptFileError, SeedError, StopRequested, UsageError
from teams_hpc.llm.base import Score, ScoreRequest
from teams_hpc.llm.ledger import Ledger
from teams_hpc.llm.template_engine import TemplateEngine
from teams_hpc.pipeline.graph import find_stage
from teams_hpc.pipeline.inputs import prepare_stage
from teams_hpc.policy.selection import best_member, select_member
from teams_hpc.policy.training import train_member
from teams_hpc.report.usage import collect_usage
from teams_hpc.rewriting.operation_policy import MlpPolicy
from teams_hpc.runtime.metrics import read_metrics
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.run_dir import RunDir, read_manifest

SMALL = (
    "seeds.limit=60",
    "policy.num_members=1",
    "policy.iterations=6",
    "policy.num_envs=4",
    "policy.episode_length=3",
    "policy.num_bootstrap=200",
    "policy.hidden_size=8",
)

# Runs a stage and kills itself the moment it asks for the nth fsync of the whole process.
KILLED = """
import os, signal, sys
from pathlib import Path
real, left = os.fsync, [int(sys.argv[3])]
def fsync(descriptor):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
from teams_hpc.pipeline.task import run_task
run_task(sys.argv[1], Path(sys.argv[2]), 0)
"""


def make_run(folder: Path, *words: str) -> tuple[RunDir, Config]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text("name: p\n")
    config = load_config(path, [f"run_dir={folder / 'run'}", *SMALL, *words])
    run_dir = RunDir(config.resolved_run_dir)
    prepare_stage(run_dir, config, find_stage(config, "policy"))
    run_dir.config.write_text(dump_yaml(config))
    return run_dir, config


def select(run_dir: RunDir, config: Config) -> dict[str, Any]:
    prepare_stage(run_dir, config, find_stage(config, "select"))
    select_member(run_dir, config, 0, StopFlag())
    manifest = read_manifest(run_dir, "select")
    assert manifest is not None
    return manifest


def run_killed(run_dir: RunDir, stage: str, num_fsyncs: int) -> int:
    return subprocess.run(
        (sys.executable, "-c", KILLED, stage, str(run_dir.root), str(num_fsyncs)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=False,
    ).returncode


def result_of(run_dir: RunDir) -> dict[str, Any]:
    return dict(json.loads((run_dir.member(0) / "result.json").read_text()))


def test_a_member_killed_at_any_write_ends_as_a_quiet_one(tmp_path: Path) -> None:
    quiet, config = make_run(tmp_path / "quiet")
    train_member(quiet, config, 0, StopFlag())
    killed, config = make_run(tmp_path / "killed")
    # After a checkpoint, after the note of an iteration, after metrics but before the checkpoint.
    for num_fsyncs in (21, 12, 14):
        assert run_killed(killed, "policy", num_fsyncs) == -signal.SIGKILL
        # What is there at that moment has no iteration twice.
        iterations = [m["iteration"] for m in read_metrics(killed.member(0) / "metrics.jsonl")]
        assert iterations == list(range(1, len(iterations) + 1))
    train_member(killed, config, 0, StopFlag())
    for name in ("policy.safetensors", "metrics.jsonl"):
        assert (killed.member(0) / name).read_bytes() == (quiet.member(0) / name).read_bytes(), name
    manifests = [read_manifest(run_dir, "policy") for run_dir in (quiet, killed)]
    usage = [Ledger.from_json(manifest.pop("usage")) for manifest in manifests if manifest]
    assert manifests[0] == manifests[1]
    for role in ("instructor", "reviewer"):
        before, after = (ledger.total(role) for ledger in usage)  # type: ignore[arg-type]
        assert (after.calls, after.prompt_tokens) == (before.calls, before.prompt_tokens)
        assert before.in_doubt == 0
        assert after.in_doubt <= 3 * 4 * 3 + (20 if role == "reviewer" else 0)
    assert usage[1].total("instructor").in_doubt > 0
    assert not list(killed.member(0).glob(".*.tmp"))


def test_a_stopped_member_goes_on_with_the_same_numbers(tmp_path: Path) -> None:
    quiet, config = make_run(tmp_path / "quiet")
    train_member(quiet, config, 0, StopFlag())
    stopped, config = make_run(tmp_path / "stopped")

    class StopsAfterTwo(StopFlag):
        def raise_if_set(self, progress: str) -> None:
            if progress.startswith("2 of 6"):
                raise StopRequested(progress)

    with pytest.raises(StopRequested, match="2 of 6 iterations"):
        train_member(stopped, config, 0, StopsAfterTwo())
    assert read_manifest(stopped, "policy") is None
    train_member(stopped, config, 0, StopFlag())
    assert result_of(stopped) == result_of(quiet)
    before = (stopped.member(0) / "state.safetensors").stat().st_mtime_ns
    train_member(stopped, config, 0, StopFlag())
    assert (stopped.member(0) / "state.safetensors").stat().st_mtime_ns == before


def test_a_killed_selection_says_what_a_quiet_one_says(tmp_path: Path) -> None:
    quiet, config = make_run(tmp_path / "quiet", "policy.iterations=1")
    train_member(quiet, config, 0, StopFlag())
    killed, config = make_run(tmp_path / "killed", "policy.iterations=1")
    train_member(killed, config, 0, StopFlag())
    first = select(quiet, config)
    prepare_stage(killed, config, find_stage(config, "select"))
    assert run_killed(killed, "select", 9) == -signal.SIGKILL
    so_far = collect_usage(killed)["select"].total("instructor").calls
    assert 0 < so_far < collect_usage(quiet)["select"].total("instructor").calls
    second = select(killed, config)
    killed.manifest("select").unlink()
    assert collect_usage(killed)["select"].to_json() == second["usage"]
    before, after = Ledger.from_json(first.pop("usage")), Ledger.from_json(second.pop("usage"))
    assert first == second
    assert before.total("instructor").calls == after.total("instructor").calls
    assert before.total("instructor").in_doubt == 0 < after.total("instructor").in_doubt
    assert killed.selected_policy.read_bytes() == quiet.selected_policy.read_bytes()


def test_members_learn_and_the_chosen_one_beats_both_baselines(tmp_path: Path) -> None:
    words = ("policy.num_envs=32", "policy.episode_length=6", "policy.hidden_size=64")
    run_dir, config = make_run(
        tmp_path, *words, "seeds.limit=null", "policy.iterations=40", "policy.num_members=2"
    )
    for index in (1, 0):
        assert read_manifest(run_dir, "policy") is None
        train_member(run_dir, config, index, StopFlag())
    trained = read_manifest(run_dir, "policy")
    assert trained is not None
    finals = [member["mean_reward_final"] for member in trained["members"]]
    assert finals[0] != finals[1]
    assert min(finals) > 0.65 > max(member["mean_reward_first"] for member in trained["members"])
    manifest = select(run_dir, config)
    scores = [member["score"] for member in manifest["select"]["members"]]
    assert manifest["chosen"] == best_member(scores)
    policy = MlpPolicy.load(run_dir.selected_policy)
    assert policy.metadata == {"observation": "features", "member": str(manifest["chosen"])}
    report = manifest["report"]
    assert report["num_seeds"] > 20
    for name, difference in report["differences"].items():
        assert difference["is_better"], (name, difference)
    mix = report["policies"]["round_robin"]["operations_by_step"]
    episodes = report["num_seeds"] * report["num_episodes"]
    assert mix == [[episodes * (step == code) for code in range(6)] for step in range(6)]
    assert manifest["sanity_accuracy"] == 1.0


class Undecided(TemplateEngine):
    """The grammar, whose reviewer finds everything Not Equal alike, and judges badly so."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        return [Score(log_probabilities=(-9.0, -0.0), prompt_tokens=1) for _ in requests]


@pytest.mark.parametrize("seed", [543, 1, 2])
def test_where_reward_is_constant_nothing_is_better_and_it_says_why(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(*configs: object) -> list[TemplateEngine]:
        return [Undecided(TemplateEngineConfig())] * 2

    monkeypatch.setattr("teams_hpc.policy.setting.load_engines", load)
    # No rewrite is worth nothing: the grammar copies a prompt now and then, so that is allowed.
    monkeypatch.setattr("teams_hpc.rewriting.reviewer.copies_prompt", lambda text, parent: False)
    run_dir, config = make_run(tmp_path, f"seed={seed}")
    with caplog.at_level(logging.WARNING):
        train_member(run_dir, config, 0, StopFlag())
        manifest = select(run_dir, config)
    for difference in manifest["report"]["differences"].values():
        assert not difference["is_better"]
    assert manifest["saturated_share"] == 1.0
    assert manifest["sanity_accuracy"] == 0.5
    assert sum("rewards hardly grade" in message for message in caplog.messages) == 1
    assert sum("of plain cases right" in message for message in caplog.messages) == 2


def test_empty_splits_are_said_to_be_empty(tmp_path: Path) -> None:
    shares = ("train_share=1.0", "select_share=0.0", "report_share=0.0")
    words = (*(f"seeds.policy_{share}" for share in shares), "seeds.sft_held_out_share=0.0")
    run_dir, config = make_run(tmp_path / "a", *words, "policy.iterations=1")
    train_member(run_dir, config, 0, StopFlag())
    manifest = select(run_dir, config)
    assert manifest["select"]["split"] == "policy_train"
    assert manifest["select"]["note"]
    assert manifest["report"]["policies"] == {}
    assert manifest["report"]["note"] == "not measurable (n=0)"
    words = (words[0].replace("1.0", "0.0"), *words[1:3], "seeds.sft_held_out_share=1.0")
    run_dir, config = make_run(tmp_path / "b", *words)
    with pytest.raises(SeedError, match="policy_train"):
        train_member(run_dir, config, 0, StopFlag())


def test_wrong_use_and_damage_are_named(tmp_path: Path) -> None:
    run_dir, config = make_run(tmp_path, "policy.iterations=1")
    with pytest.raises(UsageError, match="policy member 1 doesn't exist"):
        train_member(run_dir, config, 1, StopFlag())
    train_member(run_dir, config, 0, StopFlag())
    (run_dir.member(0) / "result.json").unlink()
    run_dir.manifest("policy").unlink()
    state = run_dir.member(0) / "state.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:100])
    with pytest.raises(CorruptFileError, match="rerun-from policy"):
        train_member(run_dir, config, 0, StopFlag())
    state.write_bytes(whole)
    (run_dir.member(0) / "metrics.jsonl").write_text("")
    with pytest.raises(CorruptFileError, match="0 lines, but 1 iterations"):
        train_member(run_dir, config, 0, StopFlag())


def test_of_equal_members_the_first_is_chosen() -> None:
    assert best_member([0.2, 0.5, 0.5]) == 1
