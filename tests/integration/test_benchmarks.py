"""lm-evaluation-harness on a tiny task of our own, offline."""

import json
from pathlib import Path

import pytest

from teams_hpc.config import load_config
from teams_hpc.errors import WorkError
from teams_hpc.evaluation.benchmarks import run_benchmarks

pytestmark = pytest.mark.filterwarnings("ignore::Warning")  # the harness and its dependencies warn

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["yes", "no"]
metric_list:
  - metric: acc
"""


def make_config(folder: Path, *words: str):  # type: ignore[no-untyped-def]
    path = folder / "run.yaml"
    path.write_text("name: b\n")
    return load_config(path, words)


def test_a_local_task_is_scored_for_each_model(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = tasks / "data.jsonl"
    lines = [{"question": f"Is {n} even?", "answer": n % 2} for n in range(8)]
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tasks / "tiny.yaml").write_text(TASK.format(data=data))
    config = make_config(
        tmp_path, "evaluate.lm_eval_tasks=[tiny_choice]", f"evaluate.lm_eval_path={tasks}"
    )
    scores = run_benchmarks(config, {"tuned": tiny_llama})
    accuracy = scores["tuned"]["tiny_choice"]["acc,none"]
    assert accuracy in [n / 8 for n in range(9)]
    unknown = make_config(tmp_path, "evaluate.lm_eval_tasks=[no_such_task]")
    with pytest.raises(WorkError, match=r"no task no_such_task; give the folder"):
        run_benchmarks(unknown, {"tuned": tiny_llama})


def test_without_tasks_nothing_is_loaded(tmp_path: Path) -> None:
    assert run_benchmarks(make_config(tmp_path), {}) == {}
