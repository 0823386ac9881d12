"""From widths to a plan: the channels that each group keeps at its width, and the ranks that go with the widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from entprune.allocation import AllocationProblem, CostModel, Limits, Objective, allocate, allocate_within
from entprune.config import PruneConfig
from entprune.path import SparsityPath
from entprune.plan import GroupPlan, PruningPlan
from entprune.rank_choice import RankChoice

_PRICE_STEP = 0.9  # size of the network that the price is taken from, in units of the present one
_SIZE_BISECTIONS = 12
_ROUNDING = 1.0 + 1e-12


def allocation_problem(
    paths: Mapping[str, SparsityPath],
    cost: CostModel,
    config: PruneConfig,
    objective: Objective,
    dense_widths: Mapping[str, int] | None = None,
) -> AllocationProblem:
    """Predicted losses are the paths' refit errors to the power `loss_exponent`."""
    present = {name: path.num_channels for name, path in paths.items()}
    return AllocationProblem(
        losses={name: path.errors**config.loss_exponent for name, path in paths.items()},
        minimum=least_widths(present, config, dense_widths),
        cost=cost,
        objective=objective,
        round_to=config.round_to,
        blocks=cost.blocks(),
    )


def least_widths(
    widths: Mapping[str, int], config: PruneConfig, dense_widths: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Floor of each group's width: the larger of the settings' two, and at most what the group has."""
    dense = {**widths, **(dense_widths or {})}
    floors = {name: math.ceil(config.minimum_fraction * dense[name] - 1e-9) for name in widths}
    return {name: min(max(config.minimum_channels, floors[name]), width) for name, width in widths.items()}


def plan_for_widths(paths: Mapping[str, SparsityPath], widths: Mapping[str, int]) -> PruningPlan:
    """The plan that keeps each group's best set of its width."""
    return PruningPlan(
        groups=tuple(
            GroupPlan(name=name, num_channels=path.num_channels, kept_channels=path.kept(widths[name]))
            for name, path in paths.items()
        )
    )


class Planner:
    """Makes plans of widths, with ranks at the price that these widths were allocated at.

    Args:
        problem: what widths are allocated from.
        paths: sparsity path of each group.
        ranks: chooses the ranks, None for channels alone.
    """

    def __init__(
        self, problem: AllocationProblem, paths: Mapping[str, SparsityPath], ranks: RankChoice | None = None
    ) -> None:
        self._problem, self._paths, self._ranks = problem, paths, ranks

    def plan_within(self, limits: Limits) -> PruningPlan:
        """The plan of the widths of least predicted loss within these limits; its ranks save more."""
        return self._plan(allocate_within(self._problem, limits))

    def _plan(self, widths: Mapping[str, int]) -> PruningPlan:
        plan = plan_for_widths(self._paths, widths)
        if self._ranks is None:
            return plan
        return self._ranks.complete(plan, self._price(widths), self._problem.objective)

    def _price(self, widths: Mapping[str, int]) -> float:
        """Predicted loss per unit of cost of a slightly smaller network."""
        problem, fraction = self._problem, self._problem.fraction(widths)
        least = problem.fraction(problem.smallest())
        near = fraction * _PRICE_STEP if fraction * _PRICE_STEP >= least else min(1.0, fraction / _PRICE_STEP)
        other = allocate(problem, near)
        saved = problem.cost.evaluate(widths, problem.objective) - problem.cost.evaluate(other, problem.objective)
        return max(0.0, (problem.loss(other) - problem.loss(widths)) / saved) if saved else 0.0

    def fitting(self, limits: Limits) -> PruningPlan:
        """The plan within these limits whose layers are as wide as its ranks leave room for."""
        plan = self.plan_within(limits)
        if not plan.ranks:
            return plan
        low, high = 1.0, 1.0 / min(limits.values())  # how many times over the limits its widths alone are
        for _ in range(_SIZE_BISECTIONS):
            middle = (low * high) ** 0.5
            wider = self.plan_within({objective: min(1.0, middle * limit) for objective, limit in limits.items()})
            if self.keeps_to(limits, wider):
                plan, low = wider, middle
            else:
                high = middle
        return plan

    def keeps_to(self, limits: Limits, plan: PruningPlan) -> bool:
        """Whether a plan with its ranks is within limits of size."""
        return all(
            replace(self._problem, objective=objective).fraction(plan.widths(), plan.ranks) <= limit * _ROUNDING
            for objective, limit in limits.items()
        )
