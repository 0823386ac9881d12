"""Part `latency`: what a share of the multiply-accumulates buys in milliseconds, at batch 1 and 64.

Widths are those that this project allocates; the time of a forward pass does not depend on the values of the weights,
so networks are cut without a refit. Dense and pruned passes alternate: a slow spell of the machine meets both.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from torch import nn

from entprune.allocation import Objective, allocate
from entprune.assembly import slice_network
from entprune.evaluation import measure_latency
from entprune.runner import torch_threads
from entprune.search import allocation_problem, plan_for_widths
from infra.benchmark.networks import NETWORKS
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject
from infra.benchmark.selection import budget_label, wanted_budgets

BATCHES = (1, 64)
_ROUNDS = 5


class LatencyMeter:
    """Times dense and pruned networks in turns."""

    def __init__(self, request: Request) -> None:
        self._bench = request.bench()
        self._budgets = {budget_label(budget): budget for budget in self._bench.entry.budgets()}

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Hashes of the inputs."""
        return self._bench.facts

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Multiply-accumulates and milliseconds of both."""
        budget, bench = self._budgets[key["budget"]], self._bench
        objective: Objective = "parameters" if budget.kind == "parameters_removed" else "macs"
        network = bench.network
        problem = allocation_problem(bench.paths, network.cost, bench.config, objective)
        widths = allocate(problem, 1.0 - budget.value)
        smaller = slice_network(network.model, network.groups, plan_for_widths(bench.paths, widths)).eval()
        dense_ms, small_ms = self._time_in_turns(network.model, smaller)
        return {
            "macs": {"dense": network.cost.macs(problem.full()), "pruned": network.cost.macs(widths)},
            "latency_ms": {"dense": dense_ms, "pruned": small_ms},
            "widths": list(widths.values()),
            "threads": bench.config.threads,
        }

    def _time_in_turns(self, *models: nn.Module) -> list[dict[str, float]]:
        """Median over rounds of each network's milliseconds, by batch size."""
        shape = self._bench.data.input_shape
        with torch_threads(self._bench.config.threads):
            rounds = [[measure_latency(model, shape, BATCHES) for model in models] for _ in range(_ROUNDS)]
        return [
            {str(batch): statistics.median(entry[number][str(batch)] for entry in rounds) for batch in BATCHES}
            for number in range(len(models))
        ]


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """One cell for each budget of the comparison."""
    subject = Subject(part="latency", network=request.network, seed=request.seed)
    return [(subject, {"budget": budget_label(budget)}) for budget in wanted_budgets(request)]


PART = Part(name="latency", networks=tuple(NETWORKS), threads=2, cells=cells, meter=LatencyMeter)
