"""Pieces of the report: escaping, self-containment, plots, and the status line."""

import html
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from teams_hpc.config import Config
from teams_hpc.llm.ledger import Ledger
from teams_hpc.report import page, plots, sections
from teams_hpc.report.html import _header
from teams_hpc.report.status import (
    RunStatus,
    StageProgress,
    StageStatus,
    format_seconds,
    read_status,
    status_json,
    status_table,
)
from teams_hpc.report.verify import generation_balance
from teams_hpc.storage.atomic import write_json
from teams_hpc.storage.run_dir import RunDir


def test_everything_from_outside_is_escaped() -> None:
    evil = '<script>alert("x")</script>'
    shown = page.document(evil, page.table((evil,), [(evil, 3, None, 0.12345)]))
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") == 3
    assert "0.1235" in shown


def test_the_page_needs_nothing_else() -> None:
    svg = plots.lines({"a": ([0, 1], [2.0, 3.0])}, x_label="x", y_label="y")
    shown = page.document("t", page.figure(svg, "caption"))
    assert "<svg" in shown
    assert "<script" not in shown
    references = re.findall(r'(?:src|href)="([^"#][^"]*)"', shown)
    assert references == []


def test_empty_sections_disappear() -> None:
    assert page.section("Title", "", page.Html("")) == ""
    assert sections.benchmarks_section({}) == ""
    assert sections.sft_section({}, []) == ""


@pytest.mark.parametrize(
    "svg",
    [
        plots.stacked_bars(["1", "2"], {"a": [0.5, 0.2], "b": [0.5, 0.8]}, x_label="", y_label=""),
        plots.bars({"kept": 3.0}, x_label="rows"),
        plots.histograms({"a": [1.0, 2.0], "b": []}, x_label="words"),
        plots.roc({"m": [[0.0, 0.0], [1.0, 1.0]]}),
    ],
)
def test_plots_are_svg_and_the_same_every_time(svg: str) -> None:
    assert svg.startswith("<svg")
    assert "</svg>" in svg


def test_intervals_say_when_nothing_was_measured() -> None:
    assert sections.interval_text(None) == "–"
    assert sections.interval_text({"value": 0.5, "low": 0.4, "high": 0.61}) == "0.50 (0.40 to 0.61)"


def test_balance_names_the_difference() -> None:
    counts = {"attempted": 5, "kept": 3, "eliminated": {"equal": 1}, "failed": 1}
    assert generation_balance(counts) == []
    (fault,) = generation_balance({**counts, "attempted": 6})
    assert "6 steps attempted" in fault
    assert "= 5" in fault


def test_times_and_eta_are_readable() -> None:
    assert [format_seconds(s) for s in (1.25, 59, 185, 7800)] == [
        "1.2 s", "59 s", "3 min 05 s", "2 h 10 min",
    ]  # fmt: skip
    values = {"total": 10.0, "unit": "rows", "message": ""}
    assert StageProgress(done=5.0, rate_per_s=2.5, **values).eta_s == 2.0
    assert StageProgress(done=5.0, rate_per_s=0.0, **values).eta_s is None


def test_status_shows_brackets_as_they_are() -> None:
    failed = StageStatus(
        stage="generate", state="failed", progress=None, restarts=0, error="prompt has [/INST]"
    )
    status = RunStatus(
        name="a",
        run_dir="/b",
        is_running=False,
        stages=(failed,),
        rows={},
        expert_calls=0,
        expert_calls_in_doubt=0,
        budget=None,
        usage={},
    )
    assert "prompt has [/INST]" in shown(status)


def shown(status: RunStatus) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(status_table(status))
    return console.export_text()


def test_experts_calls_are_shown_as_a_share_of_wizardlms(tmp_path: Path) -> None:
    """12,480 of 624,000 are 2 %; other roles' calls are no part of it."""
    config, run_dir = Config(name="a", run_dir=tmp_path), RunDir(tmp_path)
    ledger = Ledger()
    ledger.of("expert", "m").calls = 12_480
    ledger.of("reviewer", "m").calls = 100
    write_json(run_dir.manifest("generate"), {"schema": 1, "usage": ledger.to_json()})
    status = read_status(run_dir, config)
    assert json.loads(status_json(status))["wizardlm_share"] == 0.02
    assert "expert calls 12,480 (no limit; 2.000 % of WizardLM's 624,000)" in shown(status)
    part = sections.ledger_section({"generate": ledger})
    assert "12,480 expert calls are 2.000 % of WizardLM's about 624,000" in html.unescape(part)
    queries = {"expert_calls": 12_480, "share_of_wizardlm": 0.02}
    evaluation = {"queries": queries, "membership": {"tuned": {"auc": None, "note": ""}}}
    cards = _header(config, {"generate": {}, "dataset": {}, "sft": {}, "evaluate": evaluation})
    assert "2.000 % of WizardLM's 624,000" in html.unescape(cards)
