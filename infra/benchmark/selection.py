"""Part `selection`: who chooses better, and how much of the gain is the choice, the widths or the re-estimation.

Every method's kept channels are measured in four cells per budget: weights as they are or refit, and widths in one
ratio for all layers or those that this project allocates. No gradient step anywhere. Methods that choose the same
channels share one assembly and one pass over the test images.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from entprune.config import Budget
from entprune.errors import ConfigError
from infra.benchmark.contest import Contest, budget_label, wanted_methods
from infra.benchmark.networks import NETWORKS, find_network
from infra.benchmark.outcomes import pack_outcomes
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject

VARIANTS = (("refit", "allocated"), ("plain", "uniform"), ("refit", "uniform"), ("plain", "allocated"))  # as measured


def wanted_budgets(request: Request) -> list[Budget]:
    """Budgets of the network, or the one that is asked for.

    Raises:
        ConfigError: the network has no such budget.
    """
    budgets = find_network(request.network).budgets()
    wanted = [budget for budget in budgets if request.budget in {"", budget_label(budget)}]
    if not wanted:
        known = ", ".join(budget_label(budget) for budget in budgets)
        raise ConfigError(f"budget: expected one of {known}, got {request.budget!r}.")
    return wanted


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """All cells, budget by budget."""
    methods = wanted_methods(request)
    found: list[tuple[Subject, Key]] = []
    for budget in wanted_budgets(request):
        subject = Subject(part="selection", network=request.network, seed=request.seed, budget=budget_label(budget))
        for weights, widths in VARIANTS:
            found.extend((subject, {"method": method, "weights": weights, "widths": widths}) for method in methods)
    return found


class SelectionMeter:
    """Measures the cells of one network and seed."""

    def __init__(self, request: Request) -> None:
        self._contest = Contest(request.bench())
        self._outcomes: dict[tuple[str, str], np.ndarray] = {}

    def facts(self, record: Record) -> Mapping[str, Any]:
        """Hashes of the inputs, settings, and figures of the unpruned network."""
        return self._contest.facts(record)

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:
        """Choose channels, cut them out, refit if asked, and measure on the test images."""
        start = time.perf_counter()
        contest = self._contest
        plan = contest.plan(key["method"], subject.budget, key["widths"])
        widths = contest.widths(subject.budget, key["widths"])
        place = plan.digest(), key["weights"]
        is_shared = place in self._outcomes
        if not is_shared:
            model = contest.build(plan, refit=key["weights"] == "refit")
            self._outcomes[place] = contest.bench.outcomes(model)
        return {
            "accuracy": 100.0 * float(self._outcomes[place].mean()),
            "wrong": pack_outcomes(~self._outcomes[place]),
            **contest.size(widths),
            "widths": list(widths.values()),
            "plan_sha256": plan.digest(),
            "selector_seconds": round(contest.selector_seconds(key["method"]), 2),
            "seconds": None if is_shared else round(time.perf_counter() - start, 2),
        }


PART = Part(
    name="selection", networks=tuple(NETWORKS), threads=1, cells=cells, meter=SelectionMeter, headline=("accuracy",)
)
