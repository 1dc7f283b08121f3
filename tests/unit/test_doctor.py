"""`doctor` where things are missing: lines, never a traceback."""

import sys
from pathlib import Path

import pytest

from teams_hpc.cluster.probe import packages
from teams_hpc.cluster.slurm import scheduler_settings
from teams_hpc.config import Config, load_config
from teams_hpc.report.doctor import diagnose


def make(folder: Path, *overrides: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(f"name: t\nrun_dir: {folder / 'run'}\n")
    return load_config(path, overrides)


def test_every_line_says_what_is_expected(tmp_path: Path) -> None:
    lines = diagnose(make(tmp_path))
    assert [line.what for line in lines if not (line.found and line.expected)] == []


def test_cuda_and_nccl_are_found_whatever_their_packages_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version in (("nvidia-cuda-runtime", "13.0.96"), ("nvidia-nccl-cu13", "2.28.9")):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    monkeypatch.syspath_prepend(tmp_path)
    found = packages()
    assert (found["cuda"], found["nccl"]) == ("13.0.96", "2.28.9")


def test_a_login_node_without_torch_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    lines = {line.what: line for line in diagnose(make(tmp_path, "site.executor=slurm"))}
    assert "torch is not installed here" in lines["GPUs"].found
    assert lines["GPUs"].level == "note"


def test_a_cluster_that_is_not_there_is_one_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    scheduler_settings.cache_clear()
    findings = diagnose(make(tmp_path, "site.executor=slurm"))
    [fault] = [line for line in findings if line.is_fault]
    assert fault.what == "site.executor"


def test_checkpoints_that_do_not_fit_are_a_fault(tmp_path: Path) -> None:
    config = make(tmp_path, "sft.keep_checkpoints=1000000000")
    disk = next(line for line in diagnose(config) if line.what == "free disk")
    assert disk.is_fault
    assert "sft.keep_checkpoints" in disk.remedy
