"""What a command's run needs beside Prefect, started side by side: each takes seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import TYPE_CHECKING

from flows.parameters import PruneParameters

if TYPE_CHECKING:
    from flows.progress_bar import RichReporter
    from tasks.workload import Inputs


@contextmanager
def started_engines(runs: Iterable[tuple[Inputs, PruneParameters]], reporter: RichReporter) -> Iterator[None]:
    """Workers that live as long as this block, and the way to MLflow.

    Args:
        runs: dense network and data of each run, and what is asked; the workers are those of the first.
        reporter: told what is waited for.

    Raises:
        EngineError: the cluster does not answer or can never hold the workers, or MLflow's address is none.
    """
    reporter.started("start the workers")
    from flows.workers import memory_need, start_workers  # noqa: PLC0415 -- engines only now: bad input has been refused
    from tasks.progress import report_to  # noqa: PLC0415 -- the same

    tracking, asked = _TrackingCheck(), list(runs)
    with start_workers(asked[0][1], memory_need(asked)), report_to(reporter):
        reporter.started("reach the tracking server")
        tracking.wait()
        reporter.started("start the flow engine")
        yield


class _TrackingCheck:
    """Import MLflow and reach its server in a thread: Ray, which must start in the main one, makes that one wait."""

    def __init__(self) -> None:
        self._problem: Exception | None = None
        self._thread = threading.Thread(target=copy_context().run, args=(self._run,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()
        if self._problem is not None:
            raise self._problem

    def _run(self) -> None:
        from tasks import tracking  # noqa: PLC0415 -- an engine

        try:
            tracking.check()
        except tracking.TrackingError:
            pass  # the run goes on, and says so
        except Exception as error:  # noqa: BLE001 -- handed to the thread that waits
            self._problem = error
