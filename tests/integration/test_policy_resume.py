"""A member killed at random moments ends, bit for bit, as one that was left alone.

For both engines that are exact: the grammar, and a small Llama in float32 on the CPU with fixed
batches. What a kill took away is done again, at most one iteration for each, and counted.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_llama

from teams_hpc.config import Config, dump_yaml, load_config
from teams_hpc.llm.ledger import Ledger
from teams_hpc.pipeline.graph import find_stage
from teams_hpc.pipeline.inputs import prepare_stage
from teams_hpc.policy.checkpoint import Checkpoint
from teams_hpc.runtime.metrics import read_metrics
from teams_hpc.storage.run_dir import RunDir, read_manifest

ITERATIONS, NUM_ENVS, LENGTH, SANITY_CALLS = 12, 6, 3, 20
SMALL = (
    "seeds.limit=60",
    "policy.num_members=1",
    f"policy.iterations={ITERATIONS}",
    f"policy.num_envs={NUM_ENVS}",
    f"policy.episode_length={LENGTH}",
    "policy.hidden_size=8",
)
NUM_KILLS = 3


@pytest.fixture(scope="module")
def talkative_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, but it ends its replies, so that they reach the reviewer."""
    from transformers import AutoModelForCausalLM

    folder = make_llama(tmp_path_factory.mktemp("talkative"), CHAT_TEMPLATE)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[1] *= 4.0
    model.save_pretrained(folder)
    return folder


def llama_words(folder: Path) -> list[str]:
    words = []
    for role in ("instructor", "reviewer"):
        values = {
            "kind": "transformers",
            "model": folder,
            "dtype": "float32",
            "device": "cpu",
            "batching": "fixed",
            "batch_size": 4,
            "threads": 1,
            "max_tokens": 12,
        }
        words += [f"{role}.{key}={value}" for key, value in values.items()]
    return words


def make_run(folder: Path, words: list[str]) -> tuple[RunDir, Config]:
    folder.mkdir(parents=True)
    path = folder / "run.yaml"
    path.write_text("name: p\n")
    config = load_config(path, [f"run_dir={folder / 'run'}", *SMALL, *words])
    run_dir = RunDir(config.resolved_run_dir)
    prepare_stage(run_dir, config, find_stage(config, "policy"))
    run_dir.config.write_text(dump_yaml(config))
    return run_dir, config


def start(run_dir: RunDir) -> "subprocess.Popen[bytes]":
    """The member's process, as an array task runs it."""
    return subprocess.Popen(
        (sys.executable, "-m", "teams_hpc", "stage", "policy", str(run_dir.root), "--index", "0"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def num_done(run_dir: RunDir) -> int:
    state = Checkpoint.load(run_dir.member(0) / "state.safetensors")
    return 0 if state is None else state.iteration


def kill_at_random(run_dir: RunDir, chance: random.Random, after: int) -> None:
    """Kill -9 some time after iteration `after`, in whatever it is doing then."""
    process = start(run_dir)
    deadline = time.monotonic() + 120
    while num_done(run_dir) < after:
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(chance.uniform(0.0, 0.15))
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(900)  # five starts of a process that imports torch
@pytest.mark.parametrize("kind", ["template", "transformers"])
def test_kills_at_random_moments_change_nothing(
    kind: str, tmp_path: Path, talkative_llama: Path
) -> None:
    words = llama_words(talkative_llama) if kind == "transformers" else []
    quiet, _ = make_run(tmp_path / "quiet", words)
    process = start(quiet)
    _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said.decode()
    killed, _ = make_run(tmp_path / "killed", words)
    chance = random.Random(kind)
    afters = sorted(chance.sample(range(ITERATIONS - 3), NUM_KILLS))
    for after in afters:
        kill_at_random(killed, chance, after)
        lines = [line["iteration"] for line in read_metrics(killed.member(0) / "metrics.jsonl")]
        assert lines == list(range(1, len(lines) + 1))
        assert num_done(killed) <= len(lines) <= num_done(killed) + 1
    process = start(killed)
    _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said.decode()
    check_equal(quiet, killed)


def check_equal(quiet: RunDir, killed: RunDir) -> None:
    """Parameters, optimiser and metrics are equal to the last bit; calls are accounted for."""
    for name in ("policy.safetensors", "metrics.jsonl"):
        assert (killed.member(0) / name).read_bytes() == (quiet.member(0) / name).read_bytes(), name
    states = [Checkpoint.load(run.member(0) / "state.safetensors") for run in (quiet, killed)]
    assert states[0] is not None
    assert states[1] is not None
    assert states[0].tensors.keys() == states[1].tensors.keys()
    for name, value in states[0].tensors.items():
        assert value.numpy().tobytes() == states[1].tensors[name].numpy().tobytes(), name
    metrics = list(read_metrics(quiet.member(0) / "metrics.jsonl"))
    # It did learn something: there were rewards, and they differed.
    assert any(line["kl"] for line in metrics)
    assert len({line["mean_reward"] for line in metrics}) > 3
    manifests = [read_manifest(run, "policy") for run in (quiet, killed)]
    usage = [Ledger.from_json(manifest.pop("usage")) for manifest in manifests if manifest]
    assert manifests[0] == manifests[1]
    for role in ("instructor", "reviewer"):
        before, after = (ledger.total(role) for ledger in usage)  # type: ignore[arg-type]
        assert (after.calls, after.prompt_tokens) == (before.calls, before.prompt_tokens)
        assert before.in_doubt == 0
        most = NUM_KILLS * NUM_ENVS * LENGTH + (SANITY_CALLS if role == "reviewer" else 0)
        assert after.in_doubt <= most
    # A kill after the last fsync and before the next note has nothing in doubt; all three hardly.
    assert usage[1].total("instructor").in_doubt > 0
    assert not list(killed.member(0).glob(".*.tmp"))
    shutil.rmtree(killed.root)
