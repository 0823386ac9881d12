"""Drivers: processes of their own that run the flow, are killed, and are started again until one comes through.

They are forked from one process that has imported everything, join one Ray cluster and one Prefect server, and so cost
seconds each.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from flows.parameters import PruneParameters
from tests.faults.ground import BEING_STORED, WORKERS, Row, note, wait_for

_SIGNALS = {signal.SIGKILL: "driver, SIGKILL", signal.SIGINT: "driver, Ctrl-C", signal.SIGTERM: "driver, SIGTERM"}
_LATE_STAGES = ("certify", "measure", "publish")
_FREED_SECONDS = 30.0


def start_factory() -> ForkServerContext:
    """Context whose processes have imported what a driver needs; the environment is that of the first use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flows.prune_model", "flows.server", "mlflow.pytorch", "tests.faults.drivers"])
    return context


def drive(values: dict[str, Any], log: str, environment: dict[str, str]) -> None:
    """Run the flow, a sweep where there is a grid; everything that happens is one line of the log, written at once."""
    os.environ.update(environment)
    import torch

    from flows.prune_model import prune_model
    from flows.server import run_flow
    from flows.sweep import sweep
    from flows.sweep_parameters import parse_sweep
    from tasks.progress import report_to

    torch.set_num_threads(1)
    file = Path(log).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115 -- for as long as the process lives
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for name in ("tasks", "flows.server"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False

    class Stages:
        def started(self, stage: str) -> None:
            file.write(f"begin {stage}\n")

        def advanced(self, *_: Any) -> None: ...

        def finished(self, *_: Any) -> None: ...

    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: environment["PREFECT_API_URL"]}), report_to(Stages()):
        if "grid" in values:
            run_flow(sweep, parse_sweep(values))
        else:
            run_flow(prune_model, PruneParameters.model_validate(values))
    file.write("complete\n")


@dataclass(frozen=True)
class KillPoint:
    """When a driver is killed: after so many units of its own, or at the beginning of a stage, and a moment later."""

    signal: signal.Signals
    units: int | None
    stage: str | None
    delay_seconds: float

    def describe(self) -> str:
        where = f"stage '{self.stage}' begins" if self.units is None else f"{self.units} units after its start"
        return f"{where}, {1000 * self.delay_seconds:.0f} ms later"

    def is_reached(self, log: Log) -> bool:
        if self.units is None:
            return f"begin {self.stage}" in log.lines
        return log.handed_out.total() >= self.units


class Log:
    """What one driver has written so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: list[str] = []
        self.handed_out: Counter[str] = Counter()
        self.stored: Counter[str] = Counter()

    def read(self) -> Log:
        text = self._path.read_text(encoding="utf-8") if self._path.is_file() else ""
        complete = text.split("\n")[:-1]
        for line in complete[len(self.lines) :]:
            note(line, self.handed_out, self.stored)
        self.lines = complete
        return self

    @property
    def is_complete(self) -> bool:
        return "complete" in self.lines

    def in_flight(self) -> int:
        return self.handed_out.total() - self.stored.total()


def draw_kill_points(seed: int, units: int, count: int) -> list[KillPoint]:
    """Moments all over the run: first while there are units to do, then in stages without any, in their order."""
    generator = random.Random(seed)
    signals = [signal.SIGKILL] * (count - 2) + [signal.SIGINT, signal.SIGTERM]
    generator.shuffle(signals)
    stages = sorted(generator.sample(_LATE_STAGES, count // 3), key=_LATE_STAGES.index)
    share = units // (count - len(stages) + 1)  # so that none of these drivers comes to the end
    moments = [(generator.randint(1, share), None) for _ in range(count - len(stages))]
    moments[generator.randrange(len(moments))] = (None, "start")
    return [
        KillPoint(kind, number, stage, round(generator.uniform(0.0, 0.1), 3))
        for kind, (number, stage) in zip(signals, [*moments, *((None, stage) for stage in stages)], strict=True)
    ]


class Relay:
    """One run that goes from driver to driver.

    Args:
        context: from :func:`start_factory`.
        values: parameters of the run or sweep, with a store of its own, as JSON holds them.
        environment: of the drivers.
        folder: of their logs.
        is_free: whether no worker of a driver is left.
    """

    def __init__(
        self,
        context: ForkServerContext,
        values: dict[str, Any],
        environment: dict[str, str],
        folder: Path,
        is_free: Callable[[], bool],
    ) -> None:
        self._context, self._values, self._environment = context, values, environment
        self._folder, self._is_free = folder, is_free
        self.logs: list[Log] = []

    def run(self, points: list[KillPoint], is_as_undisturbed: Callable[[], bool]) -> list[Row]:
        """Kill a driver at each point; the last one comes through, and its result is compared."""
        deaths = [(point, *self._kill_one(point)) for point in points]
        process, log = self._start()
        process.join(300)
        ended = time.monotonic()
        if process.exitcode != 0 or not log.read().is_complete:
            raise AssertionError(f"the last driver ended with {process.exitcode}: {log.lines[-3:]}")
        is_same = is_as_undisturbed()
        return [
            Row(
                point=point.describe(), died=_SIGNALS[point.signal], outcome=outcome, same_plan=is_same,
                in_flight=log.in_flight(), redone=log.in_flight(), seconds=round(ended - when, 1),
            )
            for point, log, outcome, when in deaths
        ]  # fmt: skip

    def total_handed_out(self) -> int:
        """Units that all drivers together handed out."""
        return sum(log.handed_out.total() for log in self.logs)

    def _start(self) -> tuple[Any, Log]:
        path = self._folder / f"driver {len(self.logs)}.log"
        process = self._context.Process(target=drive, args=(self._values, str(path), self._environment))
        process.start()
        self.logs.append(Log(path))
        return process, self.logs[-1]

    def _kill_one(self, point: KillPoint) -> tuple[Log, str, float]:
        process, log = self._start()
        wait_for(lambda: point.is_reached(log.read()) or not process.is_alive(), 200, point.describe())
        time.sleep(point.delay_seconds)
        when = time.monotonic()
        if process.is_alive():
            os.kill(process.pid, point.signal)
        process.join(_FREED_SECONDS)
        if process.is_alive():
            raise AssertionError(f"a driver outlived {_SIGNALS[point.signal]} by {_FREED_SECONDS:g} s")
        wait_for(self._is_free, _FREED_SECONDS, "the workers of a dead driver to end")
        log.read()
        output = Path(self._values["output"])
        if output.exists() and not any((output / name).is_file() for name in ("report.json", "sweep.json")):
            raise AssertionError(f"half of a result lies in {output}")
        done = "it was done already" if log.is_complete else "its actors ended, the next driver went on"
        return log, done, when


BOUND = WORKERS + BEING_STORED
