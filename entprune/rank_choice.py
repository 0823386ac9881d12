"""Which layers are given low rank, and how low: where that costs least for what it saves.

What a layer of rank r misses of its outputs' variance, as a fraction, is a loss of the same kind as the refit error of
a layer whose inputs were cut, but counts a tenth of it: of factors from 1 to 1/100 that one gave the least estimated
drops on validation images, of LeNet and of VGG-16. At the price per parameter (or multiply-accumulate) that the widths
were allocated at, each layer takes the rank of least loss + price * size, or stays as it is.

Axes: t rows, m outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from entprune.allocation import Objective
from entprune.calibration import Statistics
from entprune.candidates import CandidateJob
from entprune.config import PruneConfig
from entprune.layers import LayerSelection
from entprune.plan import PruningPlan, select_layers
from entprune.stages import Network

_LOSS_SHARE = 0.1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RankChoice:
    """Chooses ranks for the plans of one network.

    Attributes:
        network: dense.
        covariances: (m, m) float64 of each layer's dense outputs, as they go on behind its BatchNorm.
        round_to: ranks are multiples of this.
    """

    network: Network
    covariances: Mapping[str, np.ndarray]
    round_to: int = 1

    def complete(self, plan: PruningPlan, price: float, objective: Objective) -> PruningPlan:
        """The plan with the ranks that this price per parameter or multiply-accumulate asks for."""
        selection = select_layers(self.network.model, self.network.groups, plan)
        widths, costs = plan.widths(), {layer.name: layer for layer in self.network.cost.layers}
        ranks: list[tuple[str, int]] = []
        for name, covariance in self.covariances.items():
            kept = selection.get(name, LayerSelection()).outputs
            present = covariance if kept is None else covariance[np.ix_(kept, kept)]
            layer = costs[name]
            unit = price * (layer.positions if objective == "macs" else 1)
            rank = self._rank(present, layer.taps * int(layer.inputs(widths)), unit)
            if rank is not None:
                ranks.append((name, rank))
        return replace(plan, ranks=tuple(ranks))

    def _rank(self, covariance: np.ndarray, num_features: int, price: float) -> int | None:
        """Rank of least loss and cost at a price per weight, None where no rank is better than the layer as it is."""
        num_outputs = len(covariance)
        rank = np.arange(self.round_to, num_outputs + 1, self.round_to)
        if not len(rank):
            return None
        total = _LOSS_SHARE * missed_variance(covariance)[rank] + price * rank * (num_features + num_outputs)
        best = int(total.argmin())
        return int(rank[best]) if total[best] < price * num_features * num_outputs else None


def missed_variance(covariance: np.ndarray) -> np.ndarray:
    """(m + 1,) fraction of the variance that the leading r directions leave out, for r from 0."""
    values = np.linalg.eigvalsh(covariance)[::-1].clip(min=0.0)
    total = float(values.sum())
    if total <= 0.0:
        return np.zeros(len(values) + 1)
    return np.concatenate([[1.0], 1.0 - np.cumsum(values) / total]).clip(min=0.0)


def rank_choice(job: CandidateJob, config: PruneConfig) -> RankChoice | None:
    """What chooses the ranks of a search's candidates, None where they were not asked for."""
    if not config.low_rank:
        return None
    network, counted = job.network, {layer.name for layer in job.network.cost.layers if layer.is_counted}
    layers = [layer for layer in network.refit_layers if layer in counted and layer in job.data.statistics]
    return RankChoice(
        network=network,
        covariances={layer: _covariance(network, layer, job.data.statistics) for layer in layers},
        round_to=config.round_to,
    )


def _covariance(network: Network, layer: str, statistics: Statistics) -> np.ndarray:
    outputs = statistics[layer].outputs.astype(np.float64)  # the choice must not depend on the number of threads
    centred = outputs - outputs.mean(0)
    gain = network.output_gain(layer).astype(np.float64)
    return np.asarray(centred.T @ centred / len(outputs) * np.outer(gain, gain))
