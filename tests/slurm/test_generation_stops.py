"""Generation that loses a node or a process makes the rows of a quiet run."""

import os
import signal
from pathlib import Path

import pytest
from chat_server import ChatServer

from slurm.cluster import SlurmCluster
from slurm.disturbances import (
    ALONE,
    expert_words,
    finish_stage,
    ranks,
    submit_until_midst,
    verify_rows,
)
from slurm.runs import output, quiet_rows, records, rows, starts, submit


@pytest.mark.slurm_long
def test_a_lost_node(cluster: SlurmCluster, server: ChatServer, tmp_path: Path) -> None:
    root = submit_until_midst(cluster, server, tmp_path, ALONE)
    [array] = records(root, "generate")
    [lost], [other] = (cluster.find(task) for task in array.task_ids)
    assert lost["NodeList"] != other["NodeList"]
    cluster.node_down(lost["NodeList"])
    server.delay_s = 0.0
    finish_stage(cluster, root, "dataset")
    cluster.cancel_all()
    assert starts(root, "generate-000") == [(lost["JobId"], 0), (lost["JobId"], 1)], output(root)
    assert starts(root, "generate-001") == [(other["JobId"], 0)]
    quiet = quiet_rows(tmp_path / "config.yaml", tmp_path / "quiet", *expert_words(server))
    assert rows(root) == quiet
    verify_rows(cluster, root)


@pytest.mark.slurm_long
def test_a_killed_process_fails_the_task_and_submitting_again_goes_on(
    cluster: SlurmCluster, server: ChatServer, tmp_path: Path
) -> None:
    words = ("site.slurm.stages.generate.cpus_per_task=4", "site.ranks_per_worker=2")
    root = submit_until_midst(cluster, server, tmp_path, *words)
    [array] = records(root, "generate")
    [killed] = cluster.find(array.task_ids[0])
    [victim] = ranks(root, job=killed["JobId"], rank=1)
    os.kill(victim, signal.SIGKILL)
    cluster.wait_for(array.task_ids[0], "FAILED", timeout=60)
    server.delay_s = 0.0
    cluster.wait_for(array.task_ids[1], "COMPLETED", timeout=60)
    [waiting] = records(root, "dataset")
    cluster.wait_for(waiting.job_id, "CANCELLED", timeout=60)
    submit(cluster, tmp_path / "config.yaml", *expert_words(server), *words)
    finish_stage(cluster, root, "dataset")
    cluster.cancel_all()
    assert records(root, "generate") == [array]  # the other one made what was missing
    quiet = quiet_rows(tmp_path / "config.yaml", tmp_path / "quiet", *expert_words(server))
    assert rows(root) == quiet
