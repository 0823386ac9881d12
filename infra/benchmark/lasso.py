"""Channel selection by LASSO (He, Zhang and Sun, ICCV 2017), on the moments of the consumers' regressions.

    min_beta  sum_j || Y_j - sum_c beta_c X_jc W_jc^T ||^2 + lambda ||beta||_1

with the dense weights W fixed; lambda grows until no more than the wanted channels have beta != 0. Since Y is linear in
X, the first term is the quadratic (1 - beta)^T A (1 - beta) with A the block sums of (W^T W) o G: no rows are needed.
Of a group with several consumers the quadratics are added. Their own re-estimation is least squares on the kept
channels, which is what the refit columns apply to every method.

Axes: d features, m outputs, c channels, b features per channel.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso

from entprune.regression import GroupProblem
from infra.benchmark.block_obs import gram_matrix

_SMALLEST_PENALTY = 1e-7  # of the one at which nothing is selected
_BISECTIONS = 30


def contribution_matrix(problem: GroupProblem) -> np.ndarray:
    """(c, c) A: inner products of what each channel contributes to the outputs, summed over consumers."""
    count = problem.num_channels
    total = torch.zeros(count, count, dtype=torch.float64)
    for consumer in problem.consumers:
        weight = torch.from_numpy(consumer.weight).double()
        product = (weight.T @ weight).mul_(gram_matrix(consumer))  # (d, d)
        total += product.reshape(count, consumer.block, count, consumer.block).sum((1, 3))
    return total.numpy()


class LassoPath:
    """Kept sets of one group for any width."""

    def __init__(self, contributions: np.ndarray) -> None:
        values, vectors = np.linalg.eigh(contributions)
        self._design = (vectors * np.sqrt(np.maximum(values, 0.0))).T  # (c, c) X with X^T X = A
        self._answer = self._design.sum(1)
        self._largest = float(np.abs(self._design.T @ self._answer).max()) / len(contributions)

    def kept(self, width: int) -> tuple[int, ...]:
        """Sorted channels at the least penalty that leaves no more than `width`.

        Channels that enter together can make it jump over the width: what is missing is filled with the largest
        coefficients just before the jump.
        """
        if width >= len(self._design):
            return tuple(range(len(self._design)))
        solver = Lasso(alpha=1.0, fit_intercept=False, warm_start=True, max_iter=3000, tol=1e-5)
        low, high = np.log(self._largest * _SMALLEST_PENALTY), np.log(max(self._largest, 1e-300))
        inside, outside = np.zeros(len(self._design)), np.ones(len(self._design))
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            coefficients = self._solve(solver, float(np.exp(middle)))
            if np.count_nonzero(coefficients) > width:
                low, outside = middle, coefficients
            else:
                high, inside = middle, coefficients
                if np.count_nonzero(coefficients) == width:
                    break
        rank = np.lexsort((-np.abs(outside), -np.abs(inside)))  # by the first that fits, ties by the last that did not
        return tuple(sorted(int(channel) for channel in rank[:width]))

    def _solve(self, solver: Lasso, penalty: float) -> np.ndarray:
        solver.set_params(alpha=penalty)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a duality gap of some millionths selects as well
            solver.fit(self._design, self._answer)
        return np.array(solver.coef_)
