"""Swap refinement of a kept set: channels are exchanged one for one while that lowers the refit error.

The channels outside the set that would explain most of what the set leaves unexplained are tried in turn: one comes in,
then the one of the larger set that is missed least goes; the best of these exchanges is made. With K the kept features,
C those of a channel outside and R = T_C - G_CK Q_K what the fit leaves of its cross moments, the channel would explain
tr[R^T S^-1 R], S = G_CC - G_CK G_KK^-1 G_KC.

Axes: d features, m outputs, c channels, b features per channel, k kept channels, o others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from entprune.regression import GroupProblem
from entprune.ridge import cholesky_with_ridge
from infra.benchmark.block_obs import gram_matrix

_NEWCOMERS = 8  # tried for each exchange
_LEAST_GAIN = 1e-6  # of the error: less is rounding


def swap(problem: GroupProblem, kept: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Exchange channels until nothing is gained.

    Args:
        problem: scaled regressions of the group.
        kept: k channels to start from.

    Returns:
        The sorted set of the same size, and how many exchanges it took; the refit error is never higher.
    """
    fits = [_Fit(gram_matrix(consumer), torch.from_numpy(consumer.weight).double()) for consumer in problem.consumers]
    present, count = sorted(kept), 0
    error = _error(fits, present, problem)
    while len(present) < problem.num_channels and count <= problem.num_channels:
        others = sorted(set(range(problem.num_channels)) - set(present))
        gains = torch.stack([fit.gains(*_features(problem, index, present, others)) for index, fit in enumerate(fits)])
        best = gains.sum(0).argsort(descending=True)[:_NEWCOMERS].tolist()
        tried = [_exchange(fits, present, others[newcomer], problem) for newcomer in best]
        lower, following = min((_error(fits, channels, problem), channels) for channels in tried)
        if not lower < error * (1.0 - _LEAST_GAIN):
            break
        present, error, count = following, lower, count + 1
    return tuple(present), count


def _exchange(fits: Sequence[_Fit], present: Sequence[int], newcomer: int, problem: GroupProblem) -> list[int]:
    """The set with the newcomer and without the channel that is then missed least, itself perhaps."""
    larger = sorted([*present, newcomer])
    gone = int(_losses(fits, larger, problem).argmin())
    return [channel for number, channel in enumerate(larger) if number != gone]


def _features(problem: GroupProblem, index: int, *sets: Sequence[int]) -> list[Tensor]:
    """(k, b) features of the channels of each set, in one consumer."""
    block = problem.consumers[index].block
    return [torch.tensor(channels)[:, None] * block + torch.arange(block) for channels in sets]


def _error(fits: Sequence[_Fit], kept: Sequence[int], problem: GroupProblem) -> float:
    return sum(fit.error(*_features(problem, index, kept)) for index, fit in enumerate(fits))


def _losses(fits: Sequence[_Fit], kept: Sequence[int], problem: GroupProblem) -> Tensor:
    """(k,) rise of the error if one channel of the set left."""
    return torch.stack([fit.losses(*_features(problem, index, kept)) for index, fit in enumerate(fits)]).sum(0)


class _Fit:
    """Least squares of one consumer on any of its channels."""

    def __init__(self, gram: Tensor, weight: Tensor) -> None:
        self._gram, self._target = gram, gram @ weight.T
        self._total = float((self._target * weight.T).sum())

    def _factor(self, features: Tensor) -> Tensor:
        rows = features.flatten()
        return cholesky_with_ridge(self._gram[rows][:, rows])

    def error(self, features: Tensor) -> float:
        """Unexplained variance of the fit on (k, b) features."""
        rotated = torch.linalg.solve_triangular(self._factor(features), self._target[features.flatten()], upper=False)
        return self._total - float(rotated.square().sum())

    def losses(self, features: Tensor) -> Tensor:
        """(k,) of each channel in the fit: tr[Q_C^T H_CC^-1 Q_C], H the inverse Gram matrix."""
        count, block = features.shape
        inverse = torch.cholesky_inverse(self._factor(features))
        solution = (inverse @ self._target[features.flatten()]).reshape(count, block, -1)
        blocks = inverse.reshape(count, block, count, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return (solution * torch.linalg.solve(blocks, solution)).sum((1, 2))

    def gains(self, features: Tensor, others: Tensor) -> Tensor:
        """(o,) of each channel outside the fit on (k, b) features, by its (o, b) features."""
        rows, columns = features.flatten(), others.flatten()
        count, block = others.shape
        factor = self._factor(features)
        across = torch.linalg.solve_triangular(factor, self._gram[rows][:, columns], upper=False)  # (k b, o b)
        explained = torch.linalg.solve_triangular(factor, self._target[rows], upper=False)  # (k b, m)
        left = (self._target[columns] - across.T @ explained).reshape(count, block, -1)
        parts = across.reshape(-1, count, block).permute(1, 2, 0)  # (o, b, k b)
        own = self._gram[others[:, :, None], others[:, None, :]]  # (o, b, b)
        schur = own - parts @ parts.transpose(1, 2)
        ridge = 1e-9 * own.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        schur.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        return (left * torch.linalg.solve(schur, left)).sum((1, 2))
