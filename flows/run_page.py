"""What a run leaves on its Prefect page and in its MLflow description: headline figures, where to read on, progress.

These are for people who look in from elsewhere; the run does not depend on them, so an API that refuses them is told of
in the log and no more.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from entprune.report.wording import (
    describe_budget,
    describe_certificate,
    describe_outcome,
    format_accuracy,
    format_change,
    format_count,
    format_fraction,
    format_milliseconds,
    format_points,
    result_of,
)
from tasks.progress import ProgressReporter, current_reporter, report_to
from tasks.redaction import redact

_logger = logging.getLogger(__name__)
_SHOWN_STAGES = {"solve": "solving", "search": "searching", "finetune": "fine-tuning"}  # the long ones
_UPDATE_SECONDS = 2.0
Made = TypeVar("Made")


def artifact_key(text: str) -> str:
    """A key as Prefect takes it: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# --- results --------------------------------------------------------------------------------------------------------


def show_result(name: str, report: Mapping[str, Any], output: Path, address: str | None) -> None:
    """Leave the headline figures of a pruning run on its page.

    Args:
        name: of the run, such as "lenet on mnist"; its artifacts are versions of one another.
        report: content of report.json.
        output: folder of the report.
        address: of the run in MLflow, None where it has no page in the web.
    """
    description = "\n\n".join([f"## {name}, pruned", *result_sentences(report), _where(report["lineage"], output)])
    _leave(name, result_rows(report), description, address)


def show_sweep(name: str, content: Mapping[str, Any], output: Path, address: str | None) -> None:
    """The same for a sweep: one row for each setting, the chosen one marked."""
    chosen = content["chosen"]
    figures = chosen["fine_tuned"] or chosen["one_shot"]
    sentences = [
        f"## {name}: {len(content['settings'])} settings compared",
        (
            f"**#{chosen['number']} was chosen**: {chosen['rule']}. On the test images, which were read for it "
            f"alone, it changes the accuracy by {format_points(figures['accuracy_drop'])} and is without "
            f"{format_fraction(figures['parameters_removed'])} of the parameters."
        ),
        _where(content["lineage"], output, page="sweep.html"),
    ]
    rows = sweep_rows(content)
    _leave(name, rows, "\n\n".join(sentences), address)


def result_sentences(report: Mapping[str, Any]) -> list[str]:
    """What was asked, what came of it, and what to know, as markdown paragraphs."""
    result = result_of(report)
    how = "after fine-tuning" if report["fine_tuned"] else "without fine-tuning"
    return [
        (
            f"**{format_fraction(result['parameters_removed'])} of the parameters and "
            f"{format_fraction(result['macs_removed'])} of the multiply-accumulates are gone; the test accuracy "
            f"changed by {format_points(result['accuracy_drop'])}** {how}."
        ),
        f"Asked: {describe_budget(report['budget'])}. {describe_outcome(report)}",
        describe_certificate(report["certificate"]),
        *(f"**Note:** {warning}" for warning in report["warnings"]),
    ]


def result_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Headline figures, one dictionary for each row; all have the same keys."""
    dense, result = report["dense"], result_of(report)
    stages = {"unpruned": dense, "one shot": report["one_shot"]}
    if report["fine_tuned"]:
        stages["fine-tuned"] = report["fine_tuned"]
    batches = dense["latency_ms"] or {}
    rows = [
        ("test accuracy", lambda figures: format_accuracy(figures["accuracy"]), format_points(result["accuracy_drop"])),
        ("parameters", lambda figures: format_count(figures["parameters"]), _less(result["parameters_removed"])),
        ("MACs", lambda figures: format_count(figures["macs"]), _less(result["macs_removed"])),
        *(
            (
                f"time, {batch} image{'s' if batch != '1' else ''}",
                lambda figures, batch=batch: format_milliseconds((figures["latency_ms"] or {}).get(batch)),
                _less(1.0 - result["latency_ms"][batch] / batches[batch]),
            )
            for batch in batches
        ),
    ]
    return [
        {"figure": title, **{stage: wording(figures) for stage, figures in stages.items()}, "change": change}
        for title, wording, change in rows
    ]


def sweep_rows(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """Settings of a sweep, one dictionary for each row."""
    return [
        {
            "setting": f"#{setting['number']} {setting['label']}",
            "chosen": "chosen" if setting["number"] == content["chosen"]["number"] else "",
            "parameters removed": format_fraction(setting["result"]["parameters_removed"]),
            "MACs removed": format_fraction(setting["result"]["macs_removed"]),
            "time, 64 images": format_milliseconds(setting["result"]["latency_ms"]["64"]),
            "validation accuracy, points": format_change(setting["result"]["validation_drop"]),
            "at worst": format_change(setting["result"]["drop_upper_bound"]),
        }
        for setting in content["settings"]
    ]


def _less(removed: float) -> str:
    return f"−{format_fraction(removed)}" if removed >= 0 else f"+{format_fraction(-removed)}"


def _where(lineage: Mapping[str, Any], output: Path, page: str = "report.html") -> str:
    """Where the whole report lies."""
    run, version = lineage.get("mlflow_run_id"), lineage.get("registered_version")
    places = [f"Report: `{Path(output) / page}`."]
    if run:
        places.append(f"MLflow run: `{run}` (the same `{page}` is among its artifacts).")
    if version:
        places.append(f"Registered as version {version}.")
    return " ".join(places)


def _leave(name: str, rows: list[dict[str, str]], description: str, address: str | None) -> None:
    key = artifact_key(f"{name}-result")
    is_heard = _show(lambda: create_table_artifact(rows, key=key, description=description)) is not None
    if is_heard and address is not None:
        _show(
            lambda: create_link_artifact(
                address, link_text="Report and figures in MLflow", key=artifact_key(f"{name}-report"),
                description=f"Run of {name} in MLflow; `report.html` is among its artifacts.",
            )
        )  # fmt: skip


# --- progress -------------------------------------------------------------------------------------------------------


@contextmanager
def shown_progress(name: str) -> Iterator[None]:
    """Show the long stages of what runs inside on the page of the flow run, beside where they are shown already."""
    with report_to(PageReporter(name, current_reporter())):
        yield


class PageReporter:
    """Passes on what a run reports, and keeps a progress artifact for each of its long stages.

    A search has steps whose number is not known: each one moves the bar through half of what is left.

    Args:
        name: of the run.
        inner: who was told so far.
    """

    def __init__(self, name: str, inner: ProgressReporter) -> None:
        self._name, self._inner = name, inner
        self._artifacts: dict[str, UUID] = {}
        self._step, self._low, self._high, self._reached = "", 0.0, 100.0, 0.0
        self._updated = 0.0
        self._is_heard = True

    def started(self, stage: str) -> None:
        """Pass on; the bar appears with the first unit."""
        self._step, self._reached, self._updated = "", 0.0, 0.0
        self._inner.started(stage)

    def advanced(self, stage: str, step: str, done: int, total: int) -> None:
        """Move the bar, at most every few seconds."""
        self._inner.advanced(stage, step, done, total)
        if stage not in _SHOWN_STAGES:
            return
        if step != self._step:
            self._step, self._low = step, self._reached
            self._high = 100.0 if stage != "search" else (self._low + 100.0) / 2
        self._reached = self._low + (self._high - self._low) * done / max(total, 1)
        if time.monotonic() - self._updated >= _UPDATE_SECONDS:
            self._update(stage, self._reached, f"{self._name}, {step}: {done} of {total}")

    def finished(self, stage: str, seconds: float, summary: str) -> None:
        """Fill the bar and say what came out."""
        self._inner.finished(stage, seconds, summary)
        if stage in _SHOWN_STAGES:
            told = f": {summary}" if summary else ""
            self._update(stage, 100.0, f"{self._name}, {_SHOWN_STAGES[stage]} took {seconds:.1f} s{told}")

    def _update(self, stage: str, percent: float, description: str) -> None:
        if not self._is_heard:
            return
        known = self._artifacts.get(stage)
        if known is not None:
            made = _show(lambda: update_progress_artifact(known, percent, description=description))
        else:
            key = artifact_key(f"{self._name}-{_SHOWN_STAGES[stage]}")
            made = _show(lambda: create_progress_artifact(percent, key=key, description=description))
        self._updated, self._is_heard = time.monotonic(), made is not None
        if isinstance(made, UUID):
            self._artifacts.setdefault(stage, made)


def _show(make: Callable[[], Made]) -> Made | None:
    """Do it if the API lets us, at the first attempt: a lost server would cost a minute of them."""
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            return make()
    except Exception as error:  # noqa: BLE001 -- whatever it is, the run goes on without
        _logger.warning("nothing was added to the page of this flow run (%s)", redact(str(error)))
        return None
