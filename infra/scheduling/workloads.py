"""Runs of the measured network as stages and units: what is simulated.

Costs that depend on the number of images are linear in it (see :mod:`infra.scheduling.measure`). Everything a unit does
is counted, nothing that a network between the machines would add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from entprune.config import PruneConfig
from entprune.models import build_model
from entprune.predictions import EVALUATION_BATCH, prediction_units
from entprune.scoring import UNITS_PER_WORKER, images_ahead
from entprune.selection import StopRule
from entprune.stages import shards
from infra.scheduling.simulation import Job, Stage

_BATCH = EVALUATION_BATCH
_LOOK = StopRule(max_drop=None, quantile=0.0).chunk
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
        is_old: predict in 8 units however many images there are, and score every candidate as one unit, as it was
            before this was simulated.
    """

    title: str
    searches: int = 1
    entropy_settings: int = 1
    candidates: int = PruneConfig().candidates_per_round
    test_images: int = 50_000
    is_old: bool = False

    @property
    def rounds(self) -> int:
        """Rounds until neighbouring sizes differ by the resolution, each cutting the bracket evenly."""
        steps = math.log(_FRACTIONS) / math.log(PruneConfig().resolution)
        return min(PruneConfig().max_rounds, math.ceil(math.log(steps) / math.log(self.candidates + 1)))


SCENARIOS = (
    Scenario(title="one run, as it was", is_old=True),
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

    def stages(self, scenario: Scenario, workers: int) -> list[Stage]:
        """All stages of a run; what is cut, and how finely, follows the number of workers as in the product."""
        return [
            Stage(name="load", before_seconds=self.step("analyse")),
            self._calibrate(),
            self._solve(scenario),
            self._predict("validation of the dense network", "predict dense", self.validation, scenario, workers),
            *(self._round(scenario, workers) * scenario.rounds),
            Stage(name="certificate", before_seconds=self.step("certify")),
            self._measure("dense", scenario, workers),
            self._measure("pruned", scenario, workers),
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

    def _round(self, scenario: Scenario, workers: int) -> list[Stage]:
        """Candidates as one unit each, or assembly first and then batches (see :mod:`entprune.scoring`)."""
        count, assembly = scenario.searches * scenario.candidates, self.images("assemble", self.calibration)
        if scenario.is_old or workers < 2 * count:
            seconds = assembly + self.images("predict pruned", self.validation)
            least = assembly + self.images("predict pruned", _BATCH)
            return [Stage(name="the search", jobs=(Job(seconds=seconds, least_seconds=least),) * count)]
        sharing = count * self.network_bytes / float(self.content["engine"]["share_bytes_per_second"])
        steps = [Stage(name="assembly", jobs=(Job(seconds=assembly),) * count, after_seconds=sharing)]
        done, own = 0, -(-workers // count)
        while done < self.validation:
            following = images_ahead(self.validation - done, own, _LOOK)
            jobs = self._ranges("predict pruned", following, own * UNITS_PER_WORKER) * count
            steps.append(Stage(name="validation", jobs=jobs))
            done += following
        return steps

    def _measure(self, network: str, scenario: Scenario, workers: int) -> Stage:
        name, step = f"test of the {network} network", f"predict {network}"
        stage = self._predict(name, step, scenario.test_images, scenario, workers)
        return Stage(name=name, jobs=stage.jobs, after_seconds=self.step(f"latency {network}"))

    def _predict(self, name: str, step: str, count: int, scenario: Scenario, workers: int) -> Stage:
        return Stage(
            name=name, jobs=self._ranges(step, count, 8 if scenario.is_old else prediction_units(count, workers))
        )

    def _ranges(self, step: str, count: int, units: int) -> tuple[Job, ...]:
        least = self.images(step, _BATCH)
        sizes = [stop - start for start, stop in shards(count, units, _BATCH)]
        return tuple(Job(seconds=self.images(step, size), cost=size, least_seconds=least) for size in sizes)

    @cached_property
    def network_bytes(self) -> int:
        """Of the dense network: what a candidate has at most to send."""
        model = build_model(self.content["model"], num_classes=1000, input_shape=(3, 224, 224))
        return sum(value.numel() * value.element_size() for value in model.state_dict().values())
