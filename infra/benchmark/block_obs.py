"""Block-wise optimal brain surgeon: greedy exact elimination of channels, the strongest simple peer of a selection.

Removing the features of one channel from a least-squares fit raises its error by  tr[Q_c P_cc^-1 Q_c^T], where P is the
inverse Gram matrix of the channels still alive and Q the weights refit on them; P and Q are then updated by a rank-b
correction. At each step the channel with the least increase, summed over the group's consumers, goes.

Axes: d features, m outputs, c channels, a alive channels, b features per channel.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from entprune.regression import ConsumerProblem, GroupProblem, RowProblem
from entprune.ridge import cholesky_with_ridge

_COMPACT_BELOW = 0.8  # of the stored channels


def elimination_order(problem: GroupProblem) -> np.ndarray:
    """(c,) channels of a group, most important first: the reverse of the order in which they are removed.

    Args:
        problem: scaled regressions of the group, as this project's own paths read them.
    """
    fits = [_Elimination(consumer, problem.num_channels) for consumer in problem.consumers]
    removed: list[int] = []
    alive = np.arange(problem.num_channels)
    while len(alive) > 1:
        increases = torch.stack([fit.increases() for fit in fits]).sum(0)  # (a,)
        worst = int(increases.argmin())
        removed.append(int(alive[worst]))
        alive = np.delete(alive, worst)
        for fit in fits:
            fit.remove(worst)
    return np.array([*alive, *removed[::-1]], dtype=np.int64)


def gram_matrix(consumer: ConsumerProblem | RowProblem) -> Tensor:
    """(d, d) float64 scaled covariance of what a consumer reads."""
    if isinstance(consumer, RowProblem):
        rows = torch.from_numpy(consumer.factor).double()
        return rows.T @ rows
    return torch.from_numpy(consumer.gram).double()


class _Elimination:
    """One consumer: inverse Gram matrix and refit weights; the alive channels lie at `slots` of the storage."""

    def __init__(self, consumer: ConsumerProblem | RowProblem, num_channels: int) -> None:
        gram, weight = gram_matrix(consumer), torch.from_numpy(consumer.weight).double()
        target = gram @ weight.T  # (d, m)
        self._inverse = torch.cholesky_inverse(cholesky_with_ridge(gram))
        self._solution = self._inverse @ target
        self._block, self._slots = consumer.block, np.arange(num_channels)

    def increases(self) -> Tensor:
        """(a,) error that the removal of each alive channel would add."""
        count = len(self._inverse) // self._block
        slots = torch.from_numpy(self._slots)
        # (d, d) -> (a, b, b), the diagonal blocks
        blocks = self._inverse.reshape(count, self._block, count, self._block)[slots, :, slots, :]
        rows = self._solution.reshape(count, self._block, -1)[slots]  # (a, b, m)
        # tr[Q P^-1 Q^T] = sum of P^-1 o (Q^T Q): solving for the m outputs themselves takes a hundred times as long
        return (torch.linalg.inv(blocks) * torch.bmm(rows, rows.mT)).sum((1, 2))

    def remove(self, position: int) -> None:
        """Take the channel at a position among the alive ones out of the fit."""
        start = int(self._slots[position]) * self._block
        gone = slice(start, start + self._block)
        columns = self._inverse[:, gone].clone()  # (d, b)
        scaled = torch.linalg.solve(columns[gone], columns.T).T  # K P_cc^-1
        self._solution.addmm_(scaled, self._solution[gone].clone(), alpha=-1.0)
        self._inverse.addmm_(scaled, columns.T, alpha=-1.0)
        self._slots = np.delete(self._slots, position)
        self._compact()

    def _compact(self) -> None:
        """Free the rows and columns of removed channels once they are many."""
        if len(self._slots) * self._block > _COMPACT_BELOW * len(self._inverse):
            return
        features = torch.from_numpy((self._slots[:, None] * self._block + np.arange(self._block)).ravel())
        self._inverse = self._inverse[features][:, features]
        self._solution = self._solution[features]
        self._slots = np.arange(len(self._slots))
