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
import torch
from torch import nn

from entprune.allocation import Objective, allocate
from entprune.assembly import slice_network
from entprune.candidates import score_candidate
from entprune.checkpoints import load_plain_state
from entprune.config import Budget
from entprune.errors import ConfigError
from entprune.plan import PruningPlan
from entprune.search import allocation_problem
from infra.benchmark.networks import NETWORKS, find_network
from infra.benchmark.outcomes import pack_outcomes
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject
from infra.benchmark.selectors import METHODS, Kept, make_selector, select_plan, uniform_widths

VARIANTS = (("refit", "allocated"), ("plain", "uniform"), ("refit", "uniform"), ("plain", "allocated"))  # as measured


def budget_label(budget: Budget) -> str:
    """Short text for file names."""
    return f"{budget.kind}-{budget.value:g}"


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
    if unknown := sorted(set(request.methods) - set(METHODS)):
        raise ConfigError(f"methods: expected some of {', '.join(METHODS)}, got {', '.join(unknown)}.")
    methods = [method for method in METHODS if method in (request.methods or METHODS)]
    found: list[tuple[Subject, Key]] = []
    for budget in wanted_budgets(request):
        subject = Subject(part="selection", network=request.network, seed=request.seed, budget=budget_label(budget))
        for weights, widths in VARIANTS:
            found.extend((subject, {"method": method, "weights": weights, "widths": widths}) for method in methods)
    return found


class SelectionMeter:
    """Measures the cells of one network and seed; selectors are made once and serve every budget."""

    def __init__(self, request: Request) -> None:
        self._bench = request.bench()
        self._budgets = {budget_label(budget): budget for budget in self._bench.entry.budgets()}
        self._selectors: dict[str, Kept] = {}
        self._widths: dict[tuple[str, str], dict[str, int]] = {}
        self._seconds: dict[str, float] = {}
        self._outcomes: dict[tuple[str, str], np.ndarray] = {}
        self._dense: dict[str, Any] | None = None

    def facts(self, record: Record) -> Mapping[str, Any]:
        """Hashes of the inputs, settings, and figures of the unpruned network."""
        return self._bench.facts | self._settings() | {"dense": self._measure_dense(record)}

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:
        """Choose channels, cut them out, refit if asked, and measure on the test images."""
        start = time.perf_counter()
        widths = self._find_widths(subject.budget, key["widths"])
        full = {group.name: group.num_channels for group in self._bench.network.groups.groups}
        plan = select_plan(self._selector(key["method"]), full, widths)
        place = plan.digest(), key["weights"]
        is_shared = place in self._outcomes
        if not is_shared:
            model = self._build(plan, refit=key["weights"] == "refit")
            self._outcomes[place] = self._bench.outcomes(model)
        return {
            "accuracy": 100.0 * float(self._outcomes[place].mean()),
            "wrong": pack_outcomes(~self._outcomes[place]),
            **self._size(widths),
            "widths": list(widths.values()),
            "plan_sha256": plan.digest(),
            "selector_seconds": round(self._seconds[key["method"]], 2),
            "seconds": None if is_shared else round(time.perf_counter() - start, 2),
        }

    def _settings(self) -> dict[str, Any]:
        config = self._bench.config
        return {"calibration_samples": config.calibration_samples, "test_samples": len(self._bench.test)}

    def _measure_dense(self, record: Record) -> dict[str, Any]:
        """Figures of the unpruned network, from an earlier run on the same inputs where there is one."""
        known: dict[str, Any] | None = record.content["facts"].get("dense", self._dense)
        if known is None:
            network = self._bench.network
            full = {group.name: group.num_channels for group in network.groups.groups}
            known = {"accuracy": self._bench.accuracy(network.model), **self._size(full)}
        self._dense = known
        return known

    def _size(self, widths: dict[str, int]) -> dict[str, int]:
        cost = self._bench.network.cost
        return {"parameters": cost.parameters(widths), "macs": cost.macs(widths)}

    def _selector(self, method: str) -> Kept:
        """Made once; its seconds do not count the moments, which all data-driven methods share."""
        if method not in self._selectors:
            _ = self._bench.statistics
            start = time.perf_counter()
            self._selectors[method] = make_selector(method, self._bench)
            self._seconds[method] = time.perf_counter() - start
        return self._selectors[method]

    def _find_widths(self, label: str, kind: str) -> dict[str, int]:
        """Widths of all groups, from the cost model and (allocated ones) from this project's paths."""
        if (label, kind) not in self._widths:
            self._selector("ours")  # so that its seconds are those of the solve
            budget, bench = self._budgets[label], self._bench
            objective: Objective = "parameters" if budget.kind == "parameters_removed" else "macs"
            problem = allocation_problem(bench.paths, bench.network.cost, bench.config, objective)
            choose = uniform_widths if kind == "uniform" else allocate
            self._widths[label, kind] = choose(problem, 1.0 - budget.value)
        return self._widths[label, kind]

    def _build(self, plan: PruningPlan, *, refit: bool) -> nn.Module:
        """The smaller network: cut out as it is, or assembled as every candidate of this project is."""
        network = self._bench.network
        smaller = slice_network(network.model, network.groups, plan)
        if refit:
            state = score_candidate(self._bench.job, plan).state
            load_plain_state(smaller, {name: torch.from_numpy(np.array(value)) for name, value in state.items()})
        return smaller.eval()


PART = Part(
    name="selection", networks=tuple(NETWORKS), threads=1, cells=cells, meter=SelectionMeter, headline=("accuracy",)
)
