"""What is carried to a cluster without a way out: complete, once each, and damage is seen."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from teams_hpc.config import load_config
from teams_hpc.errors import ConfigError, UsageError
from teams_hpc.pipeline.bundle import bundle_lines, make_bundle, verify_bundle


def make_model(folder: Path, text: str = "weights") -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_text(text)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Path:
    here = tmp_path / "here"
    make_model(here / "one" / "llama")
    make_model(here / "two" / "llama", "other weights")
    (here / "seeds.jsonl").write_text('{"instruction": "Say hello."}\n')
    (here / "tests.txt").write_text("a test\n")
    (here / "tasks").mkdir()
    (here / "tasks" / "t.yaml").write_text("task: t\n")
    (here / "x.sif").write_bytes(bytes(range(256)) * 9)
    path = here / "run.yaml"
    path.write_text(
        "name: carried\n"
        "seeds: {path: seeds.jsonl}\n"
        "instructor: {kind: transformers, model: one/llama}\n"
        "reviewer: {kind: transformers, model: one/llama}\n"
        "expert: {kind: transformers, model: two/llama}\n"
        "dataset: {decontaminate: [tests.txt]}\n"
        "evaluate: {lm_eval_path: tasks}\n"
        "site: {container: {image: x.sif, binds: [/data]}}\n"
    )
    return path


def test_a_bundle_works_where_it_was_unpacked(config: Path, tmp_path: Path) -> None:
    before = load_config(config)
    bundle = make_bundle(before, tmp_path / "out")
    there = tmp_path / "elsewhere" / "b"
    shutil.copytree(bundle.folder, there)
    shutil.rmtree(config.parent)
    shutil.rmtree(bundle.folder)
    loaded = load_config(there / "config.yaml")
    assert loaded.instructor.model == loaded.reviewer.model == there / "models" / "llama"
    assert loaded.expert.model == there / "models" / "llama-2"
    assert (loaded.expert.model / "model.safetensors").read_text() == "other weights"
    assert loaded.seeds.path == there / "data" / "seeds.jsonl"
    assert loaded.dataset.decontaminate == (there / "data" / "tests.txt",)
    assert (loaded.evaluate.lm_eval_path / "t.yaml").exists()
    assert loaded.site.container.image == there / "software" / "x.sif"
    assert loaded.site.container.binds == ("/data",)
    assert loaded.run_dir == Path.cwd() / "runs" / "carried"
    same = {"instructor", "reviewer", "expert", "seeds", "dataset", "evaluate", "site", "run_dir"}
    assert loaded.model_dump(exclude=same) == before.model_dump(exclude=same)
    assert verify_bundle(there) == ([], bundle.num_files)


def test_the_manifest_and_sha256sum_find_damage(config: Path, tmp_path: Path) -> None:
    folder = make_bundle(load_config(config), tmp_path / "out").folder
    check = ("sha256sum", "--check", "--quiet", "SHA256SUMS")
    assert subprocess.run(check, cwd=folder, timeout=60, check=False).returncode == 0
    manifest = json.loads((folder / "bundle.json").read_text())
    assert {"python", "packages", "git_commit", "teams_hpc"} <= set(manifest)
    carried = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert carried == {*manifest["files"], "bundle.json", "SHA256SUMS"}
    (folder / "models" / "llama" / "model.safetensors").write_text("WEIGHTS")
    (folder / "data" / "seeds.jsonl").write_text("")
    (folder / "software" / "x.sif").unlink()
    faults, _ = verify_bundle(folder)
    assert faults == [
        "data/seeds.jsonl has 0 of 30 bytes; carry it again",
        "models/llama/model.safetensors has changed on the way; carry it again",
        "software/x.sif is missing; carry it again",
    ]
    done = subprocess.run(check, cwd=folder, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1


def test_links_of_a_hub_cache_are_carried_as_files(config: Path, tmp_path: Path) -> None:
    blob = config.parent / "blob"
    weights = config.parent / "one" / "llama" / "model.safetensors"
    weights.rename(blob)
    weights.symlink_to(blob)
    folder = make_bundle(load_config(config), tmp_path / "out").folder
    copy = folder / "models" / "llama" / "model.safetensors"
    assert (copy.is_symlink(), copy.read_text()) == (False, "weights")


def test_what_is_not_on_this_machine_is_said_and_keeps_its_path(
    config: Path, tmp_path: Path
) -> None:
    words = ["expert.model=/cluster/models/big", "site.container.image=/cluster/i.sif"]
    bundle = make_bundle(load_config(config, words), tmp_path / "out")
    assert "not here, left as it is: expert.model /cluster/models/big" in bundle_lines(bundle)
    text = (bundle.folder / "config.yaml").read_text()
    assert "/cluster/models/big" in text
    assert "/cluster/i.sif" in text
    absent = json.loads((bundle.folder / "bundle.json").read_text())["absent"]
    assert set(absent) == {"expert.model", "site.container.image"}


def test_nothing_is_left_of_a_bundle_that_is_refused(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (config.parent / "folder").mkdir()
    with pytest.raises(UsageError, match="is a folder; make one file"):
        make_bundle(load_config(config, ["site.container.image=/usr"]), out)
    (config.parent / "two" / "llama" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"expert.model: .* no \*.safetensors"):
        make_bundle(load_config(config), out)
    with pytest.raises(UsageError, match="--wheels: no folder"):
        make_bundle(load_config(config), out, wheels=tmp_path / "no")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    out.mkdir()
    with pytest.raises(UsageError, match="exists already"):
        make_bundle(load_config(config), out)


def test_the_command_makes_one_and_verify_reads_it(config: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "a.whl").write_text("a wheel")
    out, image = tmp_path / "out", tmp_path / "new.sif"
    image.write_text("an image")

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            (sys.executable, "-m", "teams_hpc", *words),
            cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    options = ("--output", "out", "--image", "new.sif", "--wheels", "wheels")
    made = call("bundle", str(config), "name=other", *options)
    assert made.returncode == 0, made.stderr
    assert "GB in" in made.stdout.splitlines()[-1]
    assert (out / "software" / "wheels" / "a.whl").exists()
    loaded = load_config(out / "config.yaml")
    assert (loaded.name, loaded.site.container.image) == ("other", out / "software" / "new.sif")
    assert call("verify", "out").returncode == 0
    (out / "software" / "new.sif").write_text("an omage")
    found = call("verify", "out")
    assert (found.returncode, "FAULT  software/new.sif" in found.stdout) == (1, True)
