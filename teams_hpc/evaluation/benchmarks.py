"""ARC, HellaSwag and other tasks through lm-evaluation-harness (extra `eval`), offline."""

import os
from pathlib import Path
from typing import Any

from teams_hpc.config import Config
from teams_hpc.errors import WorkError
from teams_hpc.evaluation.losses import device_and_dtype


def run_benchmarks(config: Config, models: dict[str, Path]) -> dict[str, Any]:
    """Scores of each model on `evaluate.lm_eval_tasks`.

    Args:
        config: Names tasks, their folder, shots and limits.
        models: Hugging Face folders by name, for instance `base` and `tuned`.

    Returns:
        `{model: {task: {metric: number}}}`; empty without tasks.

    Raises:
        WorkError: The harness is missing, a task is unknown or its data isn't on this machine.
    """
    settings = config.evaluate
    if not settings.lm_eval_tasks:
        return {}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise WorkError("evaluate.lm_eval_tasks needs lm-eval: install the extra 'eval'") from None
    include = str(settings.lm_eval_path) if settings.lm_eval_path else None
    # The harness's own thousands of tasks are indexed only if one of them is asked for.
    manager = TaskManager(include_path=include, include_defaults=include is None)
    if not set(settings.lm_eval_tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include)
    unknown = [task for task in settings.lm_eval_tasks if task not in manager.all_tasks]
    if unknown:
        raise WorkError(
            f"evaluate.lm_eval_tasks: no task {', '.join(unknown)}; "
            "give the folder with its YAML as evaluate.lm_eval_path"
        )
    device, dtype = device_and_dtype()
    scores = {}
    for name, folder in models.items():
        try:
            found = simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "dtype": str(dtype).removeprefix("torch.")},
                device=device,
                tasks=list(settings.lm_eval_tasks),
                task_manager=manager,
                num_fewshot=settings.lm_eval_num_fewshot,
                limit=settings.lm_eval_limit,
                batch_size=settings.batch_size,
                random_seed=config.seed % 2**32,
                bootstrap_iters=settings.num_bootstrap,
            )
        except (OSError, ConnectionError) as error:
            raise WorkError(
                f"the data of a task in evaluate.lm_eval_tasks is not on this machine: {error}"
            ) from None
        scores[name] = {
            task: {key: value for key, value in result.items() if isinstance(value, int | float)}
            for task, result in found["results"].items()
        }
    return scores
