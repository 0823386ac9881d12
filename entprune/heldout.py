"""Error of a refit where there are more features than rows: everything would be explained on the rows themselves.

Axes: t rows, d features, m outputs, c channels, b features per channel.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from entprune.ridge import cholesky_with_ridge, row_kernel

_RELATIVE_RIDGE = 1e-3
_MAX_WIDTHS = 32
_MAX_RUNS = 32


def held_out_errors(factor: Tensor, weight: Tensor, features: Tensor) -> np.ndarray:
    """Unexplained variance on held-out rows after refitting on the first k channels, for every k.

    The first k channels with their dense weights miss R_k = X_removed W_removed^T. A ridge regression of R_k on X_k,
    which shrinks the *correction* of the dense weights towards zero, is fitted on one half of the rows and measured on
    the other, both ways; nothing is missing at k = c, where the error is exactly 0. Its ridge is 1e-3 of the mean
    variance of the k * b inputs, trace(K) / (k b) in terms of the kernel K = X_k X_k^T, which is that of assembly's
    refit by default. The rows are centred once, on both halves.

    Measured at about 32 widths in geometric progression, linear in between, then made non-increasing. Memory is
    O(t d + t m + t^2): the kernel grows block by block.

    Args:
        factor: (t, d) float32 centred rows over sqrt(t).
        weight: (m, d) dense weight.
        features: (c, b) features of each channel, most important channel first.

    Returns:
        (c + 1,) float64, entry k for k channels kept; entry 0 is the total variance.
    """
    num_channels, block = features.shape
    halves = _halves(len(factor), factor.device)
    missing = factor @ weight.T  # R_0: (t, m)
    kernel = torch.zeros(len(factor), len(factor), dtype=torch.float64, device=factor.device)
    widths = [0, *np.unique(np.geomspace(1, num_channels, _MAX_WIDTHS).round().astype(int)).tolist()]
    errors = [float(missing.double().square().sum())]
    for start, stop in pairwise(widths[:-1]):
        columns = features[start:stop].flatten()
        part = factor[:, columns]
        missing -= part @ weight[:, columns].T
        kernel += row_kernel(part)
        errors.append(sum(_error(kernel, missing, stop * block, half) for half in halves))
    known = np.interp(np.arange(num_channels + 1), widths, [*errors, 0.0])
    return np.minimum.accumulate(known)


def _halves(num_rows: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """(fitted, held out) row numbers, both ways.

    Alternating runs of rows: those of one image, which follow each other, stay together, and images in the order of
    their classes spread over both halves.
    """
    runs = min(num_rows, _MAX_RUNS)
    rows = torch.arange(num_rows, device=device)
    odd = (rows * runs // num_rows) % 2 == 1
    even_rows, odd_rows = rows[~odd], rows[odd]
    return [(even_rows, odd_rows), (odd_rows, even_rows)] if len(odd_rows) else []


def _error(kernel: Tensor, missing: Tensor, num_features: int, half: tuple[Tensor, Tensor]) -> float:
    """Sum of squares left on the held-out rows."""
    fitted, held_out = half
    system = kernel[fitted][:, fitted]
    ridge = _RELATIVE_RIDGE * float(system.trace()) / num_features
    system.diagonal().add_(max(ridge, 1e-12))
    across = kernel[fitted][:, held_out]
    smoother = torch.cholesky_solve(across, cholesky_with_ridge(system, relative_ridge=1e-12)).T  # (held out, fitted)
    left = missing[held_out] - smoother.to(missing) @ missing[fitted]
    return float(left.double().square().sum())
