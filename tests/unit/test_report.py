"""Pieces of the report: escaping, self-containment, plots, and the status line."""

import io
import re

import pytest
from rich.console import Console

from teams_hpc.report import page, plots, sections
from teams_hpc.report.status import (
    RunStatus,
    StageProgress,
    StageStatus,
    format_seconds,
    status_table,
)
from teams_hpc.report.verify import generation_balance


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
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(status_table(status))
    assert "prompt has [/INST]" in console.export_text()
