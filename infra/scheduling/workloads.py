"""Runs of the measured network as stages and units: what is simulated.

Costs that depend on the number of images are linear in it (see :mod:`infra.scheduling.measure`). Everything a unit does
is counted, nothing that a network between the machines would add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from entprune.config import PruneConfig
from entprune.stages import prediction_units, shards
from infra.scheduling.simulation import Job, Stage

_BATCH = 64
_FRACTIONS = 50.0  # between the largest and the smallest network that a search begins with


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """What is run.

    Attributes:
        title: in the page.
        searches: budgets or settings that are searched side by side.
        entropy_settings: continuations of each group beside the elimination.
        candidates: of each search and round.
        test_images: that the dense and the chosen network are measured on.
        old_predictions: predict in 8 units however many images there are, as before they were cut by images.
    """

    title: str
    searches: int = 1
    entropy_settings: int = 1
    candidates: int = PruneConfig().candidates_per_round
    test_images: int = 50_000
    old_predictions: bool = False

    @property
    def rounds(self) -> int:
        """Rounds until neighbouring sizes differ by the resolution, each cutting the bracket evenly."""
        steps = math.log(_FRACTIONS) / math.log(PruneConfig().resolution)
        return min(PruneConfig().max_rounds, math.ceil(math.log(steps) / math.log(self.candidates + 1)))


SCENARIOS = (
    Scenario(title="one run, predictions in 8 units", old_predictions=True),
    Scenario(title="one run"),
    Scenario(title="one run, 8 candidates a round", candidates=8),
    Scenario(title="sweep of 12 settings, 6 of them of the solver", searches=12, entropy_settings=6),
)


class Costs:
    """Measured seconds.

    Args:
        content: of the file that :mod:`infra.scheduling.measure` writes.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.few, self.many = int(content["few"]), int(content["many"])
        self.calibration, self.validation = content["calibration_samples"], content["validation_samples"]

    def step(self, name: str) -> float:
        """Seconds of a step that does not depend on the number of images."""
        return float(self.content["steps"][name]["seconds"])

    def images(self, name: str, count: int) -> float:
        """Seconds of a step on so many images."""
        few, many = self.step(f"{name} {self.few}"), self.step(f"{name} {self.many}")
        slope = (many - few) / (self.many - self.few)
        return max(0.0, few - slope * self.few) + slope * count

    def stages(self, scenario: Scenario, *, is_validation_divisible: bool = False) -> list[Stage]:
        """All stages of a run.

        Args:
            scenario: what is run.
            is_validation_divisible: count a candidate's validation as what could be cut into batches, which the product
                does not do; the bound becomes lower, the makespan stays.
        """
        rounds = [self._round(scenario, is_validation_divisible)] * scenario.rounds
        return [
            Stage(name="load", before_seconds=self.step("analyse")),
            self._calibrate(),
            self._solve(scenario),
            self._predict("validation of the dense network", "predict dense", self.validation, scenario),
            *rounds,
            Stage(name="certificate", before_seconds=self.step("certify")),
            self._measure("dense", scenario),
            self._measure("pruned", scenario),
        ]

    def _calibrate(self) -> Stage:
        parts = shards(self.calibration, PruneConfig().calibration_shards, self.content["batch_size"])
        jobs = tuple(Job(seconds=self.images("calibrate", stop - start)) for start, stop in parts)
        return Stage(name="calibration", jobs=jobs, after_seconds=self.step("merge") * (len(jobs) - 1))

    def _solve(self, scenario: Scenario) -> Stage:
        groups, rate = self.content["groups"], self.content["engine"]["share_bytes_per_second"]
        counts = {"entropy": scenario.entropy_settings, "elimination": 1}
        jobs = [
            Job(seconds=group["seconds"][method], cost=group["cost"])
            for group in groups
            for method, count in counts.items()
            for _ in range(count)
        ]
        before = sum(group["build_seconds"] + group["bytes"] / rate for group in groups)
        return Stage(name="solving", jobs=tuple(jobs), before_seconds=before)

    def _round(self, scenario: Scenario, is_validation_divisible: bool) -> Stage:
        assembly = self.images("assemble", self.calibration)
        least = assembly + self.images("predict pruned", _BATCH) if is_validation_divisible else None
        seconds = assembly + self.images("predict pruned", self.validation)
        jobs = (Job(seconds=seconds, least_seconds=least),) * (scenario.searches * scenario.candidates)
        return Stage(name="the search", jobs=jobs)

    def _measure(self, network: str, scenario: Scenario) -> Stage:
        stage = self._predict(f"test of the {network} network", f"predict {network}", scenario.test_images, scenario)
        return Stage(name=stage.name, jobs=stage.jobs, after_seconds=self.step(f"latency {network}"))

    def _predict(self, name: str, step: str, count: int, scenario: Scenario) -> Stage:
        units = 8 if scenario.old_predictions else prediction_units(count)
        least = self.images(step, _BATCH)
        jobs = tuple(
            Job(seconds=self.images(step, stop - start), least_seconds=least)
            for start, stop in shards(count, units, _BATCH)
        )
        return Stage(name=name, jobs=jobs)
