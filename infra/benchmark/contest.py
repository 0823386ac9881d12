"""Networks of the compared methods at the same size: kept channels, widths, cut out as they are or refit.

Selectors, widths and this project's paths are made once and serve every budget.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
from entprune.planning import allocation_problem
from infra.benchmark.networks import Bench
from infra.benchmark.parts import Request
from infra.benchmark.records import Record
from infra.benchmark.selectors import METHODS, Kept, make_selector, select_plan, uniform_widths


def budget_label(budget: Budget) -> str:
    """Short text for file names."""
    return f"{budget.kind}-{budget.value:g}"


def wanted_methods(request: Request) -> list[str]:
    """Methods that are asked for, all of them by default.

    Raises:
        ConfigError: there is no such method.
    """
    if unknown := sorted(set(request.methods) - set(METHODS)):
        raise ConfigError(f"methods: expected some of {', '.join(METHODS)}, got {', '.join(unknown)}.")
    return [method for method in METHODS if method in (request.methods or METHODS)]


class Contest:
    """One network with all methods' ways to make it smaller.

    Args:
        bench: the network with its images.
        budgets: the sizes to compare at; those of the benchmark's entry by default.
    """

    def __init__(self, bench: Bench, budgets: Sequence[Budget] | None = None) -> None:
        self.bench = bench
        self._budgets = {budget_label(budget): budget for budget in budgets or bench.entry.budgets()}
        self._selectors: dict[str, Kept] = {}
        self._widths: dict[tuple[str, str], dict[str, int]] = {}
        self._seconds: dict[str, float] = {}
        self._dense: dict[str, Any] | None = None

    def facts(self, record: Record) -> dict[str, Any]:
        """Hashes of the inputs, numbers of images, and figures of the unpruned network."""
        config = self.bench.config
        images = {"calibration_samples": config.calibration_samples, "test_samples": len(self.bench.test)}
        return self.bench.facts | images | {"dense": self._measure_dense(record)}

    def plan(self, method: str, label: str, kind: str) -> PruningPlan:
        """Channels that a method keeps.

        Args:
            method: one of METHODS.
            label: of the budget.
            kind: of the widths, "uniform" or "allocated".
        """
        full = {group.name: group.num_channels for group in self.bench.network.groups.groups}
        return select_plan(self._selector(method), full, self.widths(label, kind))

    def selector_seconds(self, method: str) -> float:
        """How long its choice took, without the moments, which all data-driven methods share."""
        return self._seconds[method]

    def widths(self, label: str, kind: str) -> dict[str, int]:
        """Widths of all groups, from the cost model and (allocated ones) from this project's paths."""
        if (label, kind) not in self._widths:
            self._selector("ours")  # so that its seconds are those of the solve
            budget, bench = self._budgets[label], self.bench
            objective: Objective = "parameters" if budget.kind == "parameters_removed" else "macs"
            problem = allocation_problem(bench.paths, bench.network.cost, bench.config, objective)
            choose = uniform_widths if kind == "uniform" else allocate
            self._widths[label, kind] = choose(problem, 1.0 - budget.value)
        return self._widths[label, kind]

    def size(self, widths: dict[str, int]) -> dict[str, int]:
        """Parameters and multiply-accumulates at those widths."""
        cost = self.bench.network.cost
        return {"parameters": cost.parameters(widths), "macs": cost.macs(widths)}

    def build(self, plan: PruningPlan, *, refit: bool) -> nn.Module:
        """The smaller network: cut out as it is, or assembled as every candidate of this project is."""
        network = self.bench.network
        smaller = slice_network(network.model, network.groups, plan)
        if refit:
            state = score_candidate(self.bench.job, plan).state
            load_plain_state(smaller, {name: torch.from_numpy(np.array(value)) for name, value in state.items()})
        return smaller.eval()

    def _measure_dense(self, record: Record) -> dict[str, Any]:
        """Figures of the unpruned network, from an earlier run on the same inputs where there is one."""
        known: dict[str, Any] | None = record.content["facts"].get("dense", self._dense)
        if known is None:
            network = self.bench.network
            full = {group.name: group.num_channels for group in network.groups.groups}
            known = {"accuracy": self.bench.accuracy(network.model), **self.size(full)}
        self._dense = known
        return known

    def _selector(self, method: str) -> Kept:
        if method not in self._selectors:
            _ = self.bench.statistics
            start = time.perf_counter()
            self._selectors[method] = make_selector(method, self.bench)
            self._seconds[method] = time.perf_counter() - start
        return self._selectors[method]
