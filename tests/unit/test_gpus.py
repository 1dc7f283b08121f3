"""Which GPUs each process takes: by `run`, by a launcher that binds nothing, by one that does."""

import os
from pathlib import Path

import pytest

from teams_hpc.config import Config
from teams_hpc.pipeline.graph import find_stage
from teams_hpc.pipeline.local import stage_tasks
from teams_hpc.pipeline.task import _take_own_gpus
from teams_hpc.runtime.gpus import GPUS_VARIABLE
from teams_hpc.runtime.ranks import Ranks
from teams_hpc.storage.run_dir import RunDir

# What is visible (None: not set), GPUs of the node, GPUs of a process, and whose is what.
CASES = [
    (None, 4, 1, ["0", "1", "2", "3"]),
    (None, 4, 1, ["0", "1"]),
    (None, 2, 1, ["0", "1", "0", "1"]),
    (None, 4, 2, ["0,1", "2,3", "0,1"]),
    ("0,1,2,3", 4, 1, ["0", "1", "2", "3"]),
    ("0,1,2,3", 4, 2, ["0,1", "2,3"]),
    ("0,1,2,3", 4, 2, ["0,1", "2,3", "0,1", "2,3"]),
    ("0,1", 4, 1, ["0", "1", "0", "1"]),
    ("5,7,8", 4, 1, ["5", "7", "8", "5"]),
    ("5,7,8", 4, 2, ["5,7", "5,7"]),
    ("5,7,8", 2, 1, ["5", "7", "5"]),
    ("5,7", 4, 4, ["5,7", "5,7"]),
    ("0,1", 0, 1, ["0", "1", "0"]),
    ("GPU-8f,MIG-3a", 2, 1, ["GPU-8f", "MIG-3a"]),
    ("", 4, 1, ["", ""]),
    ("", 4, 2, ["", ""]),
    ("-1", 4, 1, ["-1", "-1"]),
    (None, 0, 1, [None, None]),
]


def make_config(num_gpus: int, count: int = 1, **site: int) -> Config:
    values = {"name": "t", "site": {"gpus_per_node": num_gpus, **site}}
    if count > 1:
        values["expert"] = {"kind": "vllm", "model": "/m", "tensor_parallel_size": count}
    return Config.model_validate(values)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without what this machine or a job around the tests has set."""
    for name in (GPUS_VARIABLE, "SLURM_GPUS_ON_NODE"):
        monkeypatch.setenv(name, "")  # so that it is put back, whatever sets it
        monkeypatch.delenv(name)
    return monkeypatch


def see(environment: pytest.MonkeyPatch, visible: str | None) -> None:
    if visible is None:
        environment.delenv(GPUS_VARIABLE, raising=False)
    else:
        environment.setenv(GPUS_VARIABLE, visible)


def taken(
    environment: pytest.MonkeyPatch, visible: list[str | None], config: Config
) -> list[str | None]:
    """What the ranks of a node end up with, each of which was shown its part of `visible`."""
    found = []
    for place, shown in enumerate(visible):
        see(environment, shown)
        ranks = Ranks(rank=place, world_size=8, local_rank=place, local_world_size=len(visible))
        _take_own_gpus(config, find_stage(config, "generate"), ranks)
        found.append(os.environ.get(GPUS_VARIABLE))
    return found


@pytest.mark.parametrize(("visible", "num_gpus", "count", "expected"), CASES)
def test_ranks_and_local_workers_share_by_one_rule(
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
    visible: str | None,
    num_gpus: int,
    count: int,
    expected: list[str | None],
) -> None:
    config = make_config(num_gpus, count, num_workers=len(expected))
    see(environment, visible)
    stage = find_stage(config, "generate")
    tasks = stage_tasks(RunDir(tmp_path), config, stage)
    assert [task.environment.get(GPUS_VARIABLE) for task in tasks] == expected
    assert taken(environment, [visible] * len(expected), config) == expected


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        (["0", "1", "2", "3"], 1, ["0", "1", "2", "3"]),
        (["0,1", "2,3"], 2, ["0,1", "2,3"]),
        (["0", "2"], 2, ["0", "2"]),
        (["0,1", "2,3"], 1, ["0", "3"]),
        (["0,1", "2,3", "4,5"], 1, ["0", "3", "4"]),
    ],
)
def test_what_a_launcher_gave_each_rank_stays_its_own(
    environment: pytest.MonkeyPatch, visible: list[str | None], count: int, expected: list[str]
) -> None:
    """As srun does with --gpus-per-task or --gpu-bind=single:1; the first rank isn't special."""
    assert taken(environment, visible, make_config(8, count)) == expected


def test_one_process_of_a_node_keeps_what_it_sees(environment: pytest.MonkeyPatch) -> None:
    for visible in ("2,3", "", None):
        assert taken(environment, [visible], make_config(4)) == [visible]


def test_a_job_with_a_part_of_a_node_takes_no_more(environment: pytest.MonkeyPatch) -> None:
    """As on Slurm 22.05, where --gpu-bind=none leaves the variable unset."""
    environment.setenv("SLURM_GPUS_ON_NODE", "2")
    assert taken(environment, [None] * 3, make_config(4)) == ["0", "1", "0"]
    assert taken(environment, ["1,2"] * 3, make_config(4)) == ["1", "2", "1"]
    assert taken(environment, [None] * 2, make_config(1)) == ["0", "0"]


def test_a_fine_tuning_sees_all_gpus(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its processes take theirs by their local rank."""
    config = make_config(2, num_sft_ranks=2)
    tasks = stage_tasks(RunDir(tmp_path), config, find_stage(config, "sft"))
    assert all(GPUS_VARIABLE not in task.environment for task in tasks)
