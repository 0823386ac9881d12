"""Part `tuned`: networks of a fixed size before any gradient step and after a few epochs of fine-tuning.

Recipes were fixed per network before the seeds were measured, but for the seeds 0 of VGG-16 and ResNet-18. Images that
candidates were compared on are not trained on; the test images are measured at the end alone, before and after.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from entprune.config import Budget
from entprune.finetune import FinetuneConfig, finetune
from entprune.runner import torch_threads
from infra.benchmark.budgets import prune_to
from infra.benchmark.contest import budget_label
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How small a network is made, and how it is tuned.

    Attributes:
        budget: a size, so that nothing is searched.
        tuning: its seed is the request's.
    """

    budget: Budget
    tuning: FinetuneConfig

    def key(self) -> Key:
        """What tells its cell from others."""
        return {"budget": budget_label(self.budget), **tuning_key(self.tuning)}


def tuning_key(tuning: FinetuneConfig) -> Key:
    """What tells cells apart that were tuned differently."""
    return {
        "epochs": tuning.epochs,
        "learning_rate": tuning.learning_rate,
        "distillation_weight": tuning.distillation_weight,
    }


_LABELS_ALONE = {"learning_rate": 0.05, "distillation_weight": 0.0}
RECIPES = {
    "vgg16_cifar": Recipe(
        budget=Budget(parameters_removed=0.95), tuning=FinetuneConfig(epochs=14, **_LABELS_ALONE)
    ),
    "resnet18_cifar": Recipe(
        budget=Budget(parameters_removed=0.92), tuning=FinetuneConfig(epochs=8, **_LABELS_ALONE)
    ),
    "resnet56_cifar": Recipe(budget=Budget(macs_removed=0.531), tuning=FinetuneConfig(epochs=10, learning_rate=0.05)),
}  # fmt: skip


class TunedMeter:
    """Prunes one network to a size and tunes it.

    Args:
        request: what is asked.
        recipe: how; by default that of the network.
    """

    def __init__(self, request: Request, recipe: Recipe | None = None) -> None:
        self._bench, self._recipe = request.bench(), recipe or RECIPES[request.network]

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Hashes of the inputs."""
        return self._bench.facts

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Accuracy of the unpruned network, of the pruned one, and of that after tuning."""
        bench, tuning = self._bench, replace(self._recipe.tuning, seed=self._bench.config.seed)
        start = time.perf_counter()
        result = prune_to(bench, self._recipe.budget)
        pruned = time.perf_counter()
        with torch_threads(bench.config.threads):
            tuned = finetune(
                result.model, bench.model, bench.data.train, tuning, validation_indices=bench.validation.indices,
                progress=say_steps,
            )  # fmt: skip
        seconds = time.perf_counter() - pruned
        dense, small = result.report["dense"], result.report["one_shot"]
        return {
            "dense": dense,
            "parameters_removed": small["parameters_removed"],
            "macs_removed": small["macs_removed"],
            "parameters": small["parameters"],
            "macs": small["macs"],
            "one_shot_accuracy": small["accuracy"],
            "tuned_accuracy": bench.accuracy(tuned),
            "prune_seconds": round(pruned - start, 1),
            "epoch_seconds": round(seconds / tuning.epochs, 1),
            "threads": bench.config.threads,
        }


def say_steps(done: int, total: int, text: str) -> None:
    """Print twenty lines of progress."""
    if done == total or done % max(1, total // 20) == 0:
        print(f"  {text}: step {done} of {total}", flush=True)


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """One cell for each network."""
    subject = Subject(part="tuned", network=request.network, seed=request.seed)
    return [(subject, RECIPES[request.network].key())]


PART = Part(
    name="tuned", networks=tuple(RECIPES), threads=2, cells=cells, meter=TunedMeter,
    headline=("one_shot_accuracy", "tuned_accuracy", "epoch_seconds"),
)  # fmt: skip
