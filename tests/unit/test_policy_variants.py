"""Variants crossed with seeds: which member is what, everywhere, and what old runs see of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from teams_hpc.config import Config, load_config
from teams_hpc.config.digest import stage_inputs
from teams_hpc.config.policy import PolicyConfig, PolicyVariant
from teams_hpc.errors import ConfigError
from teams_hpc.pipeline.graph import find_stage
from teams_hpc.pipeline.local import stage_tasks
from teams_hpc.pipeline.submit import all_indices
from teams_hpc.report.call_forecast import list_asks
from teams_hpc.storage.run_dir import RunDir

VARIANTS = (
    PolicyVariant(name="plain"),
    PolicyVariant(name="bare", observation="one_hot", target_kl=0.05),
    PolicyVariant(name="other", seed=7, critic_learning_rate=0.01),
)


def test_without_variants_members_are_what_they_always_were() -> None:
    policy = PolicyConfig(num_members=3)
    assert policy.num_tasks == 3
    for index in range(3):
        member = policy.member(index)
        assert (member.variant, member.number, member.seed) == ("", index, None)
        assert member.settings is policy


def test_each_variant_has_the_same_seeds_and_only_its_own_settings() -> None:
    policy = PolicyConfig(num_members=2, variants=VARIANTS)
    assert policy.num_tasks == 6
    members = [policy.member(index) for index in range(6)]
    assert [member.variant for member in members] == [v.name for v in VARIANTS for _ in range(2)]
    assert [member.number for member in members] == [0, 1] * 3
    assert [member.seed for member in members] == [None] * 4 + [7] * 2
    plain, bare, other = (members[index].settings for index in (0, 2, 4))
    assert plain == policy.model_copy(update={"variants": ()})
    assert (bare.observation, bare.target_kl) == ("one_hot", 0.05)
    assert bare.critic_learning_rate == policy.critic_learning_rate
    assert other.critic_learning_rate == 0.01
    assert other.observation == "features"
    assert bare.num_envs == policy.num_envs


def test_every_part_of_the_suite_sees_as_many_members(tmp_path: Path) -> None:
    config = Config(
        name="v", run_dir=tmp_path, policy=PolicyConfig(num_members=2, variants=VARIANTS)
    )
    stage = find_stage(config, "policy")
    assert all_indices(config, stage) == tuple(range(6))
    assert len(stage_tasks(RunDir(tmp_path), config, stage)) == 6
    one = config.model_copy(update={"policy": PolicyConfig(num_members=1)})
    most = (
        {ask.role: ask.most for ask in list_asks(config) if ask.stage == "policy"},
        {ask.role: ask.most for ask in list_asks(one) if ask.stage == "policy"},
    )
    assert most[0] == {role: 6 * count for role, count in most[1].items()}


def test_runs_begun_before_there_were_variants_go_on() -> None:
    """Their inputs name no key that nobody had then, and all they name is as it was."""
    inputs = stage_inputs(Config(name="v"), "policy")
    assert not {"policy.variants", "policy.embedding_size"} & inputs.keys()
    assert inputs["policy.observation"] == "features"
    with_variants = Config(name="v", policy=PolicyConfig(variants=VARIANTS))
    changed = stage_inputs(with_variants, "policy")
    assert [variant["name"] for variant in changed["policy.variants"]] == ["plain", "bare", "other"]
    assert json.dumps(changed, default=str)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["policy.variants=[{name: a}, {name: a}]"],
            r"two variants are called 'a'",
        ),
        (["policy.variants=[{observation: one_hot}]"], r"policy\.variants\.0\.name"),
        (
            ["policy.variants=[{name: a, episode_length: 3}]"],
            r"variants\.0\.episode_length",
        ),
        (
            ["policy.observation=embedding"],
            r"policy\.observation: embedding .* instructor\.kind=template .*instructor\.kind=",
        ),
        (
            ["policy.variants=[{name: a, observation: embedding}]"],
            r"instructor\.kind=template doesn't give; set instructor\.kind=transformers",
        ),
        (
            [
                "policy.observation=embedding",
                "instructor.kind=http",
                "instructor.base_url=http://n:1/v1",
                "instructor.model=m",
            ],
            r"instructor\.kind=http doesn't give",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_place(
    words: list[str], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: v\n")
    with pytest.raises(ConfigError, match=told):
        load_config(path, words)


def test_generation_needs_the_instructor_where_the_policy_looks_through_it(tmp_path: Path) -> None:
    def roles(**policy: Any) -> tuple[str, ...]:
        path = tmp_path / "run.yaml"
        path.write_text("name: v\n")
        config = load_config(path, ["instructor.kind=transformers", "instructor.model=m"])
        return config.model_copy(update={"policy": PolicyConfig(**policy)}).roles_of("generate")

    assert roles() == ("expert", "reviewer")
    assert roles(observation="embedding") == ("expert", "reviewer", "instructor")
    eyes = PolicyVariant(name="e", observation="embedding")
    assert roles(variants=(*VARIANTS, eyes)) == ("expert", "reviewer", "instructor")
