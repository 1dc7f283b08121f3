"""Calls that a server lost, in the ledger and under a budget: all that was asked is counted."""

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, chat_server
from integration.test_generation import columns, make_run, usage_of

from teams_hpc.config import load_resolved
from teams_hpc.errors import BudgetError
from teams_hpc.generation.usage import generation_usage
from teams_hpc.generation.worker import generate
from teams_hpc.llm.base import RoleName
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.run_dir import RunDir, read_manifest

FAULTS = ("ok", "wrong", "ok", "drop", "429", "ok", "torn", "503", "ok", "slow")
TIMEOUT_S = 1.5


@pytest.fixture(autouse=True)
def quick_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teams_hpc.llm.http_engine._FIRST_PAUSE_S", 0.005)


def say(prompt: str) -> str:
    if "Answer only: Equal or Not Equal." in prompt:
        return "Not Equal"
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    return " ".join(f"word{digest[at : at + 4]}" for at in range(0, 48, 4))


def behave(number: int) -> str:
    what = FAULTS[number % len(FAULTS)]
    if what == "slow":
        time.sleep(2 * TIMEOUT_S)
        return "ok"
    return what


def over_http(server: ChatServer) -> dict[str, Any]:
    return {
        "kind": "http",
        "base_url": server.url,
        "model": "m",
        "max_retries": 20,
        "timeout_s": TIMEOUT_S,
    }


def num_made(server: ChatServer) -> int:
    """Requests that the server saw and did not refuse."""
    return sum(not FAULTS[n % len(FAULTS)].isdigit() for n in range(len(server.bodies)))


def num_counted(run_dir: RunDir, *roles: RoleName) -> int:
    usage = [generation_usage(run_dir).total(role) for role in roles]
    return sum(one.calls + one.in_doubt for one in usage)


def run(run_dir: RunDir) -> None:
    generate(run_dir, load_resolved(run_dir.config), 0, StopFlag())


def usage_without_failures(run_dir: RunDir) -> dict[Any, int]:
    """What the manifest says was spent, where every row came to be in spite of all."""
    manifest = read_manifest(run_dir, "generate")
    assert manifest is not None
    assert manifest["counts"]["failed"] == 0
    return usage_of(manifest)


def test_each_request_is_in_the_ledger_once(tmp_path: Path) -> None:
    with chat_server(ChatServer(behave=behave, say=say)) as server:
        run_dir = make_run(
            tmp_path,
            seeds={"limit": 5},
            generate={"equal_threshold": 0.0},
            expert=over_http(server),
        )
        run(run_dir)
    usage = usage_without_failures(run_dir)
    assert usage["expert", "in_doubt"] > 10
    assert usage["expert", "calls"] + usage["expert", "in_doubt"] == num_made(server)
    assert usage["reviewer", "in_doubt"] == 0


def test_the_reviewers_requests_are_too_and_a_budget_does_not_limit_them(tmp_path: Path) -> None:
    with chat_server(ChatServer(behave=behave, say=say)) as server:
        run_dir = make_run(
            tmp_path,
            seeds={"limit": 5},
            budget={"max_expert_calls": 30},
            reviewer=over_http(server),
        )
        run(run_dir)
    assert usage_without_failures(run_dir)["reviewer", "in_doubt"] > 3
    assert num_counted(run_dir, "reviewer") == num_made(server)


def test_an_engine_for_both_counts_each_request_for_who_asked(tmp_path: Path) -> None:
    with chat_server(ChatServer(behave=behave, say=say)) as server:
        both = {"expert": over_http(server), "reviewer": over_http(server)}
        run_dir = make_run(tmp_path, seeds={"limit": 4}, **both)
        run(run_dir)
    assert num_counted(run_dir, "expert", "reviewer") == num_made(server)
    asked = [body["messages"][-1]["content"] for body in server.bodies]
    made = [n for n in range(len(asked)) if not FAULTS[n % len(FAULTS)].isdigit()]
    judged = sum("Answer only: Equal or Not Equal." in asked[n] for n in made)
    assert num_counted(run_dir, "reviewer") == judged > 0


def test_a_server_is_never_asked_more_often_than_the_budget_allows(tmp_path: Path) -> None:
    with chat_server(ChatServer(behave=behave, say=say)) as server:
        changes: dict[str, Any] = {
            "seeds": {"limit": 15},
            "generate": {"equal_threshold": 0.0},
            "expert": over_http(server),
        }
        run_dir = make_run(tmp_path, budget={"max_expert_calls": 60}, **changes)
        with pytest.raises(BudgetError, match="stopped at the budget"):
            run(run_dir)
        assert num_counted(run_dir, "expert") == num_made(server) <= 60
        make_run(tmp_path, budget={"max_expert_calls": 90}, **changes)
        run(run_dir)
        assert num_counted(run_dir, "expert") == num_made(server) <= 90
    assert generation_usage(run_dir).total("expert").in_doubt == 0
    details = {detail for (detail,) in columns(run_dir, "detail") if detail}
    assert details
    assert all("generate.retry_failed=true makes it again" in one for one in details)
