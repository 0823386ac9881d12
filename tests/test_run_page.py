"""What a run leaves on its pages for people who look in: short, true, and never in the run's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from flows import run_page
from flows.run_page import PageReporter, artifact_key, result_rows, show_result, show_sweep, shown_progress
from tasks import tracking
from tasks.progress import current_reporter, report_to
from tests.reports import make_pruned, make_report, make_sweep


class Recorder:
    """Stands for Prefect's API and for the reporter that was there before."""

    def __init__(self) -> None:
        self.made: list[tuple[str, dict[str, Any]]] = []
        self.told: list[tuple[Any, ...]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in ("create_table_artifact", "create_link_artifact", "create_progress_artifact"):
            monkeypatch.setattr(run_page, kind, lambda first, kind=kind, **given: self.note(kind, first, given))
        monkeypatch.setattr(
            run_page,
            "update_progress_artifact",
            lambda known, percent, **given: self.note("update", percent, given | {"id": known}),
        )

    def note(self, kind: str, first: Any, given: dict[str, Any]) -> UUID:
        made = uuid4()
        self.made.append((kind.split("_")[1] if "_" in kind else kind, {"first": first, "made": made} | given))
        return made

    def started(self, stage: str) -> None:
        self.told.append(("started", stage))

    def advanced(self, stage: str, step: str, done: int, total: int) -> None:
        self.told.append(("advanced", stage, step, done, total))

    def finished(self, stage: str, seconds: float, summary: str) -> None:
        self.told.append(("finished", stage, seconds, summary))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    made.install(monkeypatch)
    return made


def made_report(**changes: Any) -> dict[str, Any]:
    lineage = {"mlflow_run_id": "abc", "registered_version": 3}
    return make_report(lineage=lineage, warnings=["Widths are odd."], **changes)


def test_headline_is_a_table_with_its_story_and_a_link(recorder: Recorder) -> None:
    show_result("lenet on mnist", made_report(), Path("runs/lenet"), "http://mlflow/#/experiments/1/runs/abc")
    (kind, table), (other, link) = recorder.made
    assert (kind, table["key"]) == ("table", "lenet-on-mnist-result")
    assert table["first"][0] == {
        "figure": "test accuracy", "unpruned": "99.00 %", "one shot": "98.75 %", "change": "−0.25 points"
    }  # fmt: skip
    for fragment in (
        "**90.0 % of the parameters and 80.0 % of the multiply-accumulates are gone",
        "the smallest network that loses at most 0.5 points",
        "It computes the same as the full-size network",
        "**Note:** Widths are odd.",
        "`runs/lenet/report.html`",
        "MLflow run: `abc`",
        "Registered as version 3",
    ):
        assert fragment in table["description"]
    assert (other, link["first"]) == ("link", "http://mlflow/#/experiments/1/runs/abc")


def test_run_without_a_page_in_the_web_gets_no_link(recorder: Recorder) -> None:
    show_result("lenet", made_report(), Path("runs"), None)
    assert [kind for kind, _ in recorder.made] == ["table"]


def test_rows_have_equal_keys_and_signed_changes() -> None:
    rows = result_rows(made_report(fine_tuned=make_pruned(latency_ms={"1": 0.9, "64": 6.0}, accuracy_drop=-0.1)))
    assert len({tuple(row) for row in rows}) == 1
    assert [row["figure"] for row in rows] == [
        "test accuracy",
        "parameters",
        "MACs",
        "time, 1 image",
        "time, 64 images",
    ]
    assert [row["change"] for row in rows] == ["+0.10 points", "−90.0 %", "−80.0 %", "+50.0 %", "−50.0 %"]
    assert rows[1]["fine-tuned"] == "40 k"


def test_settings_of_a_sweep_are_rows_and_one_is_chosen(recorder: Recorder) -> None:
    show_sweep("sweep of lenet", make_sweep() | {"lineage": {}}, Path("runs/sweep"), None)
    ((_, table),) = recorder.made
    assert [row["chosen"] for row in table["first"]] == ["chosen", ""]
    assert "**#0 was chosen**" in table["description"]
    assert "`runs/sweep/sweep.html`" in table["description"]


def test_long_stages_move_a_bar_that_never_falls(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_page, "_UPDATE_SECONDS", 0.0)
    reporter = PageReporter("lenet on mnist", recorder)
    events = [
        ("search, round 1", 1, 2),
        ("search, round 1", 2, 2),
        ("search, round 2", 1, 4),
        ("search, round 2", 4, 4),
    ]
    reporter.started("search")
    for step, done, total in events:
        reporter.advanced("search", step, done, total)
    reporter.finished("search", 3.0, "6 networks tried")
    kinds = [kind for kind, _ in recorder.made]
    assert kinds == ["progress", "update", "update", "update", "update"]
    assert [entry["first"] for _, entry in recorder.made] == [25.0, 50.0, 56.25, 75.0, 100.0]
    assert {entry["id"] for _, entry in recorder.made[1:]} == {recorder.made[0][1]["made"]}
    assert recorder.made[0][1]["key"] == "lenet-on-mnist-searching"
    assert recorder.made[2][1]["description"] == "lenet on mnist, search, round 2: 1 of 4"
    assert recorder.made[-1][1]["description"] == "lenet on mnist, searching took 3.0 s: 6 networks tried"
    assert recorder.told[0] == ("started", "search")
    assert recorder.told[-1] == ("finished", "search", 3.0, "6 networks tried")
    assert len(recorder.told) == len(events) + 2


def test_bar_moves_now_and_then_and_short_stages_have_none(recorder: Recorder) -> None:
    reporter = PageReporter("lenet", recorder)
    for stage in ("measure", "solve"):
        reporter.started(stage)
        for done in range(1, 6):
            reporter.advanced(stage, stage, done, 5)
        reporter.finished(stage, 1.0, "")
    assert [(kind, entry["first"]) for kind, entry in recorder.made] == [("progress", 20.0), ("update", 100.0)]


def test_api_that_refuses_does_not_stop_the_run(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("gone")

    for kind in ("create_table_artifact", "create_progress_artifact"):
        monkeypatch.setattr(run_page, kind, refuse)
    with report_to(recorder), shown_progress("lenet"):
        current_reporter().advanced("solve", "solve", 1, 2)
        current_reporter().finished("solve", 1.0, "")
    show_result("lenet", made_report(), Path("runs"), None)
    assert recorder.told == [("advanced", "solve", "solve", 1, 2), ("finished", "solve", 1.0, "")]
    assert caplog.text.count("nothing was added to the page of this flow run (gone)") == 2  # progress, and the result


@pytest.mark.parametrize(("name", "key"), [("lenet on mnist", "lenet-on-mnist"), ("a.b:C on D_1!", "a-b-c-on-d-1")])
def test_keys_are_what_prefect_takes(name: str, key: str) -> None:
    assert artifact_key(name) == key


def test_database_has_no_page_in_the_web(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///nowhere.db")
    assert tracking.run_address("abc") is None
