"""Part `recovery`: what the same short fine-tuning makes of every method's network at the same size.

Two starts: refit at this project's widths, and as the methods' users prune: cut out plain at uniform widths. The recipe
is the command's default (three epochs of distillation) for all; images that candidates are compared on are not trained
on. Methods that choose the same channels share one network.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from entprune.errors import ConfigError
from entprune.finetune import FinetuneConfig, finetune
from entprune.runner import torch_threads
from infra.benchmark.contest import Contest, wanted_methods
from infra.benchmark.outcomes import pack_outcomes
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject
from infra.benchmark.tuned import say_steps, tuning_key

STARTS = (("refit", "allocated"), ("plain", "uniform"))
RECIPE = FinetuneConfig(clip_norm=None)
BUDGETS = {
    "lenet": "parameters_removed-0.96",
    "vgg16_cifar": "parameters_removed-0.91",
    "resnet18_cifar": "parameters_removed-0.82",
    "resnet56_cifar": "macs_removed-0.53",
}


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """Every method from both starts, at one size for each network.

    Raises:
        ConfigError: a method or budget is unknown.
    """
    budget = BUDGETS[request.network]
    if request.budget not in {"", budget}:
        raise ConfigError(f"budget: expected {budget}, the only one of this part, got {request.budget!r}.")
    subject = Subject(part="recovery", network=request.network, seed=request.seed, budget=budget)
    methods = wanted_methods(request)
    return [
        (subject, {"method": method, "weights": weights, "widths": widths, **tuning_key(RECIPE)})
        for weights, widths in STARTS
        for method in methods
    ]


class RecoveryMeter:
    """Measures the cells of one network and seed, each before and after tuning.

    Args:
        request: what is asked.
        recipe: how networks are tuned; its seed is the request's.
    """

    def __init__(self, request: Request, recipe: FinetuneConfig = RECIPE) -> None:
        self._contest = Contest(request.bench())
        self._recipe = replace(recipe, seed=self._contest.bench.config.seed)
        self._known: dict[tuple[str, str], dict[str, Any]] = {}

    def facts(self, record: Record) -> Mapping[str, Any]:
        """Hashes of the inputs, settings, and figures of the unpruned network."""
        return self._contest.facts(record)

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:
        """Choose channels, cut them out, refit if asked, measure, tune, and measure again."""
        contest = self._contest
        plan = contest.plan(key["method"], subject.budget, key["widths"])
        widths = contest.widths(subject.budget, key["widths"])
        place = plan.digest(), key["weights"]
        if place not in self._known:
            self._known[place] = self._tune(contest.build(plan, refit=key["weights"] == "refit"))
        return {
            **self._known[place],
            **contest.size(widths),
            "widths": list(widths.values()),
            "plan_sha256": plan.digest(),
            "threads": contest.bench.config.threads,
        }

    def _tune(self, model: nn.Module) -> dict[str, Any]:
        """Accuracy and errors before and after."""
        bench = self._contest.bench
        before, start = bench.outcomes(model), time.perf_counter()
        with torch_threads(bench.config.threads):
            tuned = finetune(
                model, bench.model, bench.data.train, self._recipe, validation_indices=bench.validation.indices,
                progress=say_steps,
            )  # fmt: skip
        seconds = time.perf_counter() - start
        return {
            **_figures("one_shot", before),
            **_figures("tuned", bench.outcomes(tuned)),
            "epoch_seconds": round(seconds / self._recipe.epochs, 1),
        }


def _figures(stage: str, correct: np.ndarray) -> dict[str, Any]:
    return {f"{stage}_accuracy": 100.0 * float(correct.mean()), f"{stage}_wrong": pack_outcomes(~correct)}


PART = Part(
    name="recovery", networks=tuple(BUDGETS), threads=2, cells=cells, meter=RecoveryMeter,
    headline=("one_shot_accuracy", "tuned_accuracy", "epoch_seconds"),
)  # fmt: skip
