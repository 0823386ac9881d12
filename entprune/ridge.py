"""Ridge regression of one consumer at fixed channel probabilities, in two forms that give the same solution.

Primal, where there are at least as many rows as features: the Gram matrix G = F^T F (d, d) is factorised. Dual, where
there are fewer: the factor F (t, d) stays as it is and the kernel of its rows (t, t) is factorised, so that memory is
O(t d + t^2) and no (d, d) matrix exists.

Axes: t rows, d features, m outputs, a alive channels, b features per channel (d = a * b), q = min(m, t).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from entprune.errors import ConfigError

_RELATIVE_RIDGE = 1e-6
_MAX_RIDGE_ATTEMPTS = 12
_KERNEL_COLUMNS = 4096


def cholesky_with_ridge(matrix: Tensor, *, relative_ridge: float = _RELATIVE_RIDGE) -> Tensor:
    """Lower Cholesky factor of a symmetric positive semi-definite matrix plus a ridge relative to its mean diagonal.

    The ridge grows as in :func:`factorise`: rank-deficient Gram matrices are the rule in late layers.

    Raises:
        ConfigError: the matrix holds NaN or infinity, so that no ridge helps.
    """
    return factorise(matrix.clone(), relative_ridge * float(matrix.diagonal().mean().clamp_min(1e-30)))


def factorise(matrix: Tensor, ridge: float) -> Tensor:
    """Lower Cholesky factor of a symmetric positive semi-definite matrix plus a ridge, which is added in place.

    Float32 products leave a rank-deficient Gram matrix with eigenvalues below zero, by how much depends on the
    processor: the ridge grows tenfold until the factorisation succeeds.

    Raises:
        ConfigError: the matrix holds NaN or infinity, so that no ridge helps.
    """
    diagonal = matrix.diagonal().clone()
    for _ in range(_MAX_RIDGE_ATTEMPTS):
        matrix.diagonal().copy_(diagonal + ridge)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0:
            return torch.as_tensor(factor)
        ridge *= 10.0
    raise ConfigError(
        "expected a finite positive semi-definite Gram matrix, got one without a Cholesky factor; "
        "check the data for NaN."
    )


def row_kernel(rows: Tensor) -> Tensor:
    """(t, t) float64 inner products of float32 rows (t, d).

    Float32 products of some thousand columns, carried over into float64: the rounding error does not grow with d.
    """
    kernel = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, _KERNEL_COLUMNS, dim=1):
        kernel += part @ part.T
    return kernel


@dataclass(frozen=True, slots=True, eq=False)
class GramRidge:
    """Primal form.

    Attributes:
        gram: (d, d) scaled covariance.
        target: (d, m) gram times the dense weight's transpose.
        block: b.
    """

    gram: Tensor
    target: Tensor
    block: int

    def step(self, probability: Tensor, l2_weight: float) -> tuple[Tensor, float]:
        """Best Lambda at fixed w.

        Args:
            probability: (a,) channel probabilities.
            l2_weight: ridge.

        Returns:
            (a,) float64 squared norms of the channels' blocks of Q = Lambda D, and the explained variance less the
            L2 term.
        """
        scale = probability.to(self.gram).repeat_interleave(self.block)  # (d,)
        system = self.gram * torch.outer(scale, scale)
        ridge = l2_weight + _RELATIVE_RIDGE * float(system.diagonal().mean())
        system.diagonal().add_(ridge)
        right = self.target * scale[:, None]  # (d, m)
        solution = torch.cholesky_solve(right, _cholesky(system))  # Lambda^T
        explained = float((solution * right).double().sum())
        return _block_norms(solution, scale, self.block), explained

    def keep(self, kept: Tensor) -> GramRidge:
        """The regression on some of the alive channels, given by their positions."""
        features = _block_features(kept, self.block).to(self.gram.device)
        return GramRidge(
            gram=self.gram.index_select(0, features).index_select(1, features),
            target=self.target.index_select(0, features),
            block=self.block,
        )


@dataclass(frozen=True, slots=True, eq=False)
class RowRidge:
    """Dual form; one step takes at most 20 t d + 32 t^2 bytes, the factor included.

    Attributes:
        factor: (t, d) float32 centred, scaled rows over sqrt(t).
        answers: (t, q) float64 what the dense weight makes of all rows, see :func:`compressed_answers`.
        block: b.
    """

    factor: Tensor
    answers: Tensor
    block: int

    def step(self, probability: Tensor, l2_weight: float) -> tuple[Tensor, float]:
        """Best Lambda at fixed w: with A = F D and K = A A^T + ridge I, it is Lambda^T = A^T K^-1 B.

        Arguments, ridge and results are those of :meth:`GramRidge.step`.
        """
        scale = probability.to(self.factor).repeat_interleave(self.block)  # (d,)
        scaled = self.factor * scale  # A: (t, d)
        kernel = row_kernel(scaled)
        ridge = l2_weight + _RELATIVE_RIDGE * float(kernel.trace()) / scaled.shape[1]
        system = kernel.clone()
        system.diagonal().add_(ridge)
        combination = torch.cholesky_solve(self.answers, _cholesky(system))  # K^-1 B: (t, q)
        explained = float(((kernel @ combination) * self.answers).sum())
        solution = scaled.T @ combination.to(scaled)  # Lambda^T: (d, q)
        return _block_norms(solution, scale, self.block), explained

    def keep(self, kept: Tensor) -> GramRidge | RowRidge:
        """The regression on some of the alive channels; primal once their features are no more than the rows."""
        features = _block_features(kept, self.block).to(self.factor.device)
        factor = self.factor.index_select(1, features)
        if factor.shape[1] > factor.shape[0]:
            return RowRidge(factor=factor, answers=self.answers, block=self.block)
        target = factor.T @ self.answers.to(factor)
        return GramRidge(gram=factor.T @ factor, target=target, block=self.block)


Ridge = GramRidge | RowRidge


def compressed_answers(factor: Tensor, weight: Tensor) -> Tensor:
    """Answers B = F W^T (t, m) in at most t columns, rotated in the space of the outputs.

    With B^T = Q R the matrix R^T = B Q has the same inner products between its rows: every squared norm and every
    explained variance of the regression is the same, at the cost of q = min(m, t) right-hand sides.

    Args:
        factor: (t, d).
        weight: (m, d).

    Returns:
        (t, q) float64.
    """
    answers = (factor @ weight.T).double()
    if answers.shape[1] <= answers.shape[0]:
        return answers
    triangle: Tensor = torch.linalg.qr(answers.T, mode="r").R
    return triangle.T.contiguous()


def _cholesky(system: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(system)
    return factor if int(info) == 0 else cholesky_with_ridge(system, relative_ridge=1e-5)


def _block_norms(solution: Tensor, scale: Tensor, block: int) -> Tensor:
    """(a,) float64 squared norms of the blocks of Q from Lambda^T (d, m)."""
    return (solution * scale[:, None]).square().sum(1).reshape(-1, block).sum(1).double().cpu()


def _block_features(channels: Tensor, block: int) -> Tensor:
    return (channels[:, None] * block + torch.arange(block)).flatten()
