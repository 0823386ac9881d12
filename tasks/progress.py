"""How a run tells what it is doing: stages report here, and whoever watches installs a reporter."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

_LINE_SECONDS = 10.0  # between two lines about one stage


class ProgressReporter(Protocol):
    """Is told what happens, in the thread of the run."""

    def started(self, stage: str) -> None:
        """A stage begins."""

    def advanced(self, stage: str, step: str, done: int, total: int) -> None:
        """A step of the stage has done so many of its units; a stage may have several steps ("search, round 2")."""

    def finished(self, stage: str, seconds: float, summary: str) -> None:
        """A stage is over; the summary says in a few words what came out, or is empty."""


class EstimateLines:
    """Says now and then how far a long stage is and how long it will still take.

    Args:
        say: takes one line.
        seconds: at least so many between two lines.
    """

    def __init__(self, say: Callable[[str], None], seconds: float) -> None:
        self._say, self._seconds = say, seconds
        self._step = ""
        self._step_started = self._last_line = self._last_event = time.monotonic()

    def started(self, stage: str) -> None:  # noqa: ARG002 -- the protocol
        """Start the clock."""
        self._step, self._last_line = "", time.monotonic()
        self._last_event = self._last_line

    def advanced(self, stage: str, step: str, done: int, total: int) -> None:  # noqa: ARG002 -- the protocol
        """Say it unless the last line is too recent."""
        now = time.monotonic()
        if step != self._step:
            self._step, self._step_started = step, self._last_event
        self._last_event = now
        if now - self._last_line < self._seconds or done >= total:
            return
        left = remaining_seconds(now - self._step_started, done, total)
        self._last_line = now
        self._say(f"{step}: {done} of {total}, about {left:.0f} s left")


class LogReporter(EstimateLines):
    """Log one line per finished stage, and estimates in between."""

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger("entprune.run")
        if self._logger.level == logging.NOTSET:
            self._logger.setLevel(logging.INFO)
        super().__init__(self._logger.info, _LINE_SECONDS)

    def finished(self, stage: str, seconds: float, summary: str) -> None:
        """Log the stage."""
        self._logger.info("%s: %s%.1f s", stage, f"{summary}, " if summary else "", seconds)


def remaining_seconds(elapsed_seconds: float, done: int, total: int) -> float:
    """Time that the rest will take at the pace so far."""
    return elapsed_seconds * (total - done) / done if done else float("inf")


class StageClock:
    """Times stages and passes on what happens in them.

    Attributes:
        seconds: per stage that is over.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage = ""
        self._summary = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; one that fails is not reported as finished."""
        outer, self._stage, self._summary = self._stage, name, ""
        current_reporter().started(name)
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed
            self._stage = outer
        current_reporter().finished(name, elapsed, self._summary)

    def advance(self, step: str, done: int, total: int) -> None:
        """Progress of the runner that works for this stage."""
        current_reporter().advanced(self._stage or step, step, done, total)

    def summarise(self, text: str) -> None:
        """Say in a few words what came out of the present stage."""
        self._summary = text

    def timings(self) -> dict[str, float]:
        """Seconds per stage and their total, for the report."""
        rounded = {name: round(value, 3) for name, value in self.seconds.items()}
        return {**rounded, "total": round(sum(self.seconds.values()), 3)}


_reporter: ContextVar[ProgressReporter | None] = ContextVar("progress_reporter", default=None)


def current_reporter() -> ProgressReporter:
    """The reporter that was installed last, or one that logs."""
    reporter = _reporter.get()
    if reporter is None:
        reporter = LogReporter()
        _reporter.set(reporter)
    return reporter


@contextmanager
def report_to(reporter: ProgressReporter) -> Iterator[None]:
    """Install a reporter for a while."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)
