"""Policies that look through the instructor's hidden states: trained, chosen, and generating."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from teams_hpc.config import Config, dump_yaml, load_config, load_resolved
from teams_hpc.errors import CorruptFileError, InputChangedError, UsageError
from teams_hpc.generation.guide import Guide
from teams_hpc.generation.worker import generate
from teams_hpc.pipeline.graph import find_stage
from teams_hpc.pipeline.inputs import check_unchanged, prepare_stage
from teams_hpc.policy.selection import select_member
from teams_hpc.policy.training import train_member
from teams_hpc.rewriting.operation_policy import MlpPolicy
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.run_dir import RunDir, read_manifest
from teams_hpc.storage.shards import Table

VARIANTS = (
    "[{name: features}, {name: one-hot, observation: one_hot}, "
    "{name: embedding, observation: embedding, embedding_size: 8, target_kl: 0.05}]"
)


def make_run(folder: Path, llama: Path, *words: str) -> tuple[RunDir, Config]:
    """A run whose instructor is a small model; the grammar judges and is the expert."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text("name: e\n")
    settings = (
        f"run_dir={folder / 'run'}",
        "seeds.limit=40",
        "instructor.kind=transformers",
        f"instructor.model={llama}",
        "instructor.dtype=float32",
        "instructor.device=cpu",
        "instructor.batching=fixed",
        "instructor.threads=1",
        "instructor.max_tokens=4",
        "policy.num_members=2",
        f"policy.variants={VARIANTS}",
        "policy.iterations=1",
        "policy.num_envs=4",
        "policy.episode_length=2",
        "policy.hidden_size=8",
        "policy.num_eval_episodes=1",
        "policy.num_bootstrap=100",
        "generate.num_steps=3",
        *words,
    )
    config = load_config(path, settings)
    run_dir = RunDir(config.resolved_run_dir)
    prepare_stage(run_dir, config, find_stage(config, "policy"))
    run_dir.config.write_text(dump_yaml(config))
    return run_dir, config


@pytest.fixture(scope="module")
def selected(tiny_llama_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Members of three variants trained, and one chosen."""
    run_dir, config = make_run(tmp_path_factory.mktemp("embedding"), tiny_llama_chat)
    for index in range(6):
        assert read_manifest(run_dir, "policy") is None
        train_member(run_dir, config, index, StopFlag())
    prepare_stage(run_dir, config, find_stage(config, "select"))
    select_member(run_dir, config, 0, StopFlag())
    return run_dir


def test_every_variant_is_trained_and_compared(selected: RunDir) -> None:
    config = load_resolved(selected.config)
    names = ["features", "features", "one-hot", "one-hot", "embedding", "embedding"]
    trained, chosen = (read_manifest(selected, stage) for stage in ("policy", "select"))
    assert trained is not None
    assert chosen is not None
    assert [member["variant"] for member in trained["members"]] == names
    assert [member["variant"] for member in chosen["select"]["members"]] == names
    policies = [MlpPolicy.load(selected.member(i) / "policy.safetensors") for i in range(6)]
    kinds = [policy.observation_kind for policy in policies]
    assert kinds == [name.replace("-", "_") for name in names]
    assert policies[4].weights["hidden_0.weight"].shape == (8, 19 + 8)
    assert policies[4].metadata["embedding_size"] == "8"
    with pytest.raises(UsageError, match=r"member 6 .* each of 3 policy\.variants, .* last is 5"):
        train_member(selected, config, 6, StopFlag())
    with pytest.raises(InputChangedError, match=r"policy\.variants"):
        check_unchanged(selected, config.model_copy(update={"policy": without_variants(config)}))


def without_variants(config: Config) -> Any:
    return config.policy.model_copy(update={"variants": ()})


def generated(selected: RunDir, folder: Path, llama: Path, *words: str) -> list[tuple[Any, ...]]:
    """What the embedding's member chose for each record."""
    run_dir, config = make_run(folder, llama, *words)
    run_dir.selected_policy.parent.mkdir()
    shutil.copy(selected.member(4) / "policy.safetensors", run_dir.selected_policy)
    (run_dir.stage_dir("select") / "manifest.json").write_bytes(
        selected.manifest("select").read_bytes()
    )
    prepare_stage(run_dir, config, find_stage(config, "generate"))
    generate(run_dir, config, 0, StopFlag())
    found = []
    for path in sorted(run_dir.shards.glob("*.h5")):
        with Table.open(path) as rows:
            columns = rows.read(
                0, rows.num_rows, ["record_id", "operation", "instruction", "policy_member"]
            )
        found += list(zip(*columns.values(), strict=True))
    return found


def test_generation_sees_what_training_saw_however_it_is_divided(
    selected: RunDir, tmp_path: Path, tiny_llama_chat: Path
) -> None:
    some, other = (
        generated(selected, tmp_path / size, tiny_llama_chat, f"generate.unit_size={size}")
        for size in ("3", "40")
    )
    assert some == other
    assert len(some) == 40 * 3
    assert {row[-1] for row in some} == {4}
    assert len({row[1] for row in some}) > 1


@pytest.mark.parametrize(("batching", "expected"), [("fixed", "exact"), ("refill", "statistical")])
def test_rows_are_as_exact_as_the_eyes_that_chose_their_operations(
    selected: RunDir, tmp_path: Path, tiny_llama_chat: Path, batching: str, expected: str
) -> None:
    generated(selected, tmp_path, tiny_llama_chat, f"instructor.batching={batching}")
    manifest = read_manifest(RunDir(tmp_path / "run"), "generate")
    assert manifest is not None
    assert manifest["exactness"] == manifest["engines"]["instructor"]["exactness"] == expected
    assert manifest["engines"]["expert"]["exactness"] == "exact"


def test_another_instructor_is_refused(
    selected: RunDir, tmp_path: Path, tiny_llama_chat: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_chat, other)
    (other / "generation_config.json").write_text('{"eos_token_id": 1, "max_length": 99}')
    with pytest.raises(InputChangedError, match=r"through the model .* but instructor\.model "):
        generated(selected, tmp_path / "a", other)
    run_dir, config = make_run(tmp_path / "b", tiny_llama_chat)
    run_dir.selected_policy.parent.mkdir()
    shutil.copy(selected.member(4) / "policy.safetensors", run_dir.selected_policy)
    update = {"instructor": config.expert, "policy": without_variants(config)}
    with pytest.raises(InputChangedError, match=r"instructor\.kind is template; .*--rerun-from"):
        Guide.load(run_dir, config.model_copy(update=update))


def test_a_policy_that_does_not_say_what_it_looked_at_is_damaged(
    selected: RunDir, tmp_path: Path
) -> None:
    policy = MlpPolicy.load(selected.member(4) / "policy.safetensors")
    for missing in ("embedding_size", "embedding_schema"):
        metadata = {key: value for key, value in policy.metadata.items() if key != missing}
        MlpPolicy(weights=policy.weights, metadata=metadata).save(tmp_path / missing)
        with pytest.raises(CorruptFileError, match=r"takes embeddings of .* unknown"):
            MlpPolicy.load(tmp_path / missing)
