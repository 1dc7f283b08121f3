"""A run carried to a machine without an index: packed by make, unpacked with pip alone."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import make_llama

from containers.apptainer import said
from containers.conftest import PROJECT

pytestmark = [pytest.mark.containers_long, pytest.mark.timeout(900)]
NO_INDEX = {
    "PIP_INDEX_URL": "http://127.0.0.1:9/none",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_RETRIES": "0",
}


def test_a_run_is_carried_whole(tmp_path: Path) -> None:
    make_llama(tmp_path / "models" / "tiny")
    (tmp_path / "x.sif").write_bytes(os.urandom(1000))  # carried, not run, here
    config = tmp_path / "run.yaml"
    config.write_text(
        f"name: carried\nextends: {PROJECT}/configs/sites/slurm-test.yaml\n"
        "expert: {kind: transformers, model: models/tiny, dtype: float32}\n"
    )
    out = tmp_path / "out"
    words = (f"CONFIG={config}", f"OUT={out}", f"IMAGE={tmp_path / 'x.sif'}", "SETTINGS=seed=7")
    # The environment of these tests; touching its marker would have make install it again.
    venv = Path(sys.executable).parents[1]
    own = (f"VENV={venv}", f"--assume-old={venv}/.has-compute")
    said(("make", "bundle", *own, *words), timeout=600, folder=PROJECT)

    there = tmp_path / "there"
    shutil.move(out, there)
    shutil.rmtree(tmp_path / "models")
    said(("sha256sum", "--check", "--quiet", "SHA256SUMS"), timeout=60, folder=there)
    said((sys.executable, "-m", "venv", "venv"), timeout=120, folder=tmp_path)
    wheels = there / "software" / "wheels"
    pip = (str(tmp_path / "venv/bin/python"), "-m", "pip", "install", "--quiet", "--no-index")
    constraints = ("--find-links", str(wheels), "-c", str(wheels / "constraints.txt"))
    said((*pip, *constraints, "teams-hpc"), timeout=300, environment=NO_INDEX)

    program = str(tmp_path / "venv/bin/teams-hpc")
    assert "as they were made" in said((program, "verify", str(there)), timeout=60)
    script = said((program, "submit", str(there / "config.yaml"), "--dry-run"), timeout=60)
    assert f"export TEAMS_HPC_IMAGE={there}/software/x.sif" in script
    assert f"{there}/models/tiny" in script
    shown = said((program, "config", "show", str(there / "config.yaml")), timeout=60)
    assert "seed: 7" in shown
