"""Progress of a run in the terminal: a bar for the present stage, a line for each one that is over."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from tasks.progress import EstimateLines

_LINE_SECONDS = 30.0  # between two lines about one stage, where there is no terminal


class RichReporter:
    """Shows what a run reports (see `tasks.progress.ProgressReporter`); without a terminal by lines alone.

    Args:
        console: where to draw, standard error by default, so that results alone go to standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._step = ""
        self._lines = EstimateLines(self._say, _LINE_SECONDS)

    def __enter__(self) -> Self:
        if self._console.is_interactive:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._clear()
        if self._console.is_interactive:
            self._progress.stop()

    def started(self, stage: str) -> None:
        """Show a stage whose number of units is not known yet."""
        if self._console.is_interactive:
            self._show(stage, None)
        else:
            self._lines.started(stage)

    def advanced(self, stage: str, step: str, done: int, total: int) -> None:
        """Move the bar, each step of a stage has one of its own; without a terminal a line now and then."""
        if not self._console.is_interactive:
            self._lines.advanced(stage, step, done, total)
            return
        if self._task is None or step != self._step:
            self._show(step, total)
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total, amount=f"{done} of {total}, left")

    def finished(self, stage: str, seconds: float, summary: str) -> None:
        """Replace the bar by a line that stays."""
        self._clear()
        self._console.print(
            f"[green]✓[/green] {escape(stage):<22}[dim]{seconds:7.1f} s[/dim]  {escape(summary)}".rstrip()
        )

    def _say(self, text: str) -> None:
        self._console.print(f"[dim]  {escape(text)}[/dim]")

    def _show(self, text: str, total: int | None) -> None:
        self._clear()
        self._step = text
        self._task = self._progress.add_task(escape(text), total=total, amount="")

    def _clear(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = None
