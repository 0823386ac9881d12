"""How much of the dense network's time smaller ones take, measured on this machine in pairs.

The dense network is timed again beside each smaller one: what else the machine does then slows both. Two such figures
of the same network differ by a few percent on a quiet machine; LATENCY_TOLERANCE is what a verdict allows for that.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from entprune.allocation import AllocationProblem, Limits, allocate_within
from entprune.assembly import slice_network
from entprune.config import Budget, PruneConfig
from entprune.errors import ConfigError
from entprune.evaluation import measure_latency
from entprune.low_rank import new_pair
from entprune.plan import PruningPlan
from entprune.runner import torch_threads
from entprune.stages import Network

LATENCY_TOLERANCE = 0.05  # of the allowed latency
_PAIRS, _REPEATS = 3, 3
_RESOLUTION = 1.05  # factor between the MACs of neighbouring sizes
_MAX_STEPS = 8

KeptLatency = Callable[[PruningPlan], float]  # fraction of the dense network's latency


class LatencyBudget:
    """What of the dense network's latency may be kept; each plan is measured once."""

    def __init__(self, removed: float, measure: KeptLatency) -> None:
        self.limit, self._measure = 1.0 - removed, measure
        self._known: dict[str, float] = {}

    def kept(self, plan: PruningPlan) -> float:
        """Measured fraction of the dense network's latency."""
        if plan.digest() not in self._known:
            self._known[plan.digest()] = self._measure(plan)
        return self._known[plan.digest()]

    def allows(self, kept: float) -> bool:
        """Whether a fraction is within the budget and its tolerance."""
        return is_within(kept, self.limit)


def is_within(kept: float, limit: float) -> bool:
    """Whether a measured fraction of the latency is at most the limit, with the tolerance for noise."""
    return kept <= limit * (1.0 + LATENCY_TOLERANCE)


def latency_budget(
    network: Network, budget: Budget, config: PruneConfig, kept_latency: KeptLatency | None = None
) -> LatencyBudget | None:
    """The latency part of a budget, None without one.

    Args:
        network: dense.
        budget: the user's.
        config: settings; candidates are timed on as many threads as a worker has.
        kept_latency: measures a plan; by default here and now.
    """
    if budget.latency_removed is None:
        return None
    here = partial(measure_kept_latency, network, batch_size=budget.latency_batch, threads=config.threads)
    return LatencyBudget(budget.latency_removed, kept_latency or here)


def measure_kept_latency(network: Network, plan: PruningPlan, batch_size: int, threads: int) -> float:
    """Fraction of the dense network's CPU latency that the network of a plan needs.

    Weights do not matter for the time, so the plan is cut out of the dense network without a refit.

    Args:
        network: dense.
        plan: kept channels and ranks.
        batch_size: images in one forward pass.
        threads: of torch.
    """
    smaller = slice_network(network.model, network.groups, plan)
    for layer, rank in plan.ranks:
        new_pair(smaller, layer, rank)
    smaller.eval()
    return compare_latency(network.model, smaller, network.input_shape, batch_size, threads)


def compare_latency(
    dense: nn.Module, smaller: nn.Module, input_shape: tuple[int, int, int], batch_size: int, threads: int
) -> float:
    """Quotient of the medians of alternating measurements; arguments as for :func:`measure_kept_latency`."""
    milliseconds: dict[str, list[float]] = {"dense": [], "smaller": []}
    with torch_threads(threads):
        for _ in range(_PAIRS):
            for name, model in (("dense", dense), ("smaller", smaller)):
                found = measure_latency(model, input_shape, (batch_size,), repeats=_REPEATS)
                milliseconds[name].append(found[str(batch_size)])
    return statistics.median(milliseconds["smaller"]) / statistics.median(milliseconds["dense"])


def limit_macs(
    problem: AllocationProblem,
    limits: Limits,
    kept_latency: Callable[[Limits], float],
    allowed: float,
) -> Limits:
    """Tighten the limits on the size until the latency is kept: MACs are bisected, for they go with it.

    Args:
        problem: what is allocated.
        limits: on the size, from other budgets.
        kept_latency: measures the network that is made for limits.
        allowed: kept fraction of the dense network's latency.

    Raises:
        ConfigError: even the least widths take longer.
    """
    if kept_latency(limits) <= allowed:
        return limits
    macs = replace(problem, objective="macs")
    low, high = macs.fraction(problem.smallest()) * (1 + 1e-9), macs.fraction(allocate_within(problem, limits))
    least = kept_latency({**limits, "macs": low})
    if least > allowed:
        raise ConfigError(
            f"at most {1 - least:.1%} of the latency can be removed from this network on this machine, "
            f"{1 - allowed:.1%} was asked; lower the budget or the least widths."
        )
    for _ in range(_MAX_STEPS):
        if high / low <= _RESOLUTION:
            break
        middle = (low * high) ** 0.5
        if kept_latency({**limits, "macs": middle}) <= allowed:
            low = middle
        else:
            high = middle
    return {**limits, "macs": low}
