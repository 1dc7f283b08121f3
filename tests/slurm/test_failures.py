"""Stages that fail or never get on: what leaves the queue, and what `status` says of it."""

from pathlib import Path

import pytest

from slurm import runs
from slurm.cluster import SlurmCluster

UNIFORM = "generate.policy=uniform"
DEAD_EXPERT = "expert={kind: http, base_url: 'http://127.0.0.1:1/v1', model: m, max_retries: 0}"
NO_ROWS = "dataset={decontaminate: [common.txt], decontamination_ngram: 1}"


def ends(cluster: SlurmCluster, root: Path) -> dict[str, set[str]]:
    """How the jobs of each stage ended in Slurm, its last submission alone."""
    last = {record.stage: record.job_id for record in runs.records(root)}
    return {
        stage: {job["JobState"] for job in cluster.find(job_id)} for stage, job_id in last.items()
    }


@pytest.mark.parametrize(
    ("failing", "fault"),
    [
        ("generate", DEAD_EXPERT),
        pytest.param("dataset", NO_ROWS, marks=pytest.mark.slurm_long),
    ],
)
def test_what_depends_on_a_failed_stage_leaves_the_queue(
    cluster: SlurmCluster, tmp_path: Path, failing: str, fault: str
) -> None:
    config, root = runs.write_config(tmp_path), tmp_path / "run"
    (tmp_path / "common.txt").write_text("a an and for in is of or the to what with your you\n")
    runs.submit(cluster, config, UNIFORM, fault)
    runs.wait_for_end(cluster, root, 60)
    assert not cluster.active()
    order = [record.stage for record in runs.records(root)]
    later = order[order.index(failing) + 1 :]
    found = ends(cluster, root)
    assert "FAILED" in found[failing], runs.output(root)
    assert {stage: found[stage] for stage in later} == {stage: {"CANCELLED"} for stage in later}

    said = runs.final_status(cluster, root)
    lines = {line["stage"]: line for line in said["stages"]}
    assert lines[failing]["state"] == "failed"
    assert lines[failing]["error"], said
    assert Path(lines[failing]["log"]).is_file()
    for stage in later:
        assert lines[stage]["state"] == "cancelled", said
        assert lines[stage]["note"] == f"{failing} failed"
    assert "Traceback" not in lines[failing]["error"]


@pytest.mark.slurm_long
@pytest.mark.timeout(400)
def test_a_stage_that_never_gets_on_is_not_restarted_for_ever(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """The warning comes before the first iteration, each time."""
    config, root = runs.write_config(tmp_path), tmp_path / "run"
    words = ("policy.num_members=1", "site.max_restarts_without_progress=1")
    limits = ("site.slurm.stages.policy.time_min=1", "site.slurm.warning_s=58")
    runs.submit(cluster, config, *words, *limits)
    runs.wait_for_end(cluster, root, 150)
    [first] = runs.records(root, "policy")
    assert runs.starts(root, "policy-000") == [(first.job_id, n) for n in range(3)]
    found = ends(cluster, root)
    assert found.pop("policy") == {"FAILED"}, runs.output(root)
    assert set(map(frozenset, found.values())) == {frozenset({"CANCELLED"})}
    said = runs.final_status(cluster, root)["stages"][0]
    assert said["state"] == "failed"
    assert "was restarted 2 times without progress" in said["error"]
    assert "site.slurm.time_min" in said["error"]

    runs.submit(cluster, config, *words)
    [_, second] = runs.records(root, "policy")
    cluster.wait_for(second.job_id, "COMPLETED", timeout=60)
    assert runs.starts(root, "policy-000")[3:] == [(second.job_id, 0)]
