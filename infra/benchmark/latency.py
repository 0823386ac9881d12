"""Part `latency`: what a share of the multiply-accumulates buys in milliseconds, at batch 1 and 64.

Widths are those that this project allocates, from few calibration images; the time of a forward pass does not depend
on the values of the weights, so networks are cut without a refit. Each network is timed in both memory formats of
torch, and has the time of the faster one: which that is differs, and a user may choose. Beside the network of any
widths stands one whose widths are multiples of 8, as many channels as processors work on at once. All passes alternate:
a slow spell of the machine meets all.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from entprune.allocation import Objective, allocate
from entprune.assembly import slice_network
from entprune.config import Budget
from entprune.memory_format import lay_out
from entprune.planning import allocation_problem, plan_for_widths
from entprune.runner import torch_threads
from infra.benchmark.contest import budget_label
from infra.benchmark.networks import NETWORKS
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject

BUDGETS = (Budget(parameters_removed=0.8), Budget(macs_removed=0.5))
CALIBRATION_SAMPLES = 512
BATCHES = (1, 64)
PASSES = 15
MULTIPLES = {"pruned": 1, "rounded": 8}  # of which the widths are, by the network's name in the results
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Milliseconds = dict[str, dict[str, dict[str, float]]]  # format, network, batch size

_WARM_UP = 3


class LatencyMeter:
    """Times dense and pruned networks in turns."""

    def __init__(self, request: Request) -> None:
        self._bench = request.bench(CALIBRATION_SAMPLES)
        self._budgets = {budget_label(budget): budget for budget in BUDGETS}

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Hashes of the inputs."""
        return self._bench.facts

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Multiply-accumulates and milliseconds of the dense network and of the pruned ones."""
        budget, bench = self._budgets[key["budget"]], self._bench
        network = bench.network
        widths = {name: self._widths(budget, multiple) for name, multiple in MULTIPLES.items()}
        models = {"dense": network.model} | {
            name: slice_network(network.model, network.groups, plan_for_widths(bench.paths, chosen)).eval()
            for name, chosen in widths.items()
        }
        formats = self._time_in_turns(models)
        kept = {name: network.cost.macs(chosen) for name, chosen in widths.items()}
        return {
            "macs": {"dense": network.dense_macs(), **kept},
            "latency_ms": {name: _fastest(formats, name) for name in models},
            "formats_ms": formats,
            "multiples": dict(MULTIPLES),
            "widths": {name: list(chosen.values()) for name, chosen in widths.items()},
            "passes": PASSES,
            "threads": bench.config.threads,
        }

    def _widths(self, budget: Budget, multiple: int) -> dict[str, int]:
        objective: Objective = "parameters" if budget.kind == "parameters_removed" else "macs"
        bench = self._bench
        config = replace(bench.config, round_to=multiple)
        problem = allocation_problem(bench.paths, bench.network.cost, config, objective)
        return allocate(problem, 1.0 - budget.value)

    def _time_in_turns(self, models: Mapping[str, nn.Module]) -> Milliseconds:
        """Medians by format, network and batch size."""
        found: Milliseconds = {layout: {name: {} for name in models} for layout in FORMATS}
        variants = {
            (layout, name): lay_out(copy.deepcopy(model), memory_format)
            for layout, memory_format in FORMATS.items()
            for name, model in models.items()
        }
        for batch in BATCHES:
            images = torch.randn(batch, *self._bench.data.input_shape, generator=torch.Generator().manual_seed(0))
            with torch_threads(self._bench.config.threads):
                medians = time_in_turns(list(variants.values()), images)
            for (layout, name), milliseconds in zip(variants, medians, strict=True):
                found[layout][name][str(batch)] = milliseconds
        return found


def _fastest(formats: Milliseconds, name: str) -> dict[str, float]:
    return {str(batch): min(times[name][str(batch)] for times in formats.values()) for batch in BATCHES}


def time_in_turns(models: Sequence[nn.Module], images: Tensor) -> list[float]:
    """Median milliseconds of one forward pass of each network, their passes alternating after a warm-up."""
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(_WARM_UP + PASSES):
            for entry, model in zip(seconds, models, strict=True):
                start = time.perf_counter()
                model(images)
                entry.append(time.perf_counter() - start)
    return [1000.0 * statistics.median(entry[_WARM_UP:]) for entry in seconds]


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """One cell for each budget."""
    subject = Subject(part="latency", network=request.network, seed=request.seed)
    labels = (budget_label(budget) for budget in BUDGETS)
    return [(subject, {"budget": label}) for label in labels if request.budget in {"", label}]


PART = Part(
    name="latency", networks=tuple(NETWORKS), threads=2, cells=cells, meter=LatencyMeter, headline=("latency_ms",)
)
