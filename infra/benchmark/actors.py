"""Part `actors`: what a second actor is worth on two cores, in the stage of the solves.

One actor and two, with as many threads each, solve the same problems in turns: a slow spell of the machine meets both.
Workers are up before the clock starts; building the problems and sharing them counts, for it is part of the stage.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from entprune.errors import ConfigError
from entprune.path import SparsityPath
from entprune.runner import Work
from entprune.stages import solve
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject
from tasks.actors import RayRunner
from tasks.cluster import Cluster, WorkerShape, connect

PAIRS = 5
ACTORS = (1, 2)
_WARM_UP = 200  # rounds of tiny units, until every actor has answered


class ActorsMeter:
    """Solves the problems of one network, calibrated once in process."""

    def __init__(self, request: Request) -> None:
        self._bench = request.bench()
        self._bench.statistics  # noqa: B018 -- computed before anything is timed

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Hashes of the inputs, and how many units there are."""
        units = len(self._bench.network.groups.groups) * len(self._bench.config.settings)
        return {**self._bench.facts, "units": units}

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Seconds with one actor and with two; every second pair begins with two."""
        threads, seconds, paths = self._bench.config.threads, {}, {}
        order = ACTORS if key["pair"] % 2 else ACTORS[::-1]
        with connect(None, workers=max(ACTORS), shape=WorkerShape(threads=threads)) as cluster:
            for count in order:
                seconds[count], paths[count] = self._time(dataclasses.replace(cluster, workers=count))
        _check_equal(paths[1], paths[2])
        return {
            "seconds": {str(count): seconds[count] for count in ACTORS},
            "speed_up": seconds[1] / seconds[2],
            "threads": threads,
        }

    def _time(self, cluster: Cluster) -> tuple[float, Mapping[str, SparsityPath]]:
        bench = self._bench
        with RayRunner(cluster) as runner:
            warm_up(runner, cluster.workers)
            start = time.perf_counter()
            paths = solve(bench.network, bench.statistics, bench.config, runner)
            return time.perf_counter() - start, paths


def pause(shared: Any, seconds: float) -> None:  # noqa: ARG001 -- a unit
    """Unit: wait, so that the other actor gets one, too."""
    time.sleep(seconds)


def warm_up(runner: RayRunner, actors: int) -> None:
    """Return when every actor is up and has run a unit.

    Raises:
        ConfigError: one did not come up.
    """
    runner.settle()
    handle = runner.share(None)
    for _ in range(_WARM_UP):
        runner.run(pause, [Work(shared=handle, item=0.02)] * (2 * actors), stage="warm-up")
        if runner.describe()["workers"] == actors:
            break
    else:
        raise ConfigError(f"expected {actors} actors on this machine, got fewer; free memory and cores.")
    runner.release(handle)


def _check_equal(first: Mapping[str, SparsityPath], second: Mapping[str, SparsityPath]) -> None:
    for name, path in first.items():
        if (path.errors != second[name].errors).any():
            raise ConfigError(f"group {name!r}: one and two actors found different paths; please report it.")


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """One cell for each pair."""
    subject = Subject(part="actors", network=request.network, seed=request.seed)
    return [(subject, {"pair": number}) for number in range(1, PAIRS + 1)]


PART = Part(
    name="actors", networks=("lenet", "vgg16_cifar", "resnet18_cifar"), threads=1, cells=cells, meter=ActorsMeter,
    headline=("seconds", "speed_up"),
)  # fmt: skip
