"""Regression of one layer's answers on what it reads, in two forms with the same solution; answers can be exchanged.

    W = P + (Y - X P^T)^T X (X^T X + t ridge I)^-1,   ridge = relative_ridge * trace(X^T X) / (t d)

with rows X (t, d) and answers Y (t, m), both centred where there is an intercept, and the given weights P (m, d):
directions without data keep these. Where the rounding of the products exceeds the ridge, a larger one is taken.

Axes: t rows, d features, m outputs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from entprune.moments import GramSum, ProductSum
from entprune.ridge import factorise, row_kernel


class Fit(Protocol):
    """A regression that rows and answers are added to before it is solved."""

    def update(self, rows: Tensor, answers: Tensor) -> None:
        """Add rows (t, d) with answers (t, m)."""

    def forget_answers(self) -> None:
        """Keep the rows and what was factorised, and expect new answers to them."""

    def answer_again(self, rows: Tensor, answers: Tensor) -> None:
        """Add new answers (t, m) to rows (t, d) of an earlier update, in the same order."""

    def solve(self, prior: Tensor, relative_ridge: float) -> tuple[Tensor, Tensor]:
        """Solve for (m, d) weight and (m,) bias in float32, shrinking towards `prior` (m, d)."""


def make_fit(num_rows: int, num_features: int, num_outputs: int, intercept: bool, device: str) -> Fit:
    """The smaller form: the rows themselves where they are fewer than the features, else the normal equations."""
    if num_rows < num_features:
        return DualFit(intercept)
    return PrimalFit(num_features, num_outputs, intercept, device)


class PrimalFit:
    """Accumulates the normal equations: shifted by the first batch's means with an intercept, raw without."""

    def __init__(self, num_features: int, num_outputs: int, intercept: bool, device: str) -> None:
        self._count = 0
        self._intercept = intercept
        self._shift = (torch.zeros(num_features, device=device), torch.zeros(num_outputs, device=device))
        self._sum_x = torch.zeros(num_features, dtype=torch.float64, device=device)
        self._xx = GramSum(num_features, device=device)
        self._size = (num_outputs, num_features)
        self._system: tuple[Tensor, Tensor] | None = None
        self.forget_answers()

    def update(self, rows: Tensor, answers: Tensor) -> None:
        """Add rows (t, d) with answers (t, m)."""
        if self._intercept and self._count == 0:
            self._shift = (rows.mean(0), answers.mean(0))
        x = rows - self._shift[0]
        self._count += rows.shape[0]
        self._sum_x += x.sum(0, dtype=torch.float64)
        self._xx.update(x)
        self._add_answers(x, answers)

    def forget_answers(self) -> None:
        """Keep the Gram matrix alone."""
        self._sum_y = torch.zeros(self._size[0], dtype=torch.float64, device=self._shift[0].device)
        self._yx = ProductSum(*self._size, device=str(self._shift[0].device))

    def answer_again(self, rows: Tensor, answers: Tensor) -> None:
        """Add new answers (t, m) to rows (t, d) that were given before."""
        self._add_answers(rows - self._shift[0], answers)

    def _add_answers(self, x: Tensor, answers: Tensor) -> None:
        y = answers - self._shift[1]
        self._sum_y += y.sum(0, dtype=torch.float64)
        self._yx.update(y, x)

    def solve(self, prior: Tensor, relative_ridge: float) -> tuple[Tensor, Tensor]:
        """Weight (m, d) and bias (m,); the factorisation is kept for further answers, at the same ridge."""
        mean_x, mean_y = self._sum_x / self._count, self._sum_y / self._count
        if not self._intercept:
            mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
        xx, factor = self._system or self._factorise(mean_x, relative_ridge)
        self._system = xx, factor
        yx = self._yx.total() / self._count - torch.outer(mean_y, mean_x)
        residual = yx - prior.double() @ xx
        weight = prior.double() + torch.cholesky_solve(residual.T, factor).T
        bias = mean_y + self._shift[1].double() - weight @ (mean_x + self._shift[0].double())
        return weight.float(), bias.float()

    def _factorise(self, mean_x: Tensor, relative_ridge: float) -> tuple[Tensor, Tensor]:
        """Covariance (d, d) and the Cholesky factor of it with its ridge."""
        xx = self._xx.total() / self._count - torch.outer(mean_x, mean_x)
        ridge = relative_ridge * float(xx.diagonal().mean().clamp_min(1e-12))
        return xx, factorise(xx.clone(), ridge)


class DualFit:
    """Keeps rows and answers, and solves by a (t, t) system.

    Memory is O(t d + t m + t^2 + m d): no (d, d) matrix.
    """

    def __init__(self, intercept: bool) -> None:
        self._intercept = intercept
        self._rows: list[Tensor] = []
        self._answers: list[Tensor] = []
        self._system: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, rows: Tensor, answers: Tensor) -> None:
        """Add rows (t, d) with answers (t, m); they are read when the fit is solved."""
        self._rows.append(rows)
        self._answers.append(answers)

    def forget_answers(self) -> None:
        """Keep the rows and the factor of their kernel."""
        self._answers.clear()

    def answer_again(self, rows: Tensor, answers: Tensor) -> None:  # noqa: ARG002 -- one signature for both forms
        """Add new answers (t, m); the rows are known."""
        self._answers.append(answers)

    def solve(self, prior: Tensor, relative_ridge: float) -> tuple[Tensor, Tensor]:
        """Weight (m, d) and bias (m,); the factorisation is kept for further answers, at the same ridge."""
        x, mean_x, factor = self._system or self._factorise(relative_ridge)
        self._system = x, mean_x, factor
        y, mean_y = self._centred(self._answers)
        residual = y.addmm_(x, prior.T, alpha=-1.0)
        coefficients = torch.cholesky_solve(residual.double(), factor)  # (t, m)
        weight = torch.addmm(prior, coefficients.T.float(), x)
        shift = torch.cat([part.double() @ mean_x.double() for part in torch.split(weight, 256)])  # W is never copied
        return weight, (mean_y.double() - shift).float()

    def _factorise(self, relative_ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """Centred rows (t, d), their mean (d,) and the factor of their kernel with its ridge."""
        x, mean_x = self._centred(self._rows)
        kernel = row_kernel(x)
        ridge = relative_ridge * float((kernel.trace() / x.numel()).clamp_min(1e-12))
        return x, mean_x, factorise(kernel, len(x) * ridge)

    def _centred(self, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(t, k) float32 values less their (k,) mean, and the mean; zero without an intercept."""
        values = torch.cat(parts).float()
        parts.clear()
        mean = values.mean(0, dtype=torch.float64).float() if self._intercept else torch.zeros_like(values[0])
        return values.sub_(mean), mean
