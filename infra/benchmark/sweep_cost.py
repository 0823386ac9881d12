"""Part `sweep`: what solving twelve settings costs beside one, on the same moments.

The first sweep is that of infra/sweeps/lenet.yaml: settings with the same entropy weight differ in their allocation
alone and have their continuations in common. In the second all twelve entropy weights differ. Both also run backward
elimination, which no setting changes. Processor seconds, each sweep in turns with the single setting.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from entprune.path import PathSetting
from entprune.runner import InProcessRunner
from entprune.stages import solve
from infra.benchmark.networks import NETWORKS, Bench
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject

NUM_SETTINGS, _REPEATS = 12, 3
ENTROPY_WEIGHTS: dict[str, tuple[float, ...]] = {
    "3 entropy weights x 4 loss exponents": (0.0, 1.0, 3.0),
    "12 entropy weights": tuple(float(weight) for weight in np.linspace(-0.5, 3.0, NUM_SETTINGS)),
}


class SweepMeter:
    """Times the solve stage of one network."""

    def __init__(self, request: Request) -> None:
        self._bench = request.bench()

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Hashes of the inputs."""
        return self._bench.facts

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Medians of both and their ratio."""
        weights = ENTROPY_WEIGHTS[key["settings"]]
        solve_seconds(self._bench, (1.0,))  # warms up
        pairs = [(solve_seconds(self._bench, (1.0,)), solve_seconds(self._bench, weights)) for _ in range(_REPEATS)]
        one, all_settings = (statistics.median(column) for column in zip(*pairs, strict=True))
        return {
            "one_setting_seconds": one,
            "sweep_seconds": all_settings,
            "ratio": statistics.median(sweep / single for single, sweep in pairs),
            "settings": NUM_SETTINGS,
            "continuations_per_group": len(weights) + 1,
            "groups": len(self._bench.network.groups.groups),
            "threads": self._bench.config.threads,
        }


def solve_seconds(bench: Bench, entropy_weights: tuple[float, ...]) -> float:
    """Processor seconds of all groups' paths at these entropy weights and by elimination."""
    settings = (*(PathSetting(entropy_weight=weight) for weight in entropy_weights), PathSetting(method="elimination"))
    config, statistics_ = replace(bench.config, settings=settings), bench.statistics
    start = time.process_time()
    solve(bench.network, statistics_, config, InProcessRunner(threads=config.threads))
    return time.process_time() - start


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """One cell for each sweep."""
    subject = Subject(part="sweep", network=request.network, seed=request.seed)
    return [(subject, {"settings": name}) for name in ENTROPY_WEIGHTS]


PART = Part(
    name="sweep", networks=tuple(NETWORKS), threads=1, cells=cells, meter=SweepMeter,
    headline=("one_setting_seconds", "sweep_seconds", "ratio"),
)  # fmt: skip
