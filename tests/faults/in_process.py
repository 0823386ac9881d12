"""Runs in this process while something else is killed: actors, nodes, servers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from flows.parameters import PruneParameters
from flows.prune_model import prune_model
from flows.server import run_flow
from tasks.record import Record
from tests.faults.ground import Baseline, Events, Row, listening, plan_of

Kill = Callable[[], str]  # kills something and says what


@dataclass
class _Plan:
    """What is killed when so many units have been handed out."""

    kills: dict[int, Kill]
    done: dict[int, tuple[str, float]]

    def __call__(self, kind: str, count: int) -> None:
        if kind == "handed out" and count in self.kills and count not in self.done:
            self.done[count] = ("", time.monotonic())
            self.done[count] = (self.kills[count](), time.monotonic())


def undisturbed(parameters: PruneParameters) -> Baseline:
    """Run, and count."""
    events = Events()
    with listening(events):
        report = run_flow(prune_model, parameters)
    assert not events.lines, events.lines
    units = events.handed_out.total()
    assert units == events.stored.total(), (events.handed_out, events.stored)
    return Baseline(plan=plan_of(report), accuracy=report["one_shot"]["accuracy"], units=units)


def disturbed(
    parameters: PruneParameters, baseline: Baseline, kills: Mapping[int, Kill], *, at_stake: int, down: str = ""
) -> tuple[list[Row], Events]:
    """Run while things are killed.

    Args:
        parameters: of the run, with a store of its own.
        baseline: the same run undisturbed.
        kills: by the number of units handed out.
        at_stake: units that one kill can cost at most.
        down: what was not there from the start, if that is all.

    Returns:
        A row for each kill; the units that were redone are known of all kills together, and given with the last.
    """
    events, plan = Events(), _Plan(dict(kills), {})
    events.on_event = plan
    begin = time.monotonic()
    end, events, is_same, redone = _run(parameters, baseline, events)
    if down:
        plan.done[0] = (f"{down}, down from the start", begin)
    rows = [
        Row(
            point=f"unit {count} of {baseline.units}" if count else "the whole run",
            died=what,
            outcome="the run finished by itself",
            same_plan=is_same,
            in_flight=at_stake,
            redone=0,
            seconds=round(end - when, 1),
        )
        for count, (what, when) in sorted(plan.done.items())
    ]
    return _share_out(rows, redone), events


def _run(parameters: PruneParameters, baseline: Baseline, events: Events) -> tuple[float, Events, bool, int]:
    """When the run ended, its events, whether the result is that of the undisturbed run, and units redone."""
    with listening(events):
        report = run_flow(prune_model, parameters)
    redone = max(0, events.handed_out.total() - baseline.units)
    is_same = plan_of(report) == baseline.plan and report["one_shot"]["accuracy"] == baseline.accuracy
    return time.monotonic(), events, is_same, redone


def killed_while_telling(
    parameters: PruneParameters, baseline: Baseline, kill: Callable[[], None], entry: int
) -> tuple[list[Row], Events]:
    """Kill the tracking server just before the entry of that number is told."""
    tell, count, when = Record.tell, itertools.count(), time.monotonic()

    def tell_or_die(record: Record, *arguments: Any) -> Any:
        nonlocal when
        if next(count) == entry:
            kill()
            when = time.monotonic()
        return tell(record, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "tell", tell_or_die)
        _, events, is_same, redone = _run(parameters, baseline, Events())
    row = Row(
        point=f"entry {entry} of what is told", died="MLflow server, SIGKILL", outcome="the run finished by itself",
        same_plan=is_same, in_flight=0, redone=redone, seconds=round(time.monotonic() - when, 1),
    )  # fmt: skip
    return [row], events


def _share_out(rows: list[Row], redone: int) -> list[Row]:
    """Units are not marked with the kill that cost them: give each kill as many as it can have cost, in order."""
    shared = []
    for row in rows:
        part = min(redone, row.in_flight)
        redone -= part
        shared.append(Row(**{**vars(row), "redone": part}))
    if redone and shared:
        shared[-1] = Row(**{**vars(shared[-1]), "redone": shared[-1].redone + redone})
    return shared
