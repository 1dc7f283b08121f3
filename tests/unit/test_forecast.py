"""A job must be warned early enough for a checkpoint: measured if there is one, else estimated."""

from pathlib import Path

import pytest

from teams_hpc.config import Config, ModelShape, load_config
from teams_hpc.pipeline.forecast import needed_warning_s
from teams_hpc.pipeline.room import num_parameters
from teams_hpc.pipeline.submit import submission_faults
from teams_hpc.storage.atomic import write_json
from teams_hpc.storage.run_dir import RunDir

SITE = Path(__file__).parents[2] / "configs" / "sites" / "slurm-test.yaml"


def load(folder: Path, *words: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(f"name: a\nextends: {SITE}\n", encoding="utf-8")
    return load_config(path, [f"run_dir={folder / 'run'}", *words])


def test_parameters_of_a_shape_are_those_of_the_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for tie in (True, False):
        shape = ModelShape(
            vocab_size=300, hidden_size=32, num_key_value_heads=2, tie_word_embeddings=tie
        )
        model = LlamaForCausalLM(LlamaConfig(**shape.model_dump()))
        assert num_parameters(Config(name="a", sft={"model": shape})) == model.num_parameters()


def test_a_large_model_needs_a_longer_warning(tmp_path: Path) -> None:
    large = (
        "{vocab_size: 32000, hidden_size: 4096, intermediate_size: 11008, num_hidden_layers: 32}"
    )
    config = load(tmp_path, f"sft.model={large}")
    seconds, why = needed_warning_s(config, RunDir(tmp_path / "run"))
    assert 60 < seconds < 600  # 6.6 billion parameters on two nodes
    assert "a checkpoint of 79.3 GB" in why  # 12 bytes each
    (fault,) = submission_faults(config, RunDir(tmp_path / "run"))
    assert fault.startswith("site.slurm.warning_s: 20 s is too short")
    enough = load(tmp_path, f"sft.model={large}", "site.slurm.warning_s=600")
    assert submission_faults(enough, RunDir(tmp_path / "run")) == []


@pytest.mark.parametrize(("seconds", "is_enough"), [(5.0, True), (15.0, False)])
def test_a_measured_checkpoint_counts(tmp_path: Path, seconds: float, is_enough: bool) -> None:
    config, run_dir = load(tmp_path), RunDir(tmp_path / "run")
    for step, took in ((1, seconds), (2, 1.0)):
        folder = run_dir.checkpoints / f"step-{step:06d}"
        folder.mkdir(parents=True)
        write_json(folder / "manifest.json", {"save_s": took})
    assert (submission_faults(config, run_dir) == []) is is_enough
    assert needed_warning_s(config, run_dir)[0] == 1.5 * seconds
