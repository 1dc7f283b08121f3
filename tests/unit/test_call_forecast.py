"""What a run will ask, by hand: 10 seeds, 2 members, 3 iterations of 4 episodes of 5 operations."""

from pathlib import Path
from typing import Any

import pytest

from teams_hpc.config import Config
from teams_hpc.config.digest import STAGE_KEYS, stage_inputs
from teams_hpc.report.call_forecast import (
    Forecast,
    Measured,
    forecast_calls,
    forecast_lines,
    measure,
)
from teams_hpc.rewriting.seeds import read_seeds
from teams_hpc.rewriting.splits import split_seeds
from teams_hpc.storage.atomic import read_json, write_json
from teams_hpc.storage.run_dir import RunDir

NUM_SEEDS = 10


def make_config(folder: Path, **changes: Any) -> Config:
    seeds = folder / "seeds.txt"
    names = "copper iron gold tin lead zinc silver nickel cobalt radium".split()
    seeds.write_text("".join(f"Explain where {name} comes from.\n" for name in names))
    values: dict[str, Any] = {
        "name": "t",
        "seeds": {"path": seeds},
        "policy": {
            "num_members": 2,
            "iterations": 3,
            "num_envs": 4,
            "episode_length": 5,
            "num_eval_episodes": 2,
        },
        "generate": {"num_trajectories": 2, "num_steps": 3},
        "expert": {"kind": "template", "max_tokens": 100},
        "reviewer": {"kind": "template"},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value}
    return Config.model_validate(values)


def calls(forecast: Forecast) -> dict[tuple[str, str], int]:
    return {(line.ask.stage, line.ask.what): line.ask.most for line in forecast.lines}


def test_most_calls_by_hand(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    seeds = read_seeds(config.seeds.path, None).seeds
    splits = list(split_seeds(seeds, config.seeds, config.seed).values())
    num_select, num_report = splits.count("policy_select"), splits.count("policy_report")
    assert num_select
    assert len(seeds) == NUM_SEEDS
    episodes = (2 * num_select + 3 * (num_report if num_report > 1 else 0)) * 2
    found = forecast_calls(config)
    assert calls(found) == {
        ("policy", "rewrites"): 2 * 3 * 4 * 5,
        ("policy", "verdicts"): 2 * 3 * 4 * 5 + 2 * 20,
        ("select", "rewrites"): episodes * 5,
        ("select", "verdicts"): episodes * 5 + 20,
        ("generate", "rewrites"): 10 * 2 * 3,
        ("generate", "verdicts"): 10 * 2 * 3,
        ("generate", "answers"): 10 * 2 * 3,
    }
    assert found.most("expert") == 120
    assert found.expected("expert") == 60 + 0.8 * 60
    text = "\n".join(forecast_lines(found))
    assert "120 calls at most, 0.0192 % of WizardLM's 624,000; 108 expected, 0.0173 %" in text
    assert "$" not in text
    assert "GPU" not in text
    assert "assumed: 90 % of rewrites judged" in text


def test_settings_that_change_the_number_of_calls(tmp_path: Path) -> None:
    every = calls(forecast_calls(make_config(tmp_path, policy={"compare_with": "every_earlier"})))
    assert every["policy", "verdicts"] == 2 * 3 * 4 * (1 + 2 + 3 + 4 + 5) + 2 * 20
    last = calls(forecast_calls(make_config(tmp_path, generate={"answer": "last"})))
    assert last["generate", "answers"] == 10 * 2
    uniform = calls(forecast_calls(make_config(tmp_path, generate={"policy": "uniform"})))
    assert {stage for stage, _ in uniform} == {"generate"}


def test_tokens_at_most_by_hand(tmp_path: Path) -> None:
    found = forecast_calls(make_config(tmp_path))
    lines = {(line.ask.stage, line.ask.what): line for line in found.lines}
    answers = lines["generate", "answers"]
    # The longest instruction is a rewrite of 100 tokens; there is no input (1), then 16 of a chat.
    assert answers.ask.prompt_tokens == 100 + 1 + 1 + 16
    assert answers.most_completion_tokens == 60 * 100
    verdicts = lines["generate", "verdicts"]
    assert verdicts.ask.completion_tokens == 0  # likelihood
    assert verdicts.ask.prompt_tokens == 2 * 102 + 16 + 96
    generated = forecast_calls(
        make_config(tmp_path, reviewer={"verdict": "generated", "max_tokens": 8})
    )
    assert {line.ask.completion_tokens for line in generated.lines if line.ask.role == "reviewer"} \
        == {8}  # fmt: skip


def earlier_run(folder: Path) -> tuple[RunDir, Config]:
    """Generation of 60 rows: 60 rewrites, 30 answers, 45 verdicts; 2 workers took 10 s."""
    config = make_config(folder, generate={"policy": "uniform"}, site={"num_workers": 2})
    run_dir = RunDir(folder / "earlier")
    row = {"model": "m", "in_doubt": 0}
    usage = [
        {**row, "role": "expert", "calls": 90, "prompt_tokens": 9000, "completion_tokens": 4500},
        {**row, "role": "reviewer", "calls": 45, "prompt_tokens": 450, "completion_tokens": 0},
    ]
    write_json(
        run_dir.manifest("generate"),
        {"schema": 1, "counts": {"attempted": 60}, "usage": usage},
    )
    progress = {"done": 60, "total": 60, "unit": "rows", "rate_per_s": 6.0, "message": ""}
    write_json(run_dir.progress("generate"), {**progress, "updated": 1.0})
    return run_dir, config


def test_an_earlier_run_gives_shares_tokens_hours_and_dollars(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        generate={"policy": "uniform", "num_trajectories": 20},
        expert={"kind": "http", "base_url": "http://a/v1", "model": "m"},
        site={"gpus_per_node": 4},
        budget={
            "max_expert_calls": 1000,
            "price_per_million_prompt_tokens": 3.0,
            "price_per_million_completion_tokens": 10.0,
            "price_per_gpu_hour": 2.0,
        },
    )
    found = forecast_calls(config, earlier_run(tmp_path))
    lines = {line.ask.what: line for line in found.lines}
    # Ten times the chains: 600 rewrites, half of them answered, three quarters judged.
    assert {what: line.calls for what, line in lines.items()} == {
        "rewrites": 600,
        "answers": 300,
        "verdicts": 450,
    }
    # 100 and 50 tokens a call of the expert; the reviewer is no served model and costs no tokens.
    assert found.dollars == pytest.approx(900 * (100 * 3 + 50 * 10) / 1e6)
    most = {what: line.most_prompt_tokens * 3 + line.most_completion_tokens * 10
            for what, line in lines.items()}  # fmt: skip
    assert found.most_dollars == pytest.approx((most["rewrites"] + most["answers"]) / 1e6)
    # 2 processes x 10 s for 135 calls; now 1,350 calls, each process on a GPU of its own.
    assert found.gpu_hours == pytest.approx(200 / 3600)
    assert found.gpu_dollars == pytest.approx(400 / 3600)
    text = "\n".join(forecast_lines(found))
    assert "max_expert_calls 1,000 may stop the run" in text
    assert "$0.72 expected" in text
    assert f"as in {tmp_path / 'earlier'}" in text


def test_what_was_not_measured_is_not_guessed(tmp_path: Path) -> None:
    config = make_config(tmp_path, site={"gpus_per_node": 1}, budget={"price_per_gpu_hour": 1.0})
    found = forecast_calls(config, earlier_run(tmp_path))  # it had no policy
    assert found.gpu_hours is None
    assert found.gpu_dollars is None
    assert {line.prompt_tokens for line in found.lines if line.ask.stage == "policy"} == {None}
    assert "GPU" not in "\n".join(forecast_lines(found))


def test_seconds_of_a_call_come_from_whole_stages_alone(tmp_path: Path) -> None:
    # A tenth of 10 s, and of the calls: the rate foretells all of the seconds, not all calls.
    unfinished, config = earlier_run(tmp_path)
    usage = read_json(unfinished.manifest("generate"))["usage"]
    unfinished.manifest("generate").unlink()
    write_json(unfinished.policy / "member-000" / "usage.json", usage)
    write_json(unfinished.progress("policy-000"), read_json(unfinished.progress("generate")))
    assert measure(unfinished, config) == Measured()
    # The rate of a retry is that of units of which most rows were there before.
    retried, config = earlier_run(tmp_path)
    write_json(retried.generate / "before_retry.json", {})
    assert measure(retried, config).process_s == {}


def test_prices_are_outside_all_digests(tmp_path: Path) -> None:
    plain, priced = make_config(tmp_path), make_config(tmp_path, budget={"price_per_gpu_hour": 9})
    for stage in STAGE_KEYS:
        assert stage_inputs(plain, stage) == stage_inputs(priced, stage)
