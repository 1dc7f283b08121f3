"""Submitting again, failing, cancelling, odd folder names, and commands the tasks lack."""

import json
import os
from pathlib import Path

import pytest

from slurm.cluster import SlurmCluster
from slurm.runs import (
    command,
    final_status,
    finish,
    output,
    quiet_rows,
    records,
    rows,
    starts,
    submit,
    verify,
    wait_for_end,
    write_config,
)

UNIFORM = "generate.policy=uniform"


def job_ids(root: Path) -> list[str]:
    return [record.job_id for record in records(root)]


@pytest.mark.slurm_long
def test_a_second_submit_adopts_and_a_third_finds_all_done(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    config, root = write_config(tmp_path), tmp_path / "run"
    submit(cluster, config, UNIFORM)
    before = job_ids(root)
    said = submit(cluster, config, UNIFORM)
    assert "submitted" not in said
    assert said.count("adopted") == 5
    assert job_ids(root) == before
    finish(cluster, root)
    said = submit(cluster, config, UNIFORM)
    assert [line.split()[1] for line in said.splitlines()] == ["done"] * 5
    assert job_ids(root) == before
    assert rows(root) == quiet_rows(config, tmp_path / "quiet", UNIFORM)


@pytest.mark.slurm_long
def test_after_a_failed_member_only_what_is_missing_is_submitted(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    config, root = write_config(tmp_path), tmp_path / "run"
    blocked = root / "policy" / "member-001"
    blocked.parent.mkdir(parents=True)
    root.chmod(0o700)
    blocked.write_text("a file where a folder should be")
    submit(cluster, config)
    wait_for_end(cluster, root, 90)
    states = {line["stage"]: line["state"] for line in final_status(cluster, root)["stages"]}
    assert states["policy"] == "failed"
    assert set(states.values()) == {"failed", "cancelled"}
    assert (root / "policy" / "member-000" / "result.json").exists()
    shown = command(cluster, "logs", str(root), folder=tmp_path)
    assert "policy-001" in shown.text.splitlines()[0], shown.text

    blocked.unlink()
    said = submit(cluster, config)
    assert said.count("submitted 1 tasks") == 6  # one member, and all but the two workers' stage
    assert records(root, "policy")[-1].indices == (1,)
    finished = records(root, "select")[-1].job_id
    cluster.wait_for(finished, "COMPLETED", timeout=60)
    assert len(starts(root, "policy-000")) == 1
    cluster.cancel_all()


@pytest.mark.slurm_long
def test_odd_folder_names(cluster: SlurmCluster, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    root = tmp_path / "a b'c\"d;touch x $(touch y)\nz"
    folder = str(root).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    submit(cluster, config, UNIFORM, f'run_dir="{folder}"')
    finish(cluster, root)
    verify(cluster, root)
    assert not list(tmp_path.rglob("[xy]"))
    assert rows(root) == quiet_rows(config, tmp_path / "quiet", UNIFORM)


def test_a_percent_sign_in_the_folder_is_refused(cluster: SlurmCluster, tmp_path: Path) -> None:
    said = submit(cluster, write_config(tmp_path), f"run_dir={tmp_path}/100%j", code=2)
    assert "%" in said
    assert not cluster.active()
    assert not (tmp_path / "100%j").exists()


@pytest.mark.slurm_long
def test_cancelled_jobs_stay_cancelled_and_others_go_on(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    config, root = write_config(tmp_path), tmp_path / "run"
    other = cluster.submit("sleep 25", folder=tmp_path)
    submit(cluster, config, "policy.iterations=2000")
    (array,) = records(root, "policy")
    cluster.wait_for(f"{array.job_id}_1", "RUNNING", timeout=60)
    said = command(cluster, "cancel", str(root), folder=tmp_path)
    assert said.code == 0, said.text
    wait_for_end(cluster, root, 60)
    assert {job["JobState"] for r in records(root) for job in cluster.find(r.job_id)} == {
        "CANCELLED"
    }, output(root)
    cluster.wait_for(other, "COMPLETED", timeout=60)
    assert not cluster.active()
    assert all(len(starts(root, f"policy-{i:03d}")) == 1 for i in range(2))


@pytest.mark.slurm_long
def test_scancel_is_not_a_request_to_come_back(cluster: SlurmCluster, tmp_path: Path) -> None:
    root = tmp_path / "run"
    submit(cluster, write_config(tmp_path), "policy.iterations=2000")
    (array,) = records(root, "policy")
    cluster.wait_for(f"{array.job_id}_1", "RUNNING", timeout=60)
    cluster.run("scancel", array.job_id)
    wait_for_end(cluster, root, 60)
    assert {job["JobState"] for job in cluster.find(array.job_id)} == {"CANCELLED"}, output(root)


@pytest.mark.slurm_long
def test_tasks_that_have_no_slurm_commands_are_requeued_by_their_batch_script(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    """As in a container: the tasks' PATH has Python alone, the batch script's has everything."""
    empty = tmp_path / "bin"
    empty.mkdir()
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        f"import os\nif 'SLURM_STEP_ID' in os.environ:\n    os.environ['PATH'] = {str(empty)!r}\n"
    )
    config, root = write_config(tmp_path), tmp_path / "run"
    python_path = f"{site}:{os.environ.get('PYTHONPATH', '')}"
    limits = ("site.slurm.stages.policy.time_min=1", "site.slurm.warning_s=30")
    words = ("policy.iterations=200", "policy.num_envs=32", *limits)
    submit(cluster, config, *words, f"site.slurm.environment={{PYTHONPATH: '{python_path}'}}")
    select = records(root, "select")[-1].job_id
    cluster.wait_for(select, "COMPLETED", timeout=240)
    cluster.cancel_all()
    assert [restart for _, restart in starts(root, "policy-000")][:2] == [0, 1]
    for index in range(2):  # none lost, none doubled
        member = root / "policy" / f"member-{index:03d}"
        assert (member / "result.json").exists()
        lines = (member / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["iteration"] for line in lines] == list(range(1, 201))
