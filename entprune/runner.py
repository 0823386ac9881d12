"""Independent units of work and who runs them: in process here, on a cluster elsewhere, with the same results.

A unit is a module-level function `unit(shared, item)`; `shared` is put once and read by many units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch

from entprune.errors import ConfigError

Unit = Callable[[Any, Any], Any]
OnResult = Callable[[int, Any], None]
Progress = Callable[[str, int, int], None]  # stage, units done, all units


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One unit's arguments.

    Attributes:
        shared: handle from :meth:`Runner.share`, or a tuple of handles for a unit that reads as many values.
        item: small argument of this unit alone.
        cost: relative effort; runners start the largest first.
    """

    shared: Any
    item: Any
    cost: float = 1.0


@runtime_checkable
class Divisible(Protocol):
    """A shared value whose units can do with less memory."""

    def in_chunks(self, images: int) -> Self:
        """The same work with about that many images in memory at once, and the same result."""


class Runner(Protocol):
    """Runs units; results come back in the order of the work, whoever finished first."""

    @property
    def workers(self) -> int:
        """Units at a time; no result may depend on it."""

    def share(self, value: Any) -> Any:
        """Put a value where every unit can read it without another copy; return its handle."""

    def release(self, handle: Any) -> None:
        """Forget a shared value."""

    def run(
        self, unit: Unit, work: Sequence[Work], *, stage: str, on_result: OnResult | None = None, keep: bool = True
    ) -> list[Any]:
        """Run all work.

        Args:
            unit: what is done with each work's arguments.
            work: in any order.
            stage: name for progress and errors.
            on_result: called with (number, result) in this thread as results come in.
            keep: without it the list returned holds None: large results live as long as `on_result` wants.
        """


class InProcessRunner:
    """Runs units in this process, in threads of their own where there is more than one worker.

    Args:
        workers: units at a time.
        threads: torch threads of each unit; fixed so that the plan does not depend on the number of workers.
        progress: called after each unit.
    """

    def __init__(self, *, workers: int = 1, threads: int = 1, progress: Progress | None = None) -> None:
        if workers < 1 or threads < 1:
            raise ConfigError(f"expected at least one worker and one thread, got {workers} and {threads}.")
        self._workers, self._threads, self._progress = workers, threads, progress

    @property
    def workers(self) -> int:
        """Units at a time."""
        return self._workers

    def share(self, value: Any) -> Any:
        """Return the value itself."""
        return value

    def release(self, handle: Any) -> None:
        """Nothing to forget: the caller's reference is the only one."""

    def run(
        self, unit: Unit, work: Sequence[Work], *, stage: str, on_result: OnResult | None = None, keep: bool = True
    ) -> list[Any]:
        """Run all work, largest first."""
        results: list[Any] = [None] * len(work)
        order = largest_first(work)
        with torch_threads(self._threads), ThreadPoolExecutor(self._workers) as pool:
            futures = {number: pool.submit(self._call, unit, work[number]) for number in order}
            try:
                for done, number in enumerate(order, start=1):
                    result = futures.pop(number).result()
                    if keep:
                        results[number] = result
                    if on_result is not None:
                        on_result(number, result)
                    del result
                    if self._progress is not None:
                        self._progress(stage, done, len(work))
            finally:
                pool.shutdown(wait=True, cancel_futures=True)  # after an error nothing new is begun
        return results

    def _call(self, unit: Unit, work: Work) -> Any:
        torch.set_num_threads(self._threads)
        return unit(work.shared, work.item)


def largest_first(work: Sequence[Work]) -> list[int]:
    """Numbers of the units by falling cost; equal costs keep their order."""
    return sorted(range(len(work)), key=lambda number: -work[number].cost)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Use that many torch threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
