"""Progress in the terminal, and where there is none."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from flows.progress_bar import RichReporter
from tasks.progress import EstimateLines, ProgressReporter, StageClock, report_to


def run_stages(reporter: ProgressReporter) -> None:
    clock = StageClock()
    with report_to(reporter):
        with clock.stage("solve"):
            for done in (1, 2, 3):
                clock.advance("solve", done, 3)
            clock.summarise("3 [groups]")
        with clock.stage("search"):
            clock.advance("search, round 1", 1, 2)
            clock.advance("search, round 2", 1, 4)


def test_without_a_terminal_there_is_a_line_for_each_finished_stage() -> None:
    stream = io.StringIO()
    with RichReporter(Console(file=stream, width=80)) as reporter:
        run_stages(reporter)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"✓ solve +[0-9.]+ s  3 \[groups\]", lines[0])
    assert re.fullmatch(r"✓ search +[0-9.]+ s", lines[1])


def test_without_a_terminal_a_long_stage_says_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1000.0, 1000.0, 1020.0, 1040.0, 1060.0, 1080.0, 1100.0])
    monkeypatch.setattr("tasks.progress.time.monotonic", lambda: next(now))
    stream = io.StringIO()
    with RichReporter(Console(file=stream, width=80)) as reporter:
        reporter.started("fine-tune")
        for done in (1, 2, 3, 4, 5):
            reporter.advanced("fine-tune", "fine-tune [a]", done, 5)
    lines = [line.strip() for line in stream.getvalue().splitlines()]
    assert lines == ["fine-tune [a]: 2 of 5, about 60 s left", "fine-tune [a]: 4 of 5, about 20 s left"]


def test_estimate_of_a_step_counts_from_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1000.0, 1010.0, 1020.0, 1040.0])
    monkeypatch.setattr("tasks.progress.time.monotonic", lambda: next(now))
    lines: list[str] = []
    estimates = EstimateLines(lines.append, 30.0)  # a training reports without having said that it starts
    estimates.advanced("train", "epoch 1", 1, 2)
    estimates.advanced("train", "epoch 1", 2, 2)
    estimates.advanced("train", "epoch 2", 1, 4)
    assert lines == ["epoch 2: 1 of 4, about 60 s left"]


def test_in_a_terminal_each_step_has_a_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, force_interactive=True, color_system=None)
    with RichReporter(console) as reporter:
        reporter.advanced("search", "search, round 2", 1, 4)
        reporter._progress.refresh()
        shown = stream.getvalue()
        reporter.advanced("search", "search, round 3", 3, 4)
        reporter._progress.refresh()
        later = stream.getvalue()[len(shown) :]
    assert "search, round 2" in shown
    assert "1 of 4, left" in shown
    assert "search, round 3" in later
    assert "3 of 4, left" in later
    assert "round 2" not in later.rpartition("round 3")[2]


def test_failure_leaves_no_bar_and_no_line() -> None:
    stream = io.StringIO()

    def fail() -> None:
        with RichReporter(Console(file=stream, width=80)) as reporter:
            reporter.started("solve")
            raise ZeroDivisionError("stop")

    with pytest.raises(ZeroDivisionError, match="stop"):
        fail()
    assert stream.getvalue() == ""
