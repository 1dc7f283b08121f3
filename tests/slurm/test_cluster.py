"""The private cluster behaves as a Slurm cluster does; the other tests rely on that."""

import time
from pathlib import Path

import pytest

from slurm.cluster import ACCOUNT, QOS, CommandError, SlurmCluster, belongs_to, parse_job

TASK = """
echo "$SLURM_ARRAY_TASK_ID start $(date +%s.%N)" >> log
sleep 0.7
echo "$SLURM_ARRAY_TASK_ID end $(date +%s.%N)" >> log
"""
FIRST_RUN_WAITS = """
echo "${SLURM_RESTART_COUNT:-0} $SLURMD_NODENAME" >> log
test -n "${SLURM_RESTART_COUNT:-}" || sleep 120
"""


def lines_of(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


def wait_for_file(path: Path, timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.1)


def test_a_job_record_is_parsed() -> None:
    job = parse_job(
        "JobId=12 ArrayJobId=10 ArrayTaskId=3 JobName=two words NtasksPerN:B:S:C=0:0:*:* "
        "TRES=cpu=1,mem=500M Command=/a/run.sh JobId=99 Comment="
    )
    assert job["JobId"] == "12"
    assert job["JobName"] == "two words"
    assert job["NtasksPerN:B:S:C"] == "0:0:*:*"
    assert job["TRES"] == "cpu=1,mem=500M"
    assert all(belongs_to(job, job_id) for job_id in ("12", "10", "10_3"))
    assert not belongs_to(job, "3")


def test_an_array_runs_whole_and_within_its_throttle(cluster: SlurmCluster, tmp_path: Path) -> None:
    job_id = cluster.submit(TASK, "--array=0-7%2", folder=tmp_path)
    records = cluster.wait_for(job_id, "COMPLETED")
    events = sorted(lines_of(tmp_path / "log"), key=lambda event: float(event[2]))
    running, most = 0, 0
    for _, kind, _ in events:
        running += 1 if kind == "start" else -1
        most = max(most, running)
    assert len(records) == 8
    assert {event[0] for event in events} == set("01234567")
    assert most <= 2


def test_a_dependent_of_a_failed_job_leaves_the_queue(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    first = cluster.submit("sleep 1; exit 3", folder=tmp_path)
    options = (f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes")
    second = cluster.submit("touch ran", *options, folder=tmp_path)
    [failed] = cluster.wait_for(first, "FAILED")
    cluster.wait_for(second, "CANCELLED")
    assert failed["ExitCode"] == "3:0"
    assert not (tmp_path / "ran").exists()


def test_a_requeued_job_counts_its_restarts(cluster: SlurmCluster, tmp_path: Path) -> None:
    job_id = cluster.submit(FIRST_RUN_WAITS, "--requeue", folder=tmp_path)
    wait_for_file(tmp_path / "log")
    cluster.run("scontrol", "requeue", job_id)
    cluster.wait_for(job_id, "COMPLETED")
    assert [line[0] for line in lines_of(tmp_path / "log")] == ["0", "1"]


def test_the_job_of_a_lost_node_runs_again_on_another(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    job_id = cluster.submit(FIRST_RUN_WAITS, "--requeue", folder=tmp_path)
    wait_for_file(tmp_path / "log")
    [[_, lost]] = lines_of(tmp_path / "log")
    cluster.node_down(lost)
    cluster.wait_for(job_id, "COMPLETED")
    [_, [restarts, node]] = lines_of(tmp_path / "log")
    assert restarts == "1"
    assert node != lost
    cluster.node_up(lost)
    assert cluster.node_state(lost) == "IDLE"


def test_a_job_of_higher_priority_preempts(cluster: SlurmCluster, tmp_path: Path) -> None:
    node = f"--nodelist={cluster.nodes[0]}"
    low = cluster.submit(FIRST_RUN_WAITS, "--requeue", "--exclusive", node, folder=tmp_path)
    wait_for_file(tmp_path / "log")
    options = ("--partition=high", "--exclusive", node)
    high = cluster.submit("date +%s > high", *options, folder=tmp_path)
    cluster.wait_for(high, "COMPLETED")
    cluster.wait_for(low, "COMPLETED")
    assert [line[0] for line in lines_of(tmp_path / "log")] == ["0", "1"]


def test_gpus_are_handed_out(cluster: SlurmCluster, tmp_path: Path) -> None:
    job_id = cluster.submit("echo $CUDA_VISIBLE_DEVICES > seen", "--gres=gpu:2", folder=tmp_path)
    cluster.wait_for(job_id, "COMPLETED")
    assert (tmp_path / "seen").read_text().strip() == "0,1"


@pytest.mark.parametrize("option", ["--account=nobodys", "--qos=nobodys"])
def test_unknown_account_and_qos_are_refused(
    cluster: SlurmCluster, tmp_path: Path, option: str
) -> None:
    with pytest.raises(CommandError, match=r"Invalid (account|qos)"):
        cluster.submit("true", option, folder=tmp_path)


def test_accounting_tells_how_jobs_ended(cluster: SlurmCluster, tmp_path: Path) -> None:
    own = (f"--account={ACCOUNT}", f"--qos={QOS}")
    good = cluster.submit("true", *own, folder=tmp_path)
    bad = cluster.submit("exit 3", *own, folder=tmp_path)
    columns = "--format=JobID,State,ExitCode,Account,QOS"
    expected = {(good, "COMPLETED", "0:0", ACCOUNT, QOS), (bad, "FAILED", "3:0", ACCOUNT, QOS)}
    deadline = time.monotonic() + 40
    seen: set[tuple[str, ...]] = set()
    while seen != expected:  # the database learns of a job's end some seconds later
        assert time.monotonic() < deadline, seen
        text = cluster.run("sacct", "-X", "-n", "-P", columns, "-j", f"{good},{bad}")
        seen = {tuple(line.split("|")) for line in text.splitlines()}
        time.sleep(0.3)
