"""Backward elimination: the channels whose loss raises the refit error least leave first.

A second source of candidate sets beside the entropic continuation. With H = (G + ridge I)^-1 and Q the ridge regression
on the features that are left, taking out a block B of features raises the objective by exactly

    tr(Q_B^T H_BB^-1 Q_B),    after which    Q <- Q - H_:B H_BB^-1 Q_B,    H <- H - H_:B H_BB^-1 H_B:

so no regression is solved again. While many channels are left, a small share of them leaves at once.

Source: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993, for blocks.

Axes: d features, m outputs, a alive channels, b features per channel (d = a * b), s snapshots.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from entprune.regression import ConsumerProblem, GroupProblem, RowProblem
from entprune.ridge import cholesky_with_ridge
from entprune.simplex import closed_form_probability

_SHARE = 32  # at most one in so many of the alive channels leaves at once
_RELATIVE_RIDGE = 1e-4
_SNAPSHOT_RATIO = 0.8  # between the numbers of alive channels of neighbouring snapshots


def can_eliminate(problem: GroupProblem) -> bool:
    """Whether every consumer has the Gram matrix that elimination works on."""
    return not any(isinstance(consumer, RowProblem) for consumer in problem.consumers)


def eliminate(problem: GroupProblem, *, device: str = "cpu") -> tuple[list[int], np.ndarray]:
    """Order the channels of a group by backward elimination.

    Args:
        problem: scaled regressions, all with Gram matrices.
        device: torch device of the matrices.

    Returns:
        All c channels, the last to leave first; and (s, c) channel probabilities on the way, w_c proportional to
        s_c^(2/3) with s_c the norm of the channel's weights, zero for those that have left.
    """
    fits = [_Elimination(consumer, device) for consumer in problem.consumers if isinstance(consumer, ConsumerProblem)]
    alive = torch.arange(problem.num_channels)
    left: list[int] = []
    snapshots: list[np.ndarray] = []
    while len(alive) > 1:
        if not snapshots or len(alive) <= _SNAPSHOT_RATIO * (snapshots[-1] > 0).sum():
            snapshots.append(_snapshot(fits, alive, problem.num_channels))
        increase = torch.stack([fit.increase() for fit in fits]).sum(0)
        ranked = increase.argsort(stable=True)
        count = max(1, len(alive) // _SHARE)
        left.extend(alive[ranked[:count]].tolist())
        kept = ranked[count:].sort().values
        for fit in fits:
            fit.keep(kept)
        alive = alive[kept]
    snapshots.append(_snapshot(fits, alive, problem.num_channels))
    return [*alive.tolist(), *left[::-1]], np.stack(snapshots).astype(np.float32)


def _snapshot(fits: list[_Elimination], alive: Tensor, num_channels: int) -> np.ndarray:
    row = np.zeros(num_channels)
    norm_squared = torch.stack([fit.norm_squared() for fit in fits]).sum(0)
    row[alive.numpy()] = np.maximum(closed_form_probability(norm_squared).numpy(), 1e-12)
    return np.asarray(row / row.sum())


class _Elimination:
    """Weights and inverse Gram matrix of one consumer on the alive channels."""

    def __init__(self, consumer: ConsumerProblem, device: str) -> None:
        self._block = consumer.block
        self._gram = torch.from_numpy(consumer.gram).to(device)  # never changed: it belongs to the problem
        self._target = self._gram @ torch.from_numpy(consumer.weight).to(device).T
        self._features = torch.arange(len(self._gram), device=device)
        self._invert()

    def _invert(self) -> None:
        """Inverse and weights from scratch, which also clears the rounding errors of the updates."""
        gram = self._gram[self._features][:, self._features]
        factor = cholesky_with_ridge(gram.double() if len(gram) <= 1024 else gram, relative_ridge=_RELATIVE_RIDGE)
        self._inverse = torch.cholesky_inverse(factor).float()
        self._weight = torch.cholesky_solve(self._target[self._features].to(factor.dtype), factor).float()  # Q: (d, m)
        self._inverted_at = len(self._features)

    def _num_channels(self) -> int:
        return len(self._features) // self._block

    def increase(self) -> Tensor:
        """(a,) float64 rise of the objective if the channel alone left."""
        count, block = self._num_channels(), self._block
        diagonal = self._inverse.reshape(count, block, count, block).diagonal(dim1=0, dim2=2)  # (b, b, a)
        factor = torch.linalg.cholesky_ex(diagonal.permute(2, 0, 1).double()).L
        weight = self._weight.reshape(count, block, -1).double()  # (a, b, m)
        rotated = torch.linalg.solve_triangular(factor, weight, upper=False)
        increase: Tensor = rotated.square().sum((1, 2)).nan_to_num(0.0).cpu()
        return increase

    def norm_squared(self) -> Tensor:
        """(a,) float64 squared norms of the channels' weights."""
        return self._weight.double().square().reshape(self._num_channels(), -1).sum(1).cpu()

    def keep(self, kept: Tensor) -> None:
        """Take out every channel outside `kept` (positions among the alive ones)."""
        is_kept = torch.zeros(self._num_channels(), dtype=torch.bool)
        is_kept[kept] = True
        mask = is_kept.repeat_interleave(self._block).to(self._features.device)
        inside, outside = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        factor, info = torch.linalg.cholesky_ex(self._inverse[outside][:, outside].double())
        self._features = self._features[inside]
        if int(info) != 0 or 2 * len(self._features) <= self._inverted_at:
            self._invert()
            return
        rows = self._inverse.index_select(0, inside)
        across = rows.index_select(1, outside)  # (d', removed)
        solved = torch.cholesky_solve(across.T.double(), factor).float().T  # (d', removed)
        self._weight = self._weight[inside] - solved @ self._weight[outside]
        self._inverse = rows.index_select(1, inside).addmm_(solved, across.T, alpha=-1.0)
