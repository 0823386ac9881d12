"""From widths to a plan: the channels that each group keeps at its width, and the ranks that go with the widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from entprune.allocation import AllocationProblem, CostModel, Limits, Objective, allocate_at, allocate_within
from entprune.config import PruneConfig
from entprune.path import SparsityPath
from entprune.plan import GroupPlan, PruningPlan
from entprune.rank_choice import RankChoice

_PRICES = (1e-9, 1e9)  # of the dense network's whole cost
_PRICE_RESOLUTION = 1.001
_TURNS = 4  # of ranks at these widths, and widths at those ranks


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
    """Makes plans within limits of size: widths alone, or widths and ranks together.

    Channels are cheaper to keep where ranks are low, and ranks need not be low where few channels are kept. Both are
    chosen at one price per parameter or multiply-accumulate, in turns until neither changes, and the price is the least
    that keeps to the limit.

    Args:
        problem: what widths are allocated from.
        paths: sparsity path of each group.
        ranks: chooses the ranks, None for channels alone.
    """

    def __init__(
        self, problem: AllocationProblem, paths: Mapping[str, SparsityPath], ranks: RankChoice | None = None
    ) -> None:
        self._problem, self._paths, self._ranks = problem, paths, ranks

    def kept_fraction(self, plan: PruningPlan) -> float:
        """Fraction of the dense network's cost that a plan keeps."""
        problem = self._problem
        kept = problem.cost.with_ranks(plan.ranks).evaluate(plan.widths(), problem.objective)
        return kept / problem.cost.evaluate(problem.full(), problem.objective)

    def plan_within(self, limits: Limits) -> PruningPlan:
        """The plan of least predicted loss within these limits; with ranks there is one, of the objective.

        Raises:
            ConfigError: even the least widths exceed a limit.
        """
        widths = allocate_within(self._problem, limits)
        if self._ranks is None:
            return plan_for_widths(self._paths, widths)
        (limit,) = limits.values()
        dense = self._problem.cost.evaluate(self._problem.full(), self._problem.objective)
        found, (low, high) = plan_for_widths(self._paths, widths), _PRICES
        while high / low > _PRICE_RESOLUTION:
            price = (low * high) ** 0.5
            plan = self._plan_at(self._ranks, price / dense)
            if self.kept_fraction(plan) <= limit:
                found, high = plan, price
            else:
                low = price
        return found

    def _plan_at(self, ranks: RankChoice, price: float) -> PruningPlan:
        """Widths and ranks at a price per unit of cost."""
        plan = self._at_widths(ranks, (), price)
        for _ in range(_TURNS):
            following = self._at_widths(ranks, plan.ranks, price)
            if following.ranks == plan.ranks:
                break
            plan = following
        return plan

    def _at_widths(self, ranks: RankChoice, known: tuple[tuple[str, int], ...], price: float) -> PruningPlan:
        """Widths at a price and what the known ranks save, and the ranks at these widths."""
        problem = replace(self._problem, cost=self._problem.cost.with_ranks(known))
        return ranks.complete(plan_for_widths(self._paths, allocate_at(problem, price)), price, problem.objective)
