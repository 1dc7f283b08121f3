"""Layers, overrides, paths and messages of the configuration."""

from pathlib import Path

import pytest

from teams_hpc.config import Config, ModelShape, dump_yaml, load_config, load_resolved
from teams_hpc.config.check import input_faults
from teams_hpc.config.digest import changed_keys, inputs_digest, stage_inputs
from teams_hpc.config.schema import SftConfig
from teams_hpc.errors import ConfigError

SHIPPED = sorted(Path(__file__).parents[2].glob("configs/*.yaml"))
SITES = sorted(Path(__file__).parents[2].glob("configs/sites/*.yaml"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert load_resolved(write(tmp_path / "config.yaml", dump_yaml(config))) == config


def test_the_shipped_files_are_all_here() -> None:
    names = {path.stem for path in SHIPPED}
    assert names >= {
        "quickstart",
        "quickstart-template",
        "paper-llama1-7b",
        "llama2-7b-a100",
        "llama3-8b-a100",
    }
    assert {"local", "slurm-a100", "slurm-test"} <= {path.stem for path in SITES}
    for name in ("llama2-7b-a100", "llama3-8b-a100"):
        config = load_config(next(path for path in SHIPPED if path.stem == name))
        assert config.sft.attention == "flash_attention_2"
        assert config.site.executor == "slurm"


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.stem)
def test_shipped_sites_load(site: Path, tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "run.yaml", f"name: a\nextends: {site}\n"))
    assert config.site.executor == ("local" if site.stem == "local" else "slurm")


def test_layers_override_in_order(tmp_path: Path) -> None:
    write(tmp_path / "sites" / "s.yaml", "seed: 1\nsite: {num_workers: 3}\npolicy: {num_envs: 5}")
    path = write(tmp_path / "run.yaml", "name: a\nextends: sites/s.yaml\nseed: 2\n")
    config = load_config(path, ["seed=3", "seed=4"])
    assert (config.seed, config.site.num_workers, config.policy.num_envs) == (4, 3, 5)
    assert load_config(path).seed == 2


def test_shipped_names_a_folder_of_the_package(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "name: a\nexpert: {kind: transformers}\n")
    config = load_config(path, ["expert.model=shipped:pocket-llama"])
    assert config.expert.kind == "transformers"
    assert (config.expert.model / "config.json").is_file()
    assert load_resolved(write(tmp_path / "config.yaml", dump_yaml(config))) == config
    with pytest.raises(ConfigError, match=r"shipped:\.\./data: .* there are: pocket-llama"):
        load_config(path, ["expert.model=shipped:../data"])


def test_the_quickstart_has_a_variant_without_a_model() -> None:
    model, grammar = (
        load_config(next(path for path in SHIPPED if path.stem == name))
        for name in ("quickstart", "quickstart-template")
    )
    for role in ("instructor", "reviewer", "expert"):
        assert getattr(model, role).kind == "transformers"
        assert getattr(grammar, role).kind == "template"
    assert grammar.sft == model.sft


def test_relative_paths_start_where_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "sites" / "s.yaml", "expert: {kind: transformers, model: m}")
    path = write(
        tmp_path / "configs" / "run.yaml", "name: a\nextends: ../sites/s.yaml\nseeds: {path: s.txt}"
    )
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    config = load_config(path, ["dataset.decontaminate=[bench.jsonl]", "sft.model=llama"])
    assert config.expert.model == tmp_path / "sites" / "m"  # type: ignore[union-attr]
    assert config.seeds.path == tmp_path / "configs" / "s.txt"
    assert config.dataset.decontaminate == (work / "bench.jsonl",)
    assert config.sft.model == work / "llama"
    assert config.run_dir == work / "runs" / "a"


def test_a_new_kind_drops_what_only_the_old_one_has(tmp_path: Path) -> None:
    path = write(
        tmp_path / "run.yaml",
        "name: a\nexpert: {kind: transformers, model: m, batch_size: 4, max_tokens: 9}\n",
    )
    assert load_config(path, ["expert.kind=template"]).expert.model_dump() == {
        "kind": "template",
        "max_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.95,
    }
    words = ["expert.model=served", "expert.base_url=http://n1/v1", "expert.kind=http"]
    for order in (words, words[::-1]):
        expert = load_config(path, order).expert
        assert (expert.kind, expert.model) == ("http", "served")  # type: ignore[union-attr]


def test_numbers_are_what_they_seem(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "name: a\nsft: {learning_rate: 1e-3}\n")
    config = load_config(path, ["policy.target_kl=2e-2", "sft.model.hidden_size=32"])
    assert config.sft.learning_rate == 1e-3
    assert config.policy.target_kl == 0.02
    assert isinstance(config.sft.model, ModelShape)
    with pytest.raises(ConfigError, match=r"site\.lease_s"):
        load_config(path, ["site.lease_s=24:00:00"])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["polcy.iterations=3"], ["polcy: no such key; did you mean policy?"]),
        (["policy.iteration=3"], ["policy.iteration: no such key; did you mean iterations?"]),
        (["policy.iterations=many"], ["policy.iterations", "'many'"]),
        (["policy.iterations=0"], ["policy.iterations", "greater than or equal to 1"]),
        (["expert.kind=gpt"], ["expert.kind: must be one of", "'transformers'"]),
        (["expert.kind=transformers"], ["expert.model: is missing"]),
        (["reviewer.kind=http", "reviewer.base_url=ftp://x"], ["reviewer.base_url"]),
        (["seeds.policy_train_share=0.9"], ["seeds: the four split shares sum to"]),
        (["sft.max_steps=9", "sft.schedule_steps=8"], ["sft: max_steps 9 is more than"]),
        (["sft.model.num_attention_heads=7"], ["sft.model: hidden_size"]),
        (["name=../evil"], ["name"]),
        (["seed"], ["'seed' is not KEY=VALUE"]),
        (["seed=[1"], ["seed", "not valid YAML"]),
    ],
)
def test_faults_name_key_and_remedy(
    tmp_path: Path, overrides: list[str], expected: list[str]
) -> None:
    path = write(tmp_path / "run.yaml", "name: a\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    for text in expected:
        assert text in str(caught.value)


def test_all_faults_come_at_once_within_twelve_lines(tmp_path: Path) -> None:
    wrong = "\n".join(f"key{number}: 1" for number in range(30))
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path / "run.yaml", f"name: a\n{wrong}\n"))
    lines = str(caught.value).splitlines()
    assert len(lines) <= 12
    assert "and 21 more" in lines[-1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", "stands twice"),
        ("- a\n", "must hold keys and values"),
        ("name: [", "not valid YAML"),
        ("name: a\nextends: run.yaml\n", "extends itself"),
        ("name: a\nextends: nowhere.yaml\n", "no config file"),
        ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(write(tmp_path / "run.yaml", text))


def config_with(tmp_path: Path, *overrides: str) -> Config:
    return load_config(write(tmp_path / "run.yaml", "name: a\n"), overrides)


def test_digests_ignore_where_and_how_hard(tmp_path: Path) -> None:
    base = config_with(tmp_path)
    same = config_with(
        tmp_path,
        "site.num_workers=7",
        "budget.max_expert_calls=5",
        "sft.micro_batch_rows=1",
        "sft.offload_optimizer=true",
        "sft.checkpoint_interval_steps=3",
        "sft.max_steps=2",
        "sft.peak_tflops=2.0",
        "name=other",
        "run_dir=elsewhere",
    )
    for stage in ("policy", "select", "generate", "dataset", "sft", "evaluate"):
        assert stage_inputs(base, stage) == stage_inputs(same, stage)


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("policy.gamma=0.9", {"policy"}),
        ("policy.num_eval_episodes=9", {"select"}),
        ("generate.num_steps=9", {"generate"}),
        ("dataset.drop_truncated=false", {"dataset"}),
        ("sft.learning_rate=0.1", {"sft"}),
        ("sft.sequence_length=64", {"dataset", "sft"}),
        ("evaluate.control_steps=9", {"evaluate"}),
        ("reviewer.temperature=0.1", {"policy", "generate"}),
        ("expert.max_tokens=9", {"generate"}),
    ],
)
def test_a_key_changes_the_digests_of_its_stages_only(
    tmp_path: Path, override: str, stages: set[str]
) -> None:
    base, other = config_with(tmp_path), config_with(tmp_path, override)
    changed = {
        stage
        for stage in ("policy", "select", "generate", "dataset", "sft", "evaluate")
        if inputs_digest(stage_inputs(base, stage)) != inputs_digest(stage_inputs(other, stage))
    }
    assert changed == stages
    for stage in stages:
        keys = changed_keys(stage_inputs(base, stage), stage_inputs(other, stage))
        assert keys == [override.partition("=")[0]]


def threads_inputs(tmp_path: Path, batching: str, threads: str) -> dict[str, object]:
    words = ("kind=transformers", "model=m", f"batching={batching}", f"threads={threads}")
    return stage_inputs(config_with(tmp_path, *(f"expert.{word}" for word in words)), "generate")


def test_threads_count_where_they_decide(tmp_path: Path) -> None:
    """With null, each has the inputs that it had before the number was looked at."""
    fixed = [threads_inputs(tmp_path, "fixed", number) for number in ("null", "1", "2")]
    assert [inputs["expert.threads"] for inputs in fixed] == [None, 1, 2]
    assert changed_keys(fixed[1], fixed[2]) == ["expert.threads"]
    refill = [threads_inputs(tmp_path, "refill", number) for number in ("null", "1", "2")]
    assert refill[0] == refill[1] == refill[2]
    assert refill[0]["expert.threads"] is None
    begun_before = {**refill[0], "expert.threads": 4}
    assert changed_keys(begun_before, refill[1]) == []


def test_files_count_by_content_not_by_path(tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt", "one\n")
    second = write(tmp_path / "b.txt", "one\n")
    third = write(tmp_path / "c.txt", "two\n")
    inputs = [
        stage_inputs(config_with(tmp_path, f"seeds.path={path}"), "generate")
        for path in (first, second, third)
    ]
    assert inputs[0] == inputs[1] != inputs[2]


@pytest.mark.parametrize("text", ["08", "010", "1e5", "12", "1.5e3", "24:00:00"])
def test_text_that_looks_like_a_number_stays_text(tmp_path: Path, text: str) -> None:
    expert = f"{{kind: http, base_url: 'http://h/v1', model: '{text}'}}"
    path = write(tmp_path / "a.yaml", f"name: a\nexpert: {expert}\n")
    config = load_config(path)
    assert load_resolved(write(tmp_path / "config.yaml", dump_yaml(config))) == config


def test_a_leading_zero_is_decimal_and_infinity_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "name: a\nseeds: {limit: 010}\n")
    assert load_config(path).seeds.limit == 10
    with pytest.raises(ConfigError, match=r"sft\.learning_rate: .*finite"):
        load_config(path, ["sft.learning_rate=inf"])


def test_every_file_of_a_folder_of_tasks_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "name: a\nevaluate: {lm_eval_path: tasks}\n")
    task = write(tmp_path / "tasks" / "deep" / "one.yaml", "task: one\n")
    before = stage_inputs(load_config(path), "evaluate")
    task.write_text("task: two\n")
    after = stage_inputs(load_config(path), "evaluate")
    assert changed_keys(before, after) == ["evaluate.lm_eval_path"]


def test_rows_longer_than_a_folder_s_positions_are_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048}')
    config = Config(name="a", run_dir=tmp_path, sft=SftConfig(model=tmp_path, sequence_length=4096))
    (fault,) = input_faults(config)
    assert fault.startswith("sft.sequence_length: 4096 is more than the 2048 positions")
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 4096}')
    assert input_faults(config) == []
    with pytest.raises(ValueError, match="sequence_length 4096 is more than the model's"):
        SftConfig(sequence_length=4096)
