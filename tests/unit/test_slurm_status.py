"""`status`, `logs` and `cancel` of a run whose jobs Slurm has; Slurm's commands are doubles."""

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from teams_hpc.cli import app
from teams_hpc.cluster.cancel import cancel_run
from teams_hpc.cluster.records import JobRecord, write_record
from teams_hpc.cluster.slurm import expand_job_id
from teams_hpc.config import Config, dump_yaml
from teams_hpc.errors import ClusterError, UsageError
from teams_hpc.report.jobs import JobPoll, read_jobs
from teams_hpc.report.logs import find_logs, last_lines, logs_text
from teams_hpc.report.status import StageStatus, read_status, status_json, status_table
from teams_hpc.storage.run_dir import RunDir

LONG_AGO = 1e9


class FakeSlurm:
    """Commands on PATH that print a file and note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in ("sacct", "squeue", "scancel"):
            self.says(name, "")

    def says(self, name: str, text: str, *, error: str = "") -> None:
        """What a command prints from now on; with `error` it fails."""
        (self.folder / f"{name}.txt").write_text(text)
        (self.folder / f"{name}.err").write_text(error)
        script = self.folder / name
        script.write_text(
            f'#!/bin/sh\necho "$@" >> "{script}.calls"\n'
            f'cat "{script}.txt"\ncat "{script}.err" >&2\n[ ! -s "{script}.err" ]\n'
        )
        script.chmod(0o700)

    def calls(self, name: str) -> list[str]:
        """Arguments of each call so far."""
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return FakeSlurm(tmp_path / "bin")


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path / "run")
    for folder in (run_dir.logs, run_dir.metrics, run_dir.slurm):
        folder.mkdir(parents=True)
    return run_dir


@pytest.fixture
def config(run_dir: RunDir) -> Config:
    config = Config.model_validate({"name": "r", "run_dir": run_dir.root})
    run_dir.config.write_text(dump_yaml(config))
    return config


def submitted(
    run_dir: RunDir,
    job_id: str,
    stage: str = "generate",
    count: int = 1,
    *,
    indices: tuple[int, ...] | None = None,
    at: float | None = None,
    replaces: str | None = None,
) -> None:
    indices = tuple(range(count)) if indices is None else indices
    record = JobRecord(
        job_id=job_id,
        stage=stage,
        indices=indices,
        is_array=len(indices) > 1,
        submitted=time.time() if at is None else at,
        replaces=replaces,
    )
    write_record(run_dir, record)


def line_of(run_dir: RunDir, config: Config, stage: str = "generate") -> StageStatus:
    return {line.stage: line for line in read_status(run_dir, config).stages}[stage]


def shown(run_dir: RunDir, config: Config) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(status_table(read_status(run_dir, config)))
    return console.export_text()


def started(run_dir: RunDir, stage: str) -> None:
    run_dir.stage_dir(stage).mkdir()
    run_dir.inputs(stage).write_text("{}")


def test_nothing_submitted_nothing_asked(slurm: FakeSlurm, run_dir: RunDir, config: Config) -> None:
    assert [line.state for line in read_status(run_dir, config).stages] == ["waiting"] * 7
    assert slurm.calls("sacct") == slurm.calls("squeue") == []


def test_states_are_added_up_from_one_call(
    slurm: FakeSlurm, run_dir: RunDir, config: Config
) -> None:
    submitted(run_dir, "12", count=6)
    submitted(run_dir, "13", "dataset")
    slurm.says(
        "sacct",
        "12_0|RUNNING|0:0\n12_1|FAILED|1:0\n12_[2-3]|PENDING|0:0\n12_4|RUNNING|0:0\n"
        "12_5|CANCELLED by 1000|0:15\n13|PENDING|0:0\n",
    )
    run_dir.log("generate-001").write_text("why\n")
    line = line_of(run_dir, config)
    assert line.num_tasks == {"running": 2, "pending": 2, "cancelled": 1, "failed": 1}
    assert line.state == "running"
    assert line.error == "generate-001: FAILED (exit 1:0), job 12_1"
    assert line.log == str(run_dir.log("generate-001"))
    (call,) = slurm.calls("sacct")
    assert "--jobs=12,13" in call
    assert line_of(run_dir, config, "dataset").state == "queued"
    assert slurm.calls("squeue") == []


def test_a_thousand_tasks_take_one_call_and_little_time(
    slurm: FakeSlurm, run_dir: RunDir, config: Config
) -> None:
    submitted(run_dir, "7", count=1000)
    lines = [f"7_{number}|{'RUNNING' if number % 2 else 'FAILED'}|1:0" for number in range(1000)]
    slurm.says("sacct", "\n".join(lines) + "\n")
    for number in range(1000):
        value = {"done": 1, "total": 2, "unit": "rows", "rate_per_s": 1, "message": ""}
        text = json.dumps({**value, "updated": number})
        run_dir.progress(f"generate-{number:03d}").write_text(text)
        run_dir.log(f"generate-{number:03d}").write_text("x\n")
    start = time.monotonic()
    text = shown(run_dir, config)
    assert time.monotonic() - start < 5
    assert len(slurm.calls("sacct")) == 1
    assert "500 running" in text
    assert "1000/2000 rows" in text


def test_a_replaced_task_counts_no_more(slurm: FakeSlurm, run_dir: RunDir, config: Config) -> None:
    submitted(run_dir, "12", count=3, at=LONG_AGO)
    submitted(run_dir, "15", indices=(1,), replaces="12")
    slurm.says("sacct", "12_0|RUNNING|0:0\n12_1|FAILED|1:0\n12_2|RUNNING|0:0\n15|PENDING|0:0\n")
    line = line_of(run_dir, config)
    assert line.num_tasks == {"running": 2, "pending": 1}
    assert line.error == ""
    ids = [task.job_id for task in read_jobs(run_dir).tasks]
    assert sorted(ids) == ["12_0", "12_2", "15"]


def test_without_accounting_the_queue_is_asked(
    slurm: FakeSlurm, run_dir: RunDir, config: Config
) -> None:
    submitted(run_dir, "12", count=2)
    submitted(run_dir, "8", "policy", at=LONG_AGO)
    slurm.says("sacct", "", error="Slurm accounting storage is disabled\n")
    slurm.says("squeue", "12_0|RUNNING|None\n12_1|PENDING|Priority\n99|RUNNING|None\n")
    assert line_of(run_dir, config).num_tasks == {"running": 1, "pending": 1}
    assert line_of(run_dir, config, "policy").num_tasks == {"unknown": 1}
    assert len(slurm.calls("squeue")) == 2


def test_a_job_slurm_does_not_know_yet_is_submitted(
    slurm: FakeSlurm, run_dir: RunDir, config: Config
) -> None:
    submitted(run_dir, "12", count=3)
    line = line_of(run_dir, config)
    assert line.num_tasks == {"submitted": 3}
    assert line.state == "queued"
    assert read_status(run_dir, config).is_active


def test_an_array_task_that_accounting_dropped_was_cancelled(
    slurm: FakeSlurm, run_dir: RunDir
) -> None:
    submitted(run_dir, "12", count=4, at=LONG_AGO)
    slurm.says("sacct", "12_0|COMPLETED|0:0\n12_[2-3]|CANCELLED by 7|0:0\n")
    states = [task.state for task in read_jobs(run_dir).tasks]
    assert states == ["COMPLETED", "CANCELLED", "CANCELLED", "CANCELLED"]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("12_[0-2,7%4]", [0, 1, 2, 7]),
        ("12_[0-8:4]", [0, 4, 8]),
        ("12_[1,3-4,7...%2]", [1, 3, 4]),
        ("12_5", [5]),
    ],
)
def test_names_of_arrays_are_taken_apart(name: str, numbers: list[int]) -> None:
    assert list(expand_job_id(name)) == [f"12_{number}" for number in numbers]


def test_dependent_jobs_name_the_stage_that_failed(
    slurm: FakeSlurm, run_dir: RunDir, config: Config
) -> None:
    for number, stage in enumerate(("generate", "dataset", "sft", "evaluate"), start=10):
        submitted(run_dir, str(number), stage)
    slurm.says("sacct", "10|TIMEOUT|0:0\n11|CANCELLED|0:0\n12|CANCELLED by 0|0:0\n13|PENDING|0:0\n")
    lines = {line.stage: line for line in read_status(run_dir, config).stages}
    assert lines["generate"].state == "failed"
    assert lines["dataset"].state == lines["sft"].state == "cancelled"
    assert lines["dataset"].note == lines["sft"].note == "generate failed"
    assert lines["evaluate"].note == "waits in vain: generate failed"
    assert "generate failed" in shown(run_dir, config)


def test_slurm_out_of_reach_is_said_and_files_speak(
    slurm: FakeSlurm, run_dir: RunDir, config: Config
) -> None:
    submitted(run_dir, "12")
    started(run_dir, "generate")
    slurm.says("sacct", "", error="sacct: error: no route to host\n")
    slurm.says("squeue", "", error="squeue: error: timed out\n")
    status = read_status(run_dir, config)
    assert "no route" in status.slurm_trouble
    assert line_of(run_dir, config).state == "started"
    assert "Slurm can't be asked: sacct: sacct: error: no route" in shown(run_dir, config)
    assert not status.is_active


def test_the_queue_speaks_where_accounting_is_away(
    slurm: FakeSlurm, run_dir: RunDir, config: Config
) -> None:
    submitted(run_dir, "12")
    slurm.says("sacct", "", error="sacct: error: Connection refused\n")
    slurm.says("squeue", "12|RUNNING|None\n")
    status = read_status(run_dir, config)
    assert line_of(run_dir, config).state == "running"
    assert "Connection refused" in status.slurm_trouble


def test_json_has_the_tasks(slurm: FakeSlurm, run_dir: RunDir, config: Config) -> None:
    submitted(run_dir, "12", count=2)
    slurm.says("sacct", "12_0|RUNNING|0:0\n12_1|NODE_FAIL|0:9\n")
    value = json.loads(status_json(read_status(run_dir, config)))
    assert value["tasks"][1] == {
        "job_id": "12_1", "stage": "generate", "index": 1, "state": "NODE_FAIL", "reason": "0:9",
    }  # fmt: skip
    assert value["stages"][2]["num_tasks"] == {"running": 1, "node_fail": 1}


def test_restarts_and_tokens_come_from_files(
    slurm: FakeSlurm, run_dir: RunDir, config: Config
) -> None:
    (run_dir.metrics / "generate-000.starts.jsonl").write_text('{"job": "1"}\n' * 3)
    (run_dir.metrics / "generate-001.starts.jsonl").write_text('{"job": "1"}\n')
    (run_dir.metrics / "restarts.jsonl").write_text('{"stage": "generate", "restarts": 2}\n')
    run_dir.sft.mkdir()
    (run_dir.sft / "metrics.jsonl").write_text('{"step": 0, "held_out_loss": 6.0}\n')
    assert line_of(run_dir, config, "sft").tokens_per_s is None
    (run_dir.sft / "metrics.jsonl").write_text('{"tokens_per_s": 5.0}\n{"tokens_per_s": 7.5}\n')
    assert line_of(run_dir, config).restarts == 4
    assert line_of(run_dir, config, "sft").tokens_per_s == 7.5


def test_slurm_is_asked_ever_more_rarely_while_nothing_changes(
    slurm: FakeSlurm, run_dir: RunDir
) -> None:
    submitted(run_dir, "12")
    slurm.says("sacct", "12|PENDING|0:0\n")
    now = [0.0]
    poll = JobPoll(run_dir, clock=lambda: now[0])
    asked = []
    for second in range(0, 300, 2):
        now[0] = float(second)
        before = len(slurm.calls("sacct"))
        poll.read()
        if len(slurm.calls("sacct")) > before:
            asked.append(second)
    assert asked == [0, 10, 30, 70, 130, 190, 250]
    slurm.says("sacct", "12|RUNNING|0:0\n")
    now[0] = 320.0
    assert poll.read().tasks[0].state == "RUNNING"
    slurm.says("sacct", "", error="down\n")
    now[0] = 331.0
    last = poll.read()
    assert last.trouble
    assert last.is_active


def test_cancel_touches_the_run_and_nothing_else(slurm: FakeSlurm, run_dir: RunDir) -> None:
    submitted(run_dir, "12", count=3, at=1.0)
    submitted(run_dir, "13", "dataset", at=2.0)
    slurm.says(
        "squeue",
        "12_0|COMPLETED|None\n12_1|RUNNING|None\n12_2|PENDING|Resources\n13|PENDING|Dependency\n"
        "120|RUNNING|None\n12_7|RUNNING|None\n",
    )
    assert [job.job_id for job in cancel_run(run_dir)] == ["13", "12_1", "12_2"]
    assert slurm.calls("scancel") == ["13 12"]
    assert (run_dir.slurm / "cancelled").exists()


def test_cancel_goes_in_batches_and_reports_refusals(slurm: FakeSlurm, run_dir: RunDir) -> None:
    for number in range(501):
        submitted(run_dir, str(number + 1))
    slurm.says("squeue", "".join(f"{number + 1}|RUNNING|None\n" for number in range(501)))
    assert len(cancel_run(run_dir)) == 501
    assert [len(call.split()) for call in slurm.calls("scancel")] == [500, 1]
    slurm.says("scancel", "", error="scancel: error: Invalid job id 12_3\n")
    cancel_run(run_dir)
    slurm.says("scancel", "", error="scancel: error: Access denied\n")
    with pytest.raises(ClusterError, match="Access denied"):
        cancel_run(run_dir)


def test_cancel_needs_jobs(slurm: FakeSlurm, run_dir: RunDir, config: Config) -> None:
    with pytest.raises(UsageError, match="no job records"):
        cancel_run(run_dir)
    assert not (run_dir.slurm / "cancelled").exists()
    submitted(run_dir, "12")
    done = CliRunner().invoke(app, ["cancel", str(run_dir.root)])
    assert done.exit_code == 0
    assert "nothing to cancel" in done.output
    assert slurm.calls("scancel") == []


def test_logs_of_failed_tasks_come_first(slurm: FakeSlurm, run_dir: RunDir, config: Config) -> None:
    submitted(run_dir, "12", count=4)
    slurm.says("sacct", "12_0|COMPLETED|0:0\n12_1|RUNNING|0:0\n12_2|FAILED|1:0\n12_3|FAILED|2:0\n")
    for number in range(3):
        run_dir.log(f"generate-{number:03d}").write_text(f"a\nlog {number}\nend {number}\n")
    (run_dir.slurm / "12_3_0_log.out").write_text("no python here\n")
    logs = find_logs(run_dir, config, read_jobs(run_dir), None)
    assert [log.task[-1] for log in logs] == ["2", "3", "1", "0"]
    text = list(logs_text(logs, 2))
    assert text[0] == f"FAILED (exit 1:0)  generate-002  {run_dir.log('generate-002')}"
    assert text[1:3] == ["    log 2", "    end 2"]
    assert "    no python here" in text
    assert text[-1].startswith("completed")
    with pytest.raises(UsageError, match="no stage"):
        find_logs(run_dir, config, read_jobs(run_dir), "nothing")


def test_logs_know_the_ranks_of_a_worker(slurm: FakeSlurm, run_dir: RunDir, config: Config) -> None:
    site = config.site.model_copy(update={"ranks_per_worker": 2})
    config = config.model_copy(update={"site": site})
    submitted(run_dir, "12", count=2)
    slurm.says("sacct", "12_0|COMPLETED|0:0\n12_1|FAILED|1:0\n")
    for number in range(4):
        run_dir.log(f"generate-{number:03d}").write_text("x\n")
    logs = find_logs(run_dir, config, read_jobs(run_dir), "generate")
    assert [(log.task[-1], log.group) for log in logs] == [
        ("2", "failed"), ("3", "failed"), ("0", "other"), ("1", "other"),
    ]  # fmt: skip


def test_logs_of_a_local_run_need_no_slurm(
    slurm: FakeSlurm, run_dir: RunDir, config: Config
) -> None:
    run_dir.log("policy-000").write_text("fine\n")
    run_dir.log("policy-001").write_text("bar 1 %\rbar 2 %\nbroken\n")
    (run_dir.metrics / "policy-001.error.txt").write_text("broken\n")
    done = CliRunner().invoke(app, ["logs", str(run_dir.root), "--lines", "2"])
    assert done.exit_code == 0
    assert done.output.splitlines()[:3] == [
        f"failed  policy-001  {run_dir.log('policy-001')}", "    bar 2 %", "    broken",
    ]  # fmt: skip
    assert slurm.calls("sacct") == []


def test_last_lines_of_an_empty_or_long_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"")
    assert last_lines(path, 3) == [""]
    path.write_bytes(b"\xff\n" + b"x\n" * 300_000)
    assert last_lines(path, 2) == ["x", "x"]
    assert last_lines(path, 0) == []
