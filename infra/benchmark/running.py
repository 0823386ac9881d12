"""Run one part of the benchmark on one network: its missing cells one by one, each stored as soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.benchmark.parts import Meter, Part, Request
from infra.benchmark.records import Record, Subject, describe_run


class Progress:
    """One line for each finished cell, with an estimate of the rest."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done, self._start = title, total, 0, time.perf_counter()

    def step(self, text: str) -> None:
        """Count one cell."""
        self._done += 1
        seconds = time.perf_counter() - self._start
        left = seconds / self._done * (self._total - self._done)
        print(f"{self._title} {self._done}/{self._total}, {_minutes(left)} left | {text}", flush=True)


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


def run_part(part: Part, request: Request, results: Path, *, is_forced: bool = False) -> None:
    """Measure the missing cells of one part and network, each stored as soon as it is known.

    Args:
        part: of the benchmark.
        request: what is asked of it.
        results: folder of all parts' results.
        is_forced: measure again what exists; files on other inputs begin anew.
    """
    records: dict[Subject, Record] = {}
    todo = []
    for subject, key in part.cells(request):
        if subject not in records:
            records[subject] = Record(subject.path(results), subject)
        if is_forced or not records[subject].has(key):
            todo.append((subject, key))
    progress = Progress(f"{part.name} {request.network} seed {request.seed}", len(todo))
    run = describe_run(command_of(part, request), request.threads)
    meter: Meter | None = None
    for subject, key in todo:
        meter = meter or part.meter(request)
        records[subject].require_facts(meter.facts(records[subject]), renew=is_forced)
        values = meter.measure(subject, key)
        records[subject].put(key, values, run)
        progress.step(" ".join([subject.budget, *map(str, key.values()), *_headline(part, values)]))


def command_of(part: Part, request: Request) -> str:
    """The command that measures it again."""
    command = f"make benchmark PART={part.name} NETWORK={request.network} SEED={request.seed}"
    command += f" THREADS={request.threads}" if request.threads != part.threads else ""
    return command + (f" DEVICE={request.device}" if request.device != "cpu" else "")


def _headline(part: Part, values: Mapping[str, Any]) -> list[str]:
    return [f"| {name}: {_short(values[name])}" for name in part.headline if name in values]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(entry)}" for name, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
