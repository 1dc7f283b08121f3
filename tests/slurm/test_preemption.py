"""A job of higher priority takes a node: what Slurm, accounting and the run say of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_server import ChatServer

from slurm.cluster import SlurmCluster, temporary_cluster
from slurm.conftest import require_slurm
from slurm.disturbances import (
    ALONE,
    accounting,
    expert_words,
    finish_stage,
    stops,
    submit_until_midst,
    take_node,
    verify_rows,
    wait_until,
)
from slurm.runs import TINY, output, quiet_rows, records, rows, starts, submit, write_config


@pytest.fixture
def silent() -> Iterator[SlurmCluster]:
    """A cluster that doesn't send a job's own warning before preemption, as is Slurm's default."""
    require_slurm()
    with temporary_cluster(with_accounting=False) as running:
        conf = Path(running.environment["SLURM_CONF"])
        text = conf.read_text()
        changed = text.replace("SlurmctldParameters=preempt_send_user_signal\n", "")
        assert changed != text
        conf.write_text(changed)
        running.run("scontrol", "reconfigure")
        yield running


@pytest.mark.slurm_long
@pytest.mark.parametrize("index", [0, 1])  # the last one has the number of the whole array
def test_one_task_of_two_is_preempted_and_the_other_is_not_touched(
    cluster: SlurmCluster, server: ChatServer, tmp_path: Path, index: int
) -> None:
    root = submit_until_midst(cluster, server, tmp_path, ALONE)
    [array] = records(root, "generate")
    task, other = array.task_ids[index], array.task_ids[1 - index]
    [before], [untouched] = cluster.find(task), cluster.find(other)
    assert before["JobState"] == "RUNNING"
    assert before["NodeList"] != untouched["NodeList"]
    take_node(cluster, before["NodeList"], tmp_path)
    server.delay_s = 0.0
    finish_stage(cluster, root, "dataset")
    cluster.cancel_all()

    job, other_job = before["JobId"], untouched["JobId"]
    assert stops(root) == [f"{job}-0"], output(root)
    assert starts(root, f"generate-{index:03d}") == [(job, 0), (job, 1)]
    assert starts(root, f"generate-{1 - index:03d}") == [(other_job, 0)]
    assert accounting(cluster, task) == ["REQUEUED", "COMPLETED"]
    assert accounting(cluster, other) == ["COMPLETED"]
    assert len(records(root, "generate")) == 1
    quiet = quiet_rows(tmp_path / "config.yaml", tmp_path / "quiet", *expert_words(server))
    assert rows(root) == quiet
    verify_rows(cluster, root)


@pytest.mark.slurm_long
def test_a_job_preempted_in_its_first_moment_comes_back_once(
    cluster: SlurmCluster, server: ChatServer, tmp_path: Path
) -> None:
    """The warning may find no step, or one that still imports."""
    server.delay_s = 1.0  # it can't end within the grace time
    root = tmp_path / "run"
    words = (*expert_words(server), "site.num_workers=1")
    submit(cluster, write_config(tmp_path, TINY), *words)
    [job] = records(root, "generate")
    [found] = cluster.wait_for(job.job_id, "RUNNING", timeout=30)
    take_node(cluster, found["NodeList"], tmp_path)
    server.delay_s = 0.0
    finish_stage(cluster, root, "dataset")
    cluster.cancel_all()
    [found] = cluster.find(job.job_id)
    assert found["Restarts"] == "1", output(root)
    assert accounting(cluster, job.job_id)[1:] == ["COMPLETED"]
    assert starts(root, "generate-000")[-1] == (job.job_id, 1)
    wait_until(lambda: not cluster.active(), "an empty queue")
    quiet = quiet_rows(tmp_path / "config.yaml", tmp_path / "quiet", *expert_words(server))
    assert rows(root) == quiet


@pytest.mark.slurm_long
def test_a_warning_to_every_process_of_a_job_stops_it_once_and_kills_nothing(
    cluster: SlurmCluster, server: ChatServer, tmp_path: Path
) -> None:
    """The batch shell and `srun` get it too, as with `scancel --full`."""
    root = submit_until_midst(cluster, server, tmp_path, "site.num_workers=1")
    [record] = records(root, "generate")
    job = record.job_id
    cluster.run("scancel", "--full", "--signal=USR2", job)
    wait_until(lambda: stops(root), "a stop")
    server.delay_s = 0.0
    finish_stage(cluster, root, "dataset")
    cluster.cancel_all()
    assert stops(root) == [f"{job}-0"], output(root)
    assert starts(root, "generate-000") == [(job, 0), (job, 1)]
    assert accounting(cluster, job) == ["REQUEUED", "COMPLETED"]
    quiet = quiet_rows(tmp_path / "config.yaml", tmp_path / "quiet", *expert_words(server))
    assert rows(root) == quiet


@pytest.mark.slurm_long
def test_where_slurm_sends_only_term_before_it_preempts(
    silent: SlurmCluster, server: ChatServer, tmp_path: Path
) -> None:
    shape = ("site.ranks_per_worker=2", "site.slurm.stages.generate.cpus_per_task=4")
    root = submit_until_midst(silent, server, tmp_path, *shape)
    [array] = records(root, "generate")
    [before] = silent.find(array.task_ids[0])
    take_node(silent, before["NodeList"], tmp_path)
    server.delay_s = 0.0
    finish_stage(silent, root, "dataset")
    silent.cancel_all()
    assert stops(root) == [f"{before['JobId']}-0"], output(root)
    assert [n for _, n in starts(root, "generate-000")] == [0, 1]
    assert "stopped on SIGTERM" in output(root)
    quiet = quiet_rows(tmp_path / "config.yaml", tmp_path / "quiet", *expert_words(server))
    assert rows(root) == quiet
