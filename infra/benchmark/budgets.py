"""Whole runs of this project by accuracy budget, in process, with time per stage.

Part `budgets` by channels alone, part `low_rank` with layers of low rank as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from entprune import Budget, PruningResult, prune
from entprune.errors import ConfigError
from entprune.stages import ImageSet
from infra.benchmark.networks import LONG_TRAINED, NETWORKS, Bench
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject

POINTS = (0.5, 0.1)
LOW_RANK = "low_rank"
_FIGURES = (
    "accuracy", "accuracy_drop", "accuracy_drop_interval", "parameters", "parameters_removed", "macs", "macs_removed",
    "latency_ms",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """Some images of a split, as a split of their own."""

    images: ImageSet

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class of each image."""
        return np.asarray(self.images.split.labels)[self.images.indices]

    def batch(self, indices: npt.NDArray[np.integer[Any]]) -> Tensor:
        """Images at these positions of the subset."""
        return self.images.split.batch(self.images.indices[indices])


def prune_within(bench: Bench, points: float, *, is_tested: bool = True) -> PruningResult:
    """Prune to an accuracy budget; the test images are measured once, at the end, or not at all."""
    return prune_to(bench, Budget(max_accuracy_drop=points), is_tested=is_tested)


def prune_to(bench: Bench, budget: Budget, *, model: nn.Module | None = None, is_tested: bool = True) -> PruningResult:
    """Prune the network, or one that came of it, to any budget, as :func:`prune_within`."""
    return prune(
        bench.model if model is None else model,
        Subset(bench.calibration),
        budget=budget,
        evaluate=Subset(bench.validation),
        test=Subset(bench.test) if is_tested else None,
        config=bench.config,
        model_spec=bench.entry.model_spec if model is None else None,
    )


class BudgetMeter:
    """Runs one network by accuracy budgets."""

    def __init__(self, request: Request) -> None:
        self._bench = request.bench()

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Hashes of the inputs."""
        return self._bench.facts

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:
        """Figures of the report that comparisons need; kept channels stay out."""
        self._bench.config = replace(self._bench.config, low_rank=subject.part == LOW_RANK)
        report = prune_within(self._bench, key["max_accuracy_drop"]).report
        return {
            "dense": report["dense"],
            "one_shot": {name: report["one_shot"][name] for name in _FIGURES},
            "budget_met": report["budget_met"],
            "certificate": report["certificate"],
            "timings_seconds": report["timings_seconds"],
            "candidates": report["candidates"],
            **({"ranks": report["low_rank"]} if report["low_rank"] else {}),
            "threads": self._bench.config.threads,
        }


def cells(request: Request, part: str = "budgets") -> list[tuple[Subject, Key]]:
    """One cell for each budget.

    Raises:
        ConfigError: there is no such budget.
    """
    labels = {f"max_accuracy_drop-{points:g}": points for points in POINTS}
    if request.budget not in {"", *labels}:
        raise ConfigError(f"budget: expected one of {', '.join(labels)}, got {request.budget!r}.")
    subject = Subject(part=part, network=request.network, seed=request.seed)
    wanted = (points for label, points in labels.items() if request.budget in {"", label})
    return [(subject, {"max_accuracy_drop": points}) for points in wanted]


PART = Part(
    name="budgets", networks=(*NETWORKS, *LONG_TRAINED), threads=2, cells=cells, meter=BudgetMeter,
    headline=("timings_seconds",),
)  # fmt: skip
LOW_RANK_PART = replace(PART, name=LOW_RANK, networks=tuple(NETWORKS), cells=partial(cells, part=LOW_RANK))
