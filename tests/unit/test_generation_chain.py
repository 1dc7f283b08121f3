"""The state machine of one chain, and the plan that lays chains out."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teams_hpc.config import Config
from teams_hpc.config.schema import GenerateConfig
from teams_hpc.errors import InputChangedError
from teams_hpc.generation.evolve import Chain, Row, Steering
from teams_hpc.generation.outcome import count_length_rule, count_rows
from teams_hpc.generation.plan import ChainKey, Plan, settle_plan
from teams_hpc.llm.base import Completion
from teams_hpc.rewriting.elimination import REASONS
from teams_hpc.rewriting.identity import record_id
from teams_hpc.rewriting.observation import Observer
from teams_hpc.rewriting.operation_policy import OperationPolicy, RoundRobinPolicy, UniformPolicy
from teams_hpc.rewriting.operations import OPERATIONS, Operation
from teams_hpc.rewriting.reviewer import Verdict
from teams_hpc.rewriting.seeds import Seed
from teams_hpc.rewriting.splits import SPLITS
from teams_hpc.storage.atomic import read_json, write_json
from teams_hpc.storage.run_dir import RunDir
from teams_hpc.storage.shards import ROW_COLUMNS, Finish, Status

SEED = Seed("Name three uses of copper.", "Copper is a metal.")
Answer = Literal["every", "last"]


def steering(
    answer: Answer = "every", *, chooser: OperationPolicy | None = None, **settings: Any
) -> Steering:
    return Steering(
        run_seed=7,
        settings=GenerateConfig(policy="uniform", answer=answer, **settings),
        policy=chooser or UniformPolicy(),
        member=-1,
        observer=Observer(kind="one_hot", episode_length=6),
        expert="m",
    )


def chain(answer: Answer = "every", trajectory: int = 0, **settings: Any) -> Chain:
    key = ChainKey(seed=SEED, split="policy_report", trajectory=trajectory)
    return Chain(key, steering(answer, **settings))


def reply(text: str, finish: Literal["stop", "length", "error"] = "stop") -> Completion:
    return Completion(
        id="",
        text=text,
        finish_reason=finish,
        prompt_tokens=10,
        completion_tokens=3,
        error="server gone" if finish == "error" else "",
    )


def advance(one: Chain, script: Iterator[str]) -> None:
    """Give a chain what it wants, by the next word of a script, until it wants nothing."""
    while one.wants != "nothing":
        if one.wants == "verdict":
            one.pair()
            one.take_verdict(Verdict(p_not_equal=0.1 if next(script) == "bad" else 0.9))
            continue
        request = one.request()
        word = next(script)
        if one.wants == "rewrite":
            texts = {
                "bad": one._instruction,
                "copied": "Here is the rewritten prompt: list copper things",
                "good": f"A new task with number {request.seed}",
            }
        else:
            texts = {"bad": "Sorry, no.", "copied": "it is", "good": f"Answer {request.seed}"}
        finishes = {"cut": "length", "error": "error"}
        finish: Any = finishes.get(word, "stop")
        one.take_completion(reply("" if word == "error" else texts.get(word, "cut off"), finish))


WORDS = ("good", "good", "good", "bad", "copied", "cut", "error")
scripts = st.lists(st.sampled_from(WORDS), min_size=40, max_size=40)


@given(script=scripts, answer=st.sampled_from(["every", "last"]), steps=st.integers(1, 8))
def test_whatever_comes_back_rows_balance_and_parents_are_kept_rows(
    script: list[str], answer: Answer, steps: int
) -> None:
    one = chain(answer, num_steps=steps)
    advance(one, iter(script * 2))
    rows = one.rows
    assert [row["step"] for row in rows] == list(range(steps))
    assert all(list(row) == [column.name for column in ROW_COLUMNS] for row in rows)
    counts = count_rows(rows)
    assert counts["attempted"] == steps
    parent: Row | None = None
    for row in rows:
        assert row["record_id"] == record_id(7, SEED.instruction, SEED.input, 0, row["step"])
        assert row["parent_id"] == (parent["record_id"] if parent else "")
        is_error = Finish.ERROR in (row["rewrite_finish"], row["answer_finish"])
        assert (row["status"] == Status.FAILED) == is_error == (row["detail"] == "server gone")
        assert (row["status"] == Status.KEPT) == (REASONS[row["reason"]] == "none")
        # The last answer decides over a row after its children were made from it.
        if row["status"] == Status.KEPT or (answer == "last" and row["answer_finish"]):
            parent = row
    answered = [row for row in rows if row["answer_finish"] != Finish.NONE]
    if answer == "every":
        assert all(row in answered for row in rows if row["status"] == Status.KEPT)
    else:
        assert answered == ([parent] if parent else [])


def rule_of(script: str, **settings: Any) -> str:
    one = chain(num_steps=1, **settings)
    advance(one, iter(script.split()))
    return str(REASONS[one.rows[0]["reason"]])


def test_every_rule_has_its_reason() -> None:
    assert rule_of("bad") == "unusable"
    assert rule_of("cut") == "unusable"
    assert rule_of("copied") == "copied_prompt"
    assert rule_of("error") == "engine_error"
    assert rule_of("good bad") == "equal"
    assert rule_of("good good bad") == "refusal"
    assert rule_of("good good copied") == "empty_answer"
    assert rule_of("good good error") == "engine_error"
    assert rule_of("good good good") == "none"
    assert rule_of("good", max_words=3) == "unusable"


def test_a_row_tells_what_it_cost_and_came_from() -> None:
    one = chain(num_steps=2)
    requests = []
    while one.wants != "nothing":
        if one.wants == "verdict":
            assert math.isnan(one._row["verdict_score"])
            one.take_verdict(Verdict(p_not_equal=0.75))
        else:
            requests.append(one.request())
            one.take_completion(reply(f'"Some words about {len(requests)}"'))
    first, second = one.rows
    assert first["instruction"] == "Some words about 1"
    assert first["response"] == '"Some words about 2"'
    assert (first["prompt_tokens"], first["completion_tokens"]) == (20, 6)
    assert (first["verdict_score"], first["model"], first["policy_member"]) == (0.75, "m", -1)
    assert first["sampler_seed"] == requests[0].seed != requests[1].seed
    assert second["parent_id"] == first["record_id"]
    assert (first["split"], first["seed_id"]) == (SPLITS.index("policy_report"), SEED.id)
    operation = OPERATIONS[first["operation"]]
    assert first["input"] == ("" if operation is Operation.BREADTH else SEED.input)
    ids = [request.id for request in requests]
    assert ids == [
        f"{row['record_id']}/{what}/0" for row in one.rows for what in ("rewrite", "answer")
    ]


def test_choices_hang_on_the_record_alone() -> None:
    def operations(trajectory: int) -> list[int]:
        one = chain(trajectory=trajectory, num_steps=8)
        advance(one, iter(["good"] * 24))
        return [row["operation"] for row in one.rows]

    assert operations(0) == operations(0)
    assert len({tuple(operations(number)) for number in range(6)}) == 6
    one = Chain(
        ChainKey(seed=SEED, split="policy_report", trajectory=0),
        steering(num_steps=7, chooser=RoundRobinPolicy()),
    )
    advance(one, iter(["good"] * 21))
    assert [row["operation"] for row in one.rows] == [0, 1, 2, 3, 4, 5, 0]


def test_the_length_rule_is_counted_where_it_applies() -> None:
    rows = [
        {"operation": code, "rewrite_finish": finish, "added_words": words}
        for code in range(len(OPERATIONS))
        for finish, words in ((Finish.STOP, 10), (Finish.STOP, 21), (Finish.LENGTH, 15))
    ]
    found = count_length_rule(rows)
    assert list(found) == [str(name) for name in OPERATIONS[:4]]
    assert all(line == {"judged": 2, "kept_rule": 1} for line in found.values())


@given(
    num_seeds=st.integers(1, 40),
    num_trajectories=st.integers(1, 7),
    num_steps=st.integers(1, 5),
    unit_size=st.integers(1, 50),
)
def test_units_hold_every_chain_once_in_order(
    num_seeds: int, num_trajectories: int, num_steps: int, unit_size: int
) -> None:
    seeds = tuple(Seed(f"Say {number}.") for number in range(num_seeds))
    plan = Plan(
        seeds=seeds,
        splits=bytes(number % len(SPLITS) for number in range(num_seeds)),
        num_trajectories=num_trajectories,
        num_steps=num_steps,
        unit_size=unit_size,
    )
    units = [plan.chains_of(unit) for unit in range(plan.num_units)]
    assert [(key.seed, key.split, key.trajectory) for unit in units for key in unit] == [
        (seed, SPLITS[number % len(SPLITS)], trajectory)
        for number, seed in enumerate(seeds)
        for trajectory in range(num_trajectories)
    ]
    assert all(len(unit) == unit_size for unit in units[:-1])
    assert 1 <= len(units[-1]) <= unit_size
    rows = [plan.num_rows_of(unit) for unit in range(plan.num_units)]
    assert rows == [len(unit) * num_steps for unit in units]
    assert sum(rows) == plan.num_rows


def test_the_plan_is_the_same_for_every_worker_and_guards_against_another(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    config = Config.model_validate(
        {"name": "t", "seeds": {"limit": 11}, "generate": {"num_trajectories": 3, "unit_size": 4}}
    )
    plan = settle_plan(run_dir, config)
    assert settle_plan(run_dir, config) == plan
    assert (plan.num_chains, plan.num_units, plan.num_rows) == (33, 9, 132)
    chains = [key for unit in range(plan.num_units) for key in plan.chains_of(unit)]
    assert len(chains) == 33
    assert [key.trajectory for key in chains[:4]] == [0, 1, 2, 0]
    assert [key.seed for key in chains[::3]] == list(plan.seeds)
    assert sum(plan.num_rows_of(unit) for unit in range(plan.num_units)) == plan.num_rows
    assert plan.num_rows_of(8) == 4
    longer = config.model_copy(update={"seeds": config.seeds.model_copy(update={"limit": 12})})
    with pytest.raises(InputChangedError, match=r"num_seeds is 11, now 12.*--rerun-from generate"):
        settle_plan(run_dir, longer)
    content = read_json(run_dir.plan)
    content["splits"] = content["splits"][::-1] + "0"
    write_json(run_dir.plan, content)
    with pytest.raises(InputChangedError, match="splits"):
        settle_plan(run_dir, config)
