"""Who chooses the kept channels: this project and six others, under one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from entprune.allocation import AllocationProblem
from entprune.errors import ConfigError
from entprune.plan import GroupPlan, PruningPlan
from entprune.regression import GroupProblem
from entprune.stages import group_problem
from infra.benchmark import importances
from infra.benchmark.block_obs import elimination_order
from infra.benchmark.lasso import LassoPath, contribution_matrix
from infra.benchmark.networks import Bench

Kept = Callable[[str, int], tuple[int, ...]]  # group, width -> sorted channels


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """A selector whose kept sets are nested: (c,) channels of each group, most important first."""

    orders: Mapping[str, np.ndarray]

    def __call__(self, group: str, width: int) -> tuple[int, ...]:
        """Sorted channels of the kept set."""
        return tuple(sorted(int(channel) for channel in self.orders[group][:width]))


def make_selector(method: str, bench: Bench) -> Kept:
    """The selector of that name; what it needs is computed here, once.

    Raises:
        ConfigError: the name is unknown.
    """
    if method not in _MAKERS:
        raise ConfigError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    return _MAKERS[method](bench)


def _ours(bench: Bench) -> Kept:
    paths = bench.paths
    return lambda group, width: paths[group].kept(width)


def _random(bench: Bench) -> Kept:
    generator = np.random.default_rng(bench.config.seed)
    return Ranking({group.name: generator.permutation(group.num_channels) for group in bench.network.groups.groups})


def _l1(bench: Bench) -> Kept:
    return Ranking(importances.l1_order(bench.network.model, bench.network.groups))


def _fpgm(bench: Bench) -> Kept:
    return Ranking(importances.fpgm_order(bench.network.model, bench.network.groups))


def _taylor(bench: Bench) -> Kept:
    return Ranking(importances.taylor_order(bench.network.model, bench.network.groups, bench.calibration))


def _lasso(bench: Bench) -> Kept:
    found = {name: LassoPath(contribution_matrix(problem)) for name, problem in _problems(bench)}
    return lambda group, width: found[group].kept(width)


def _block_obs(bench: Bench) -> Kept:
    return Ranking({name: elimination_order(problem) for name, problem in _problems(bench)})


def _problems(bench: Bench) -> Iterator[tuple[str, GroupProblem]]:
    """The regressions that this project's own paths read, one group at a time: they are large."""
    for group in bench.network.groups.groups:
        yield group.name, group_problem(bench.network, group, bench.statistics)


_MAKERS: dict[str, Callable[[Bench], Kept]] = {
    "ours": _ours,
    "block_obs": _block_obs,
    "l1": _l1,
    "fpgm": _fpgm,
    "lasso": _lasso,
    "taylor": _taylor,
    "random": _random,
}  # in the order in which they are measured
METHODS = tuple(_MAKERS)


def select_plan(kept: Kept, full: Mapping[str, int], widths: Mapping[str, int]) -> PruningPlan:
    """The plan that a selector makes of given widths.

    Args:
        kept: the selector.
        full: dense width of each group, in execution order.
        widths: wanted ones.
    """
    return PruningPlan(
        groups=tuple(
            GroupPlan(name=name, num_channels=count, kept_channels=kept(name, widths[name]))
            for name, count in full.items()
        )
    )


def uniform_widths(problem: AllocationProblem, kept_fraction: float) -> dict[str, int]:
    """One ratio for all groups, rounded down, the largest whose cost is within the budget; then the rest is spent.

    Ratios come in steps, and a step of a network whose groups are alike is large. What it leaves of the budget widens
    groups by one channel at a time: each time the group whose kept ratio is least, ties in the order of the groups,
    passing over those that no longer fit.

    Args:
        problem: least widths, cost and objective; its losses are not looked at.
        kept_fraction: of the dense cost.

    Raises:
        ConfigError: even the least widths cost more.
    """
    target = kept_fraction * problem.cost.evaluate(problem.full(), problem.objective)
    return _spend_evenly(problem, _largest_ratio(problem, target), target)


def _largest_ratio(problem: AllocationProblem, target: float) -> dict[str, int]:
    full = problem.full()

    def widths(ratio: float) -> dict[str, int]:
        return {name: max(problem.minimum[name], int(ratio * count + 1e-9)) for name, count in full.items()}

    ratios = sorted({k / count for count in full.values() for k in range(count + 1)})  # where any width changes
    low, high = 0, len(ratios) - 1
    least = problem.cost.evaluate(widths(ratios[low]), problem.objective)
    if least > target:
        raise ConfigError(
            f"expected a budget of at least the cost of the least widths, {least:,.0f} {problem.objective}, got "
            f"{target:,.0f}; ask for less to be removed."
        )
    while low < high:
        middle = (low + high + 1) // 2
        fits = problem.cost.evaluate(widths(ratios[middle]), problem.objective) <= target
        low, high = (middle, high) if fits else (low, middle - 1)
    return widths(ratios[low])


def _spend_evenly(problem: AllocationProblem, widths: dict[str, int], target: float) -> dict[str, int]:
    full = problem.full()
    growing = [name for name in full if widths[name] < full[name]]
    while growing:
        name = min(growing, key=lambda group: widths[group] / full[group])  # the first of several
        wider = {**widths, name: widths[name] + 1}
        if problem.cost.evaluate(wider, problem.objective) <= target:
            widths = wider
        else:
            growing.remove(name)  # costs only rise: it will not fit later either
        if widths[name] == full[name] and name in growing:
            growing.remove(name)
    return widths
