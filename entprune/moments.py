"""Streaming mean and centred second moment of what a layer reads: all that the regression needs of the data.

Axes: n rows (samples times positions), d features, m outputs, c input channels, h and w spatial.
"""

from __future__ import annotations

import itertools
import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entprune.errors import DataError

_CARRY_ROWS = 8192


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moments:
    """Sufficient statistics of n rows with d features.

    Attributes:
        count: n.
        mean: (d,) float64.
        scatter: (d, d) sum over rows of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    def covariance(self) -> np.ndarray:
        """(d, d) scatter divided by the number of rows."""
        return self.scatter / max(self.count, 1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowMoments:
    """The rows themselves, where they are fewer than the features: 4 t d bytes instead of the 8 d^2 of a scatter.

    Attributes:
        rows: (t, d) float32, in the order in which they were sampled.
    """

    rows: np.ndarray

    @property
    def count(self) -> int:
        """Number of rows t."""
        return len(self.rows)

    @property
    def mean(self) -> np.ndarray:
        """(d,) float64, zero without rows."""
        return np.asarray(self.rows.mean(0, dtype=np.float64) if self.count else np.zeros(self.rows.shape[1]))

    def factor(self) -> np.ndarray:
        """(t, d) float32 F with F^T F = covariance: the centred rows over sqrt(t)."""
        centred = self.rows - self.mean.astype(np.float32)
        centred -= RowMoments(rows=centred).mean.astype(np.float32)  # what rounding has left of a large mean
        centred /= np.float32(max(self.count, 1) ** 0.5)
        return centred


InputMoments = Moments | RowMoments


def merge(first: InputMoments, second: InputMoments) -> InputMoments:
    """Moments of the union of two disjoint sets of rows, of the form that both have.

    Rows are concatenated, so the order of the parts is the only thing that matters.

    Raises:
        DataError: the parts are of different forms or sizes.
    """
    if isinstance(first, RowMoments) and isinstance(second, RowMoments):
        _check_equal_size(first.rows.shape[1], second.rows.shape[1])
        return RowMoments(rows=np.concatenate([first.rows, second.rows]))
    if isinstance(first, RowMoments) or isinstance(second, RowMoments):
        raise DataError("expected moments of one form, got rows and a scatter matrix; merge shards of one pass.")
    return _merge_scatter(first, second)


def _check_equal_size(first: int, second: int) -> None:
    if first != second:
        raise DataError(
            f"expected moments of equal size, got {first} and {second} features; merge shards of one layer."
        )


def _merge_scatter(first: Moments, second: Moments) -> Moments:
    """Chan, Golub and LeVeque's pairwise update."""
    _check_equal_size(first.mean.size, second.mean.size)
    count = first.count + second.count
    if count == 0:
        return first
    shift = second.mean - first.mean
    mean = first.mean + shift * (second.count / count)
    scatter = first.scatter + second.scatter
    scatter += np.outer(shift, shift) * (first.count * second.count / count)
    return Moments(count=count, mean=mean, scatter=scatter)


class ProductSum:
    """Running sum of products a^T b: float32 matrix products, carried over into float64 every few thousand rows.

    The float32 partial sum is short, so its rounding error does not grow with the number of rows, and the float64
    matrix is touched seldom: the cost is that of the matrix products.
    """

    def __init__(self, num_left: int, num_right: int, *, device: str = "cpu") -> None:
        self._partial = torch.zeros(num_left, num_right, device=device)
        self._total = torch.zeros(num_left, num_right, dtype=torch.float64, device=device)
        self._rows = 0

    def update(self, left: Tensor, right: Tensor) -> None:
        """Add left^T right for rows (n, l) and (n, r)."""
        self._partial.addmm_(left.T, right)
        self._rows += left.shape[0]
        if self._rows >= _CARRY_ROWS:
            self._carry()

    def _carry(self) -> None:
        self._total += self._partial
        self._partial.zero_()
        self._rows = 0

    def total(self) -> Tensor:
        """(l, r) float64 sum so far."""
        self._carry()
        return self._total


class GramSum:
    """Running sum of x^T x; only blocks at and right of the diagonal are multiplied: almost half the work."""

    def __init__(self, num_features: int, *, device: str = "cpu") -> None:
        edges = np.linspace(0, num_features, max(1, min(8, num_features // 256)) + 1, dtype=int)
        self._starts = [(int(a), int(b)) for a, b in itertools.pairwise(edges)]
        self._strips = [ProductSum(stop - start, num_features - start, device=device) for start, stop in self._starts]
        self._num_features, self._device = num_features, device

    def update(self, rows: Tensor) -> None:
        """Add rows (n, d)."""
        for (start, stop), strip in zip(self._starts, self._strips, strict=True):
            strip.update(rows[:, start:stop], rows[:, start:])

    def total(self) -> Tensor:
        """(d, d) float64 sum so far, symmetric."""
        full = torch.empty(self._num_features, self._num_features, dtype=torch.float64, device=self._device)
        for (start, stop), strip in zip(self._starts, self._strips, strict=True):
            upper = strip.total()
            full[start:stop, start:] = upper
            full[start:, start:stop] = upper.T
        return full


class MomentAccumulator:
    """Adds batches of rows in memory independent of their number: 8 d^2 bytes for the result, as much for partial sums.

    Rows are shifted by the mean of the first batch, which removes the cancellation that raw second moments suffer from.
    """

    def __init__(self, num_features: int, *, device: str = "cpu") -> None:
        self._count = 0
        self._shift: Tensor | None = None
        self._sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self._products = GramSum(num_features, device=device)

    def update(self, rows: Tensor) -> None:
        """Add rows (n, d), any floating dtype, on the accumulator's device."""
        if rows.shape[0] == 0:
            return
        if self._shift is None:
            self._shift = rows.mean(0, dtype=torch.float64).float()
        shifted = rows.float() - self._shift
        self._sum += shifted.sum(0, dtype=torch.float64)
        self._products.update(shifted)
        self._count += rows.shape[0]

    def result(self) -> Moments:
        """Moments of all rows so far, on the CPU."""
        scatter = self._products.total()
        mean = self._sum / max(self._count, 1)
        scatter.addr_(mean, mean, alpha=-float(self._count))
        if self._shift is not None:
            mean = mean + self._shift.double()
        return Moments(count=self._count, mean=mean.cpu().numpy(), scatter=scatter.cpu().numpy())


class RowAccumulator:
    """Keeps batches of rows, on the CPU: 4 t d bytes, and as much again while they are joined."""

    def __init__(self, num_features: int) -> None:
        self._parts = [torch.zeros(0, num_features)]

    def update(self, rows: Tensor) -> None:
        """Add rows (n, d), any floating dtype and device."""
        self._parts.append(rows.to("cpu", torch.float32, copy=True))

    def result(self) -> RowMoments:
        """All rows so far."""
        return RowMoments(rows=torch.cat(self._parts).numpy())


def make_accumulator(num_features: int, num_rows: int, *, device: str = "cpu") -> MomentAccumulator | RowAccumulator:
    """The smaller form for that many rows in all shards together: rows below d of them, else a scatter matrix.

    Args:
        num_features: d.
        num_rows: t, of all shards, so that every shard decides alike.
        device: of the scatter matrix.
    """
    if num_rows < num_features:
        return RowAccumulator(num_features)
    return MomentAccumulator(num_features, device=device)


def feature_count(layer: nn.Module) -> int:
    """d: features that one output of the layer reads."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]
    return int(layer.get_parameter("weight").shape[1])


def count_positions(layer: nn.Module, inputs: Tensor) -> int:
    """Output positions per image: h * w of a convolution, all axes between image and feature of a linear layer."""
    if isinstance(layer, nn.Conv2d):
        sizes = zip(_padded_size(layer, inputs), layer.kernel_size, layer.stride, layer.dilation, strict=True)
        return math.prod((size - dilation * (taps - 1) - 1) // stride + 1 for size, taps, stride, dilation in sizes)
    return math.prod(inputs.shape[1:-1])


def _padded_size(layer: nn.Conv2d, inputs: Tensor) -> tuple[int, int]:
    left, right, top, bottom = layer._reversed_padding_repeated_twice  # noqa: SLF001 -- resolves every form of padding
    return inputs.shape[2] + top + bottom, inputs.shape[3] + left + right


def draw_positions(
    num_images: int, num_positions: int, *, per_image: int, seed: int, name: str, batch: int
) -> Tensor | None:
    """Random output positions of one batch, the same for the same seed, layer and batch on every machine.

    Args:
        num_images: n, images in the batch.
        num_positions: to choose from, see :func:`count_positions`.
        per_image: positions wanted per image.

    Returns:
        (n, p) flat positions, or None where all are used.
    """
    if per_image >= num_positions:
        return None
    sequence = np.random.SeedSequence([seed, zlib.crc32(name.encode()), batch])
    order = np.random.default_rng(sequence).random((num_images, num_positions)).argpartition(per_image, axis=1)
    return torch.from_numpy(np.ascontiguousarray(np.sort(order[:, :per_image], axis=1)))


def read_rows(layer: nn.Module, inputs: Tensor, positions: Tensor | None) -> Tensor:
    """What a layer reads at some output positions.

    Args:
        inputs: (n, c, h, w) for a convolution, (n, ..., d) for a linear layer.
        positions: (n, p) flat output positions, or None for all.

    Returns:
        (n * p, c * kh * kw) rows in the order of `layer.weight.flatten(1)`, or (n * p, d) for a linear layer.
    """
    if not isinstance(layer, nn.Conv2d):
        return _pick(inputs.reshape(inputs.shape[0], -1, inputs.shape[-1]), positions)
    padded = _pad(layer, inputs)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    windows = padded.unfold(2, dh * (kh - 1) + 1, sh).unfold(3, dw * (kw - 1) + 1, sw)[..., ::dh, ::dw]
    # windows: (n, c, ho, wo, kh, kw), a view without copies
    if positions is None:
        return windows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    width = windows.shape[3]
    positions = positions.to(inputs.device)
    image = torch.arange(inputs.shape[0], device=inputs.device)[:, None]
    picked = windows[image, :, positions // width, positions % width]  # (n, p, c, kh, kw)
    return picked.flatten(2).flatten(0, 1)


def read_outputs(layer: nn.Module, output: Tensor, positions: Tensor | None) -> Tensor:
    """Rows (n * p, m) of a layer's output at the positions that :func:`read_rows` uses."""
    if not isinstance(layer, nn.Conv2d):
        return _pick(output.reshape(output.shape[0], -1, output.shape[-1]), positions)
    return _pick(output.flatten(2).transpose(1, 2), positions)  # (n, h * w, m)


def _pick(values: Tensor, positions: Tensor | None) -> Tensor:
    """Rows (n * p, k) of values (n, positions, k)."""
    if positions is None:
        return values.flatten(0, 1)
    index = positions.to(values.device)[:, :, None].expand(-1, -1, values.shape[2])
    return values.gather(1, index).flatten(0, 1)


def _pad(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Pad as the layer does, on each side in its padding mode; "same" and "valid" come resolved in the attribute."""
    sides: list[int] = layer._reversed_padding_repeated_twice  # noqa: SLF001 -- resolves every form of padding
    if not any(sides):
        return inputs
    return F.pad(inputs, sides, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
