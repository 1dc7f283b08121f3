"""The whole pipeline through the real command: one run, resumed runs, killed runs, changed runs."""

import hashlib
import html
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, chat_server

from teams_hpc.config import load_config
from teams_hpc.pipeline.start import open_run
from teams_hpc.report.call_forecast import forecast_calls
from teams_hpc.report.usage import collect_usage

TINY = """
name: tiny
seeds: {limit: 60}
policy: {num_members: 2, iterations: 3, num_envs: 8, num_bootstrap: 100}
generate: {num_steps: 3, unit_size: 8}
sft:
  dtype: float32
  model: {vocab_size: 400, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1,
          num_attention_heads: 2, num_key_value_heads: 2, max_position_embeddings: 512}
  sequence_length: 512
  schedule_steps: 4
  global_batch_rows: 2
  micro_batch_rows: 1
  warmup_steps: 1
  learning_rate: 1.0e-2
  checkpoint_interval_steps: 2
  eval_interval_steps: 2
evaluate: {num_bootstrap: 100, control_steps: 5}
site: {num_workers: 2, num_sft_ranks: 2}
"""
STAGES = ("policy", "select", "generate", "dataset", "sft", "evaluate", "report")


def start(config: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        (sys.executable, "-m", "teams_hpc", "run", str(config), *words),
        cwd=config.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def run(config: Path, *words: str, timeout_s: float = 240) -> tuple[int, str]:
    process = start(config, *words)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def command(*words: str) -> tuple[int, str]:
    found = subprocess.run(
        (sys.executable, "-m", "teams_hpc", *words),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return found.returncode, found.stdout + found.stderr


def data_digest(root: Path) -> str:
    """Identity of the data set: over columns, in plan order."""
    return str(json.loads((root / "dataset" / "manifest.json").read_text())["sha256"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, made without interruption; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("finished")
    config = folder / "tiny.yaml"
    config.write_text(TINY)
    code, output = run(config)
    assert code == 0, output
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "copy")
    config = tmp_path / "copy" / "tiny.yaml"
    code, output = run(config)
    assert code == 0, output
    return config


def test_every_stage_leaves_a_manifest_and_verify_agrees(finished: Path) -> None:
    root = finished / "runs" / "tiny"
    for stage in STAGES:
        assert (root / stage / "manifest.json").is_file(), stage
    assert root.stat().st_mode & 0o077 == 0
    code, output = command("verify", str(root))
    assert code == 0, output
    assert "FAULT" not in output
    code, output = command("status", str(root), "--json")
    status = json.loads(output)
    assert [line["state"] for line in status["stages"]] == ["done"] * len(STAGES)
    assert not status["is_running"]
    assert status["expert_calls"] > 0
    assert status["wizardlm_share"] == status["expert_calls"] / 624_000
    share = f"{100 * status['wizardlm_share']:.3f} % of WizardLM's"
    assert f"{share} 624,000" in command("status", str(root))[1]
    page = html.unescape((root / "report" / "report.html").read_text(encoding="utf-8"))
    assert f"{share} 624,000" in page
    assert f"{status['expert_calls']} expert calls are {share} about 624,000" in page


def test_a_forecast_at_most_is_never_below_what_was_used(finished: Path) -> None:
    run_dir, config = open_run(finished / "runs" / "tiny")
    found = forecast_calls(load_config(finished / "tiny.yaml"))
    used = collect_usage(run_dir)
    assert {line.ask.stage for line in found.lines} == used.keys()
    assert len(used) == 3
    for stage, ledger in used.items():
        for role in ("instructor", "reviewer", "expert"):
            usage = ledger.total(role)
            lines = [x for x in found.lines if (x.ask.stage, x.ask.role) == (stage, role)]
            assert usage.calls <= sum(line.ask.most for line in lines)
            assert usage.prompt_tokens <= sum(line.most_prompt_tokens for line in lines)
            assert usage.completion_tokens <= sum(line.most_completion_tokens for line in lines)
    measured = forecast_calls(config, (run_dir, config))
    for role in ("instructor", "reviewer", "expert"):
        total = sum(ledger.total(role).calls for ledger in used.values())
        assert measured.expected(role) == pytest.approx(total)
    code, output = command("forecast", str(finished / "tiny.yaml"), "--from", str(run_dir.root))
    assert code == 0, output
    assert "of WizardLM's 624,000" in output


def test_running_again_does_nothing(copied: Path) -> None:
    root = copied.parent / "runs" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("manifest.json")}
    code, output = run(copied, timeout_s=30)
    assert code == 0
    assert output.count("done before") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("manifest.json")} == before


@pytest.mark.parametrize("stage", ["policy", "dataset", "sft"])
def test_a_stage_beside_generation_loads_no_mpi(finished: Path, tmp_path: Path, stage: str) -> None:
    """Made again by itself, in one process, as a launcher would start it."""
    root = tmp_path / "tiny"
    shutil.copytree(finished / "runs" / "tiny", root)
    shutil.rmtree(root / stage)
    work = (
        f"from teams_hpc.pipeline.task import run_task; run_task({stage!r}, Path({str(root)!r}), 0)"
    )
    check = f"import sys; from pathlib import Path; {work}; print('mpi4py' in sys.modules)"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        (sys.executable, "-c", check),
        env={**os.environ, **place, **meeting},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.splitlines()[-1] == "False"
    made = "result.json" if stage == "policy" else "manifest.json"  # one member of two
    assert list((root / stage).rglob(made))


def test_a_changed_config_is_refused_and_made_again_on_request(copied: Path) -> None:
    code, output = run(copied, "sft.learning_rate=5e-3")
    assert code == 2
    assert "sft.learning_rate: was 0.01, is 0.005" in output
    assert "--rerun-from sft" in output
    assert len(output.splitlines()) <= 12
    root = copied.parent / "runs" / "tiny"
    rows = data_digest(root)
    generated = (root / "generate" / "manifest.json").stat().st_mtime_ns
    code, output = run(copied, "sft.learning_rate=5e-3", "--rerun-from", "sft")
    assert code == 0, output
    assert (root / "superseded" / "001" / "sft" / "manifest.json").is_file()
    assert (root / "generate" / "manifest.json").stat().st_mtime_ns == generated
    assert data_digest(root) == rows


def test_a_change_before_the_stage_to_rerun_is_refused_with_nothing_moved(copied: Path) -> None:
    root = copied.parent / "runs" / "tiny"
    code, output = run(copied, "seed=9", "--rerun-from", "sft")
    assert code == 2
    assert "seed: was 543, is 9" in output
    assert (root / "sft" / "manifest.json").is_file()
    assert not (root / "superseded").exists()


@pytest.mark.slow
def test_raised_max_steps_goes_on_and_measures_again(finished: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    root = tmp_path / "runs" / "tiny"
    for name in ("policy", "select", "generate", "dataset"):
        shutil.copytree(finished / "runs" / "tiny" / name, root / name)
    code, output = run(config, "sft.max_steps=2")
    assert code == 0, output
    code, output = run(config, "sft.max_steps=4")
    assert code == 0, output
    assert "after 4 steps" in output
    assert (root / "superseded" / "001" / "evaluate" / "manifest.json").is_file()
    code, output = command("verify", str(root))
    assert code == 0, output


def test_a_report_written_again_verifies(copied: Path) -> None:
    root = copied.parent / "runs" / "tiny"
    assert command("report", str(root))[0] == 0
    code, output = command("verify", str(root))
    assert code == 0, output
    (root / "generate" / "plan.json").unlink()
    code, output = command("verify", str(root))
    assert code == 1
    assert "Traceback" not in output
    assert "plan.json" in output


def test_a_claim_from_before_a_restart_is_outlasted(copied: Path) -> None:
    lease = copied.parent / "runs" / "tiny" / "leases" / "run"
    holder = {"host": "gone", "boot_id": "", "pid": 1, "process_start": "5", "token": "x"}
    lease.write_text(json.dumps({"holder": holder, "beat": 3}))
    code, output = run(copied, "site.lease_s=1", timeout_s=60)
    assert code == 0, output


def test_a_flipped_bit_is_found(copied: Path) -> None:
    root = copied.parent / "runs" / "tiny"
    shard = sorted((root / "generate" / "shards").glob("*.h5"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.chmod(0o600)
    shard.write_bytes(content)
    code, output = command("verify", str(root))
    assert code == 1
    assert shard.name in output


def test_a_run_in_use_is_refused(copied: Path) -> None:
    holder = (
        "import sys, time; from pathlib import Path; from teams_hpc.storage.lease import Lease\n"
        "assert Lease(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
    )
    lease = copied.parent / "runs" / "tiny" / "leases" / "run"
    with subprocess.Popen(
        (sys.executable, "-c", holder, str(lease)), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        code, output = run(copied, timeout_s=30)
        process.kill()
    assert code == 2
    assert "in use by process" in output
    code, output = run(copied, timeout_s=60)
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [1, 3])
def test_any_number_of_workers_makes_the_same_rows(
    finished: Path, tmp_path: Path, num_workers: int
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    root = tmp_path / "runs" / "tiny"
    for name in ("policy", "select"):
        shutil.copytree(finished / "runs" / "tiny" / name, root / name)
    stop_after(config, root, "dataset", f"site.num_workers={num_workers}")
    assert data_digest(root) == data_digest(finished / "runs" / "tiny")


def stop_after(config: Path, root: Path, stage: str, *words: str, timeout_s: float = 120) -> None:
    """Run until `stage` is done, anew if it was done before, then kill the run."""
    path = root / stage / "manifest.json"
    before = _written_at(path)
    process = start(config, *words)
    deadline = time.monotonic() + timeout_s
    try:
        while _written_at(path) in (None, before):
            assert time.monotonic() < deadline, f"{stage} takes too long"
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


def _written_at(path: Path) -> int | None:
    """When a file was last written (ns), or None: the run may set it aside at any moment."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def processes_of(root: Path) -> list[int]:
    """Live processes whose arguments name this run directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(root).encode() in words and state not in "ZX":
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_killed_in_every_stage_it_completes_with_the_same_rows(
    finished: Path, tmp_path: Path
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    root = tmp_path / "runs" / "tiny"
    moments = random.Random(5)
    for stage in STAGES[:-1]:
        process = start(config)
        deadline = time.monotonic() + 120
        while not (root / stage / "inputs.json").exists():
            assert time.monotonic() < deadline, f"{stage} never starts"
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 4.0))
        process.kill()
        process.communicate(timeout=30)
        deadline = time.monotonic() + 2  # what is promised; measured: at most 0.4 s
        while processes_of(root) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert processes_of(root) == []
        if stage == "sft":  # what a kill while a model is being written leaves
            (root / "sft" / ".base.tmp").mkdir(exist_ok=True)
    code, output = run(config)
    assert code == 0, output
    assert data_digest(root) == data_digest(finished / "runs" / "tiny")
    code, output = command("verify", str(root))
    assert code == 0, output
    assert list(root.rglob("*.tmp")) == []


def test_failed_rows_are_retried_alone_and_what_follows_is_made_again(tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    root = tmp_path / "runs" / "tiny"
    server = ChatServer(behave=lambda number: "400" if number % 6 == 5 else "ok", say=_say)
    with chat_server(server):
        words = (
            "generate.policy=uniform",
            "generate.equal_threshold=0.0",
            "expert.kind=http",
            "expert.model=m",
            f"expert.base_url={server.url}",
        )
        stop_after(config, root, "dataset", *words)
        failed = json.loads((root / "generate" / "manifest.json").read_text())
        assert failed["counts"]["failed"] > 5
        num_asked = len(server.bodies)
        server.behave = lambda number: "ok"
        stop_after(config, root, "dataset", *words, "generate.retry_failed=true")
    assert 5 < len(server.bodies) - num_asked < num_asked
    again = json.loads((root / "generate" / "manifest.json").read_text())
    assert again["counts"]["failed"] == 0
    calls = {role: usage["calls"] for role, usage in _usage(again).items()}
    assert calls["expert"] == len(server.bodies)
    set_aside = root / "superseded" / "001" / "dataset" / "manifest.json"
    assert json.loads(set_aside.read_text())["sha256"] != data_digest(root)
    _, output = command("verify", str(root))
    faults = [line.split() for line in output.splitlines() if line.startswith("FAULT")]
    assert [words[1:5] for words in faults] == [
        [name, "is", "not", "done;"] for name in ("sft", "evaluate", "report")
    ]


def _say(prompt: str) -> str:
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    return " ".join(f"word{digest[at : at + 4]}" for at in range(0, 48, 4))


def _usage(manifest: dict[str, Any]) -> dict[str, dict[str, int]]:
    return {row["role"]: row for row in manifest["usage"]}
