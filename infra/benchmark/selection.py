"""Part `selection`: who chooses better, and how much of the gain is the choice, the widths or the re-estimation.

Every method's kept channels are measured in four cells per budget: weights as they are or refit, and widths in one
ratio for all layers or those that this project allocates. No gradient step anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from entprune.allocation import Objective, allocate
from entprune.assembly import slice_network
from entprune.checkpoints import load_plain_state
from entprune.config import Budget
from entprune.plan import PruningPlan
from entprune.search import allocation_problem
from entprune.stages import score_candidate
from infra.benchmark.networks import Bench
from infra.benchmark.records import Record
from infra.benchmark.selectors import METHODS, Kept, make_selector, select_plan, uniform_widths

VARIANTS = (("plain", "uniform"), ("refit", "uniform"), ("refit", "allocated"), ("plain", "allocated"))
Cell = dict[str, str]


def budget_label(budget: Budget) -> str:
    """Short text for file names."""
    return f"{budget.kind}-{budget.value:g}"


def cells(methods: Sequence[str] = METHODS) -> list[Cell]:
    """Keys of all cells of one budget, in the order in which they are measured."""
    pairs = [(variant, method) for variant in VARIANTS for method in methods]
    return [{"method": method, "weights": weights, "widths": widths} for (weights, widths), method in pairs]


def _describe(key: Cell) -> str:
    return f"{key['weights']}, {key['widths']} widths, {key['method']}"


class SelectionPart:
    """Measures the cells of one network and seed; selectors are made once and serve every budget."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._selectors: dict[str, Kept] = {}
        self._widths: dict[tuple[str, float, str], dict[str, int]] = {}
        self._seconds: dict[str, float] = {}
        self._dense: dict[str, Any] | None = None

    def measure(self, record: Record, budget: Budget, keys: Sequence[Cell], run: dict[str, Any]) -> Iterator[str]:
        """Measure cells one by one; yields a line on each once it is stored."""
        record.require_facts(self._bench.facts | self._settings() | {"dense": self._measure_dense(record)})
        for key in keys:
            start = time.perf_counter()
            values = self._cell(budget, key)
            values["seconds"] = round(time.perf_counter() - start, 2)
            record.put(key, values, run)
            yield f"{budget_label(budget)}, {_describe(key)}: {values['accuracy']:.2f} %"

    def _settings(self) -> dict[str, Any]:
        config = self._bench.config
        return {"calibration_samples": config.calibration_samples, "test_samples": len(self._bench.test)}

    def _measure_dense(self, record: Record) -> dict[str, Any]:
        """Figures of the unpruned network, from an earlier run on the same inputs where there is one."""
        if self._dense is None:
            self._dense = record.content["facts"].get("dense")
        if self._dense is None:
            network = self._bench.network
            full = {group.name: group.num_channels for group in network.groups.groups}
            self._dense = {"accuracy": self._bench.accuracy(network.model), **self._size(full)}
        return self._dense

    def _size(self, widths: dict[str, int]) -> dict[str, int]:
        cost = self._bench.network.cost
        return {"parameters": cost.parameters(widths), "macs": cost.macs(widths)}

    def _cell(self, budget: Budget, key: Cell) -> dict[str, Any]:
        widths = self._find_widths(budget, key["widths"])
        full = {group.name: group.num_channels for group in self._bench.network.groups.groups}
        plan = select_plan(self._selector(key["method"]), full, widths)
        model = self._build(plan, refit=key["weights"] == "refit")
        return {
            "accuracy": self._bench.accuracy(model),
            **self._size(widths),
            "widths": list(widths.values()),
            "plan_sha256": plan.digest(),
            "selector_seconds": round(self._seconds[key["method"]], 2),
        }

    def _selector(self, method: str) -> Kept:
        """Made once; its seconds do not count the moments, which all data-driven methods share."""
        if method not in self._selectors:
            _ = self._bench.statistics
            start = time.perf_counter()
            self._selectors[method] = make_selector(method, self._bench)
            self._seconds[method] = time.perf_counter() - start
        return self._selectors[method]

    def _find_widths(self, budget: Budget, kind: str) -> dict[str, int]:
        """Widths of all groups, from the cost model and (allocated ones) from this project's paths."""
        known = (budget.kind, budget.value, kind)
        if known not in self._widths:
            self._selector("ours")  # so that its seconds are those of the solve
            objective: Objective = "parameters" if budget.kind == "parameters_removed" else "macs"
            bench = self._bench
            problem = allocation_problem(bench.paths, bench.network.cost, bench.config, objective)
            choose = uniform_widths if kind == "uniform" else allocate
            self._widths[known] = choose(problem, 1.0 - budget.value)
        return self._widths[known]

    def _build(self, plan: PruningPlan, *, refit: bool) -> nn.Module:
        """The smaller network: cut out as it is, or assembled as every candidate of this project is."""
        network = self._bench.network
        smaller = slice_network(network.model, network.groups, plan)
        if refit:
            state = score_candidate(self._bench.job, plan).state
            load_plain_state(smaller, {name: torch.from_numpy(np.array(value)) for name, value in state.items()})
        return smaller.eval()
