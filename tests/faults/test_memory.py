"""Units that lack memory are done again with fewer images at a time, then while nothing else runs."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from entprune.errors import EngineError
from entprune.runner import Work
from tasks.actors import RayRunner, lacks_memory
from tasks.cluster import Cluster, WorkerShape
from tasks.unit_queue import UnitQueue
from tests.faults.engines import Engines
from tests.faults.ground import WORKERS

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find the tests


@dataclass(frozen=True)
class Job:
    """Fits into memory with so many images at a time, or alone."""

    fits: int
    folder: Path
    images: int = 64

    def in_chunks(self, images: int) -> Job:
        return replace(self, images=images)


def greedy(job: Job, item: int) -> tuple[int, int]:
    if job.images > job.fits:
        torch.empty(2**60)
    return item, job.images


def needs_the_machine(job: Job, item: int) -> int:
    """Item 0 needs all the memory there is; the units leave marks while they run."""
    mark = job.folder / str(item)
    mark.touch()
    try:
        time.sleep(0.3)
        if item == 0 and len(list(job.folder.iterdir())) > 1:
            raise MemoryError("no room beside another unit")
    finally:
        mark.unlink()
    return item


@pytest.fixture(scope="module")
def runner(engines: Engines) -> Iterator[RayRunner]:
    with RayRunner(Cluster(workers=WORKERS, shape=WorkerShape(), is_local=False)) as pool:
        yield pool


def run(runner: RayRunner, unit: Any, job: Job, count: int) -> list[Any]:
    handle = runner.share(job)
    try:
        return runner.run(unit, [Work(shared=handle, item=item) for item in range(count)], stage="test")
    finally:
        runner.release(handle)


@pytest.mark.parametrize(("fits", "shortages"), [(64, 0), (32, 1), (16, 2)])
def test_unit_shrinks_until_it_fits(
    runner: RayRunner, tmp_path: Path, caplog: pytest.LogCaptureFixture, fits: int, shortages: int
) -> None:
    with caplog.at_level(logging.WARNING):
        assert run(runner, greedy, Job(fits, tmp_path), 3) == [(0, fits), (1, fits), (2, fits)]
    assert len(caplog.messages) == 3 * shortages
    assert all("lacked memory" in line and "images at a time" in line for line in caplog.messages)


def test_unit_that_never_fits_is_given_up(runner: RayRunner, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"a unit lacks memory even with 16 images at a time and nothing beside it"):
        run(runner, greedy, Job(1, tmp_path), 2)


def test_unit_that_needs_the_machine_gets_it(runner: RayRunner, tmp_path: Path) -> None:
    assert run(runner, needs_the_machine, Job(64, tmp_path), 8) == list(range(8))


def test_queue_gives_a_lonely_unit_no_company() -> None:
    queue = UnitQueue([0, 1], "test")
    assert queue.take(num_busy=0) == 0
    for _ in range(3):
        queue.returned(0)
        queue.put_back_smaller(0, "no memory")
    assert queue.take(num_busy=1) == 1
    assert queue.take(num_busy=1) is None
    queue.returned(1)
    queue.put_back(1, "killed")
    assert queue.take(num_busy=0) == 1
    queue.returned(1)
    assert queue.take(num_busy=0) == 0
    queue.put_back(1, "killed")
    assert queue.take(num_busy=1) is None
    queue.returned(0)
    assert queue.take(num_busy=0) == 1


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError(function_name="run", traceback_str="", cause=cause, pid=os.getpid(), ip="127.0.0.1")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OutOfMemoryError("killed due to the node running low on memory"), True),
        (raised(MemoryError()), True),
        (raised(RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")), True),
        (raised(torch.OutOfMemoryError("CUDA out of memory")), True),
        (raised(RuntimeError("shapes do not match")), False),
        (ActorDiedError(), False),
    ],
)
def test_want_of_memory_is_recognised(error: BaseException, expected: bool) -> None:
    assert lacks_memory(error) is expected
