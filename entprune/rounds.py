"""Pruning and tuning in turns: what each round is asked, what came of it, and which round's network is the result.

A size budget is approached in geometric steps of what is kept. Under an accuracy budget the first round looks for what
a single run would find; each further one may lose more before it is tuned, because tuning regains some of it, and
counts only if the tuned network is within the budget. Everything is measured against the original dense network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from entprune.allocation import Objective
from entprune.config import Budget, BudgetKind, PruneConfig
from entprune.errors import ConfigError
from entprune.latency import is_within
from entprune.plan import PruningPlan
from entprune.planning import least_widths
from entprune.selection import NO_CLASS, DenseReference, StopRule
from entprune.stages import Network

_UNTUNED_FACTOR, _UNTUNED_POINTS = 3.0, 1.0  # what may be lost before tuning, from the second round on


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoundRecord:
    """One round after its tuning, measured against the original dense network.

    Attributes:
        number: from 1.
        plan: kept channels of the dense network.
        parameters, macs: of the tuned network.
        accuracy: percent on the validation images; None where the network was tuned on these.
        accuracy_drop: estimated drop on unseen images in points, upper_bound its confidence bound; None there, too.
        latency_kept: fraction of the dense network's latency, None where it was not asked for.
        networks_tried: by the search of this round.
        missed: budgets of the whole run that this network does not meet.
    """

    number: int
    plan: PruningPlan
    parameters: int
    macs: int
    accuracy: float | None
    accuracy_drop: float | None
    upper_bound: float | None
    latency_kept: float | None
    networks_tried: int
    missed: tuple[BudgetKind, ...]

    @property
    def is_accurate(self) -> bool:
        """Whether the accuracy budget, if there is one, is met."""
        return "max_accuracy_drop" not in self.missed

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report."""
        return {
            "round": self.number,
            "parameters": self.parameters,
            "macs": self.macs,
            "validation_accuracy": self.accuracy,
            "validation_drop": self.accuracy_drop,
            "drop_upper_bound": None if self.upper_bound in (None, np.inf) else self.upper_bound,
            "latency_kept": self.latency_kept,
            "networks_tried": self.networks_tried,
            "budgets_missed": list(self.missed),
            "widths": self.plan.widths(),
            **({"ranks": dict(self.plan.ranks)} if self.plan.ranks else {}),
        }


def round_budget(
    budget: Budget, number: int, num_rounds: int, kept: Mapping[Objective, float], latency_kept: float = 1.0
) -> Budget:
    """What a round is asked, in fractions of the network that it starts from.

    Args:
        budget: of the whole run.
        number: of the round, from 1.
        num_rounds: of the run.
        kept: fraction of the dense network's parameters and MACs that the round starts with.
        latency_kept: likewise of its latency.
    """
    share = number / num_rounds
    steps = {f"{name}_removed": _removed(limit, share, kept[name]) for name, limit in budget.size_limits().items()}
    allowed, latency = budget.max_accuracy_drop, budget.latency_removed
    if allowed is not None and number > 1:
        allowed = min(max(_UNTUNED_FACTOR * allowed, allowed + _UNTUNED_POINTS), 99.0)
    return Budget(
        max_accuracy_drop=allowed,
        parameters_removed=steps.get("parameters_removed"),
        macs_removed=steps.get("macs_removed"),
        latency_removed=None if latency is None else _removed(1.0 - latency, share, latency_kept),
        latency_batch=budget.latency_batch,
    )


def _removed(limit: float, share: float, kept: float) -> float:
    """Fraction of what is kept to remove on the way to a limit, of which this share is behind after the round."""
    return 1.0 - min(1.0, float(limit**share) / kept)


def round_start(network: Network, plan: PruningPlan) -> tuple[PruningPlan, dict[Objective, float]]:
    """The plan that the next round starts from, and the fractions of the dense network's size that it has.

    Layers of low rank are one again there (:func:`entprune.low_rank.merge_layers`): the next round prunes their
    channels, and chooses the ranks anew.

    Args:
        network: dense.
        plan: of the round before.
    """
    full, widths = network.full_widths(), plan.widths()
    objectives: tuple[Objective, ...] = ("parameters", "macs")
    kept = {name: network.cost.evaluate(widths, name) / network.cost.evaluate(full, name) for name in objectives}
    return replace(plan, ranks=()), kept


def check_reachable(network: Network, budget: Budget, config: PruneConfig) -> None:
    """Refuse a size that even the least widths do not reach, before any round is spent on it.

    Raises:
        ConfigError: it is out of reach.
    """
    full = network.full_widths()
    least = least_widths(full, config)
    for objective, limit in budget.size_limits().items():
        fraction = network.cost.evaluate(least, objective) / network.cost.evaluate(full, objective)
        if fraction > limit:
            raise ConfigError(
                f"at most {1 - fraction:.3%} of the {objective} can be removed from this network, {1 - limit:.3%} was "
                "asked; lower the budget or the least widths."
            )


def is_exhausted(network: Network, plan: PruningPlan, config: PruneConfig) -> bool:
    """Whether every group of the dense network has its least width under a plan already."""
    full = network.full_widths()
    least = least_widths(full, config)
    return all(width <= least[name] for name, width in plan.widths().items())


def judge_round(
    number: int,
    plan: PruningPlan,
    *,
    compared: tuple[np.ndarray, DenseReference] | None,
    network: Network,
    budget: Budget,
    config: PruneConfig,
    latency_kept: float | None,
    networks_tried: int,
) -> RoundRecord:
    """Measure a tuned network against the dense one.

    Args:
        number: of the round.
        plan: kept channels of the dense network.
        compared: logits (n, k) of the tuned network on the validation images, and the dense network's answers there;
            None if it was tuned on these images, on which nothing depends without an accuracy budget.
        network: dense.
        budget: of the whole run.
        config: its confidence is used, as in the search.
        latency_kept: measured fraction of the dense network's latency, None where it was not asked for.
        networks_tried: by the search of this round.
    """
    accuracy, drop, upper = (None, None, None) if compared is None else _compare(*compared, config)
    widths, ranks = plan.widths(), dict(plan.ranks)
    full = network.full_widths()
    missed: list[BudgetKind] = []
    if budget.max_accuracy_drop is not None and (upper is None or upper > budget.max_accuracy_drop):
        missed.append("max_accuracy_drop")
    for objective, limit in budget.size_limits().items():
        if network.cost.evaluate(widths, objective, ranks) > (limit + 1e-9) * network.cost.evaluate(full, objective):
            missed.append("parameters_removed" if objective == "parameters" else "macs_removed")
    if budget.latency_removed is not None and latency_kept is not None:
        missed += [] if is_within(latency_kept, 1.0 - budget.latency_removed) else ["latency_removed"]
    return RoundRecord(
        number=number,
        plan=plan,
        parameters=network.cost.parameters(widths, ranks),
        macs=network.cost.macs(widths, ranks),
        accuracy=accuracy,
        accuracy_drop=drop,
        upper_bound=upper,
        latency_kept=latency_kept,
        networks_tried=networks_tried,
        missed=tuple(missed),
    )


def _compare(logits: np.ndarray, reference: DenseReference, config: PruneConfig) -> tuple[float, float, float]:
    """Accuracy in percent, estimated drop in points and its upper bound."""
    predicted = np.where(np.isfinite(logits).all(1), logits.argmax(1), NO_CLASS)
    drop, _, upper = StopRule(max_drop=None, quantile=config.quantile).bounds(reference.drops(predicted))
    return 100.0 * float((predicted == reference.labels).mean()), drop, upper


def choose_round(records: Sequence[RoundRecord], objective: Objective) -> int:
    """Position of the smallest network that meets every budget, or else of the last accurate one, or else the last.

    Args:
        records: at least one, in order.
        objective: what counts as small.
    """
    met = [position for position, record in enumerate(records) if not record.missed]
    if met:
        sizes = {position: getattr(records[position], objective) for position in met}
        return min(met, key=lambda position: (sizes[position], -position))
    accurate = [position for position, record in enumerate(records) if record.is_accurate]
    return accurate[-1] if accurate else len(records) - 1
