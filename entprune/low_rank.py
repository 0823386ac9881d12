"""Layers of low rank: one layer as two thin ones, with weights from reduced-rank regression in closed form.

A layer with weights W (m, d) that is refit to rank r answers almost as before where its m outputs are correlated, and
is stored as two: d features to r, and r to m outputs. With the predictions P = X W^T (t, m) of the unrestricted fit and
outputs that count g (m,), the best weights of rank r under least squares are

    W_r = G^-1 V V^T G W,   G = diag(g),   V (m, r): leading eigenvectors of G cov(P) G

(reduced-rank regression: Izenman, Journal of Multivariate Analysis 5, 1975). No gradient step.

Axes: t rows, d features, m outputs, r rank.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from entprune.errors import ModelError

_GAIN_FLOOR = 1e-3  # of the largest gain
_RANK_TOLERANCE = 1e-4  # of all singular values: rounding leaves a little in the trailing ones


def reduce_rank(
    weight: Tensor, bias: Tensor, rows: Iterable[Tensor], gain: Tensor, rank: int, *, intercept: bool = True
) -> tuple[Tensor, Tensor]:
    """Best weights of a rank for the predictions of a fit, and the intercept that keeps their mean.

    Args:
        weight, bias: (m, d) and (m,) of the fit without restriction.
        rows: parts (t, d) of what the layer reads.
        gain: (m,) with which each output counts, not negative.
        rank: 1 to m.
        intercept: whether the layer, or what follows it, can shift its outputs; otherwise their mean counts, too.

    Returns:
        (m, d) weight of that rank and (m,) bias, float32.
    """
    count, total = 0, torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    square = torch.zeros(len(weight), len(weight), dtype=torch.float64, device=weight.device)
    for part in rows:
        predicted = part @ weight.T
        count += len(part)
        total += predicted.sum(0, dtype=torch.float64)
        square += (predicted.T @ predicted).double()
    mean = total / count if intercept else torch.zeros_like(total)
    scale = gain.double().clamp_min(_GAIN_FLOOR * float(gain.max()))
    covariance = (square / count - torch.outer(mean, mean)) * torch.outer(scale, scale)
    leading = torch.linalg.eigh(covariance).eigenvectors[:, -rank:]
    projection = leading @ (leading.T * scale) / scale[:, None]  # G^-1 V V^T G: (m, m)
    reduced = projection @ weight.double()
    return reduced.float(), (bias.double() + mean - projection @ mean).float()


def split_layer(layer: nn.Module, rank: int) -> nn.Sequential:
    """Two layers, features to rank and rank to outputs, that answer like one whose weights have that rank.

    Raises:
        ModelError: it is neither a linear layer nor a convolution in one group, or its weights are not of that rank.
    """
    first, second = _make_pair(layer, rank)
    weight = layer.get_parameter("weight").detach()
    left, sizes, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    if float(sizes[rank:].sum()) > _RANK_TOLERANCE * float(sizes.sum()):
        raise ModelError(f"expected weights of rank {rank}, got others; assemble the network with that rank.")
    root = sizes[:rank].sqrt()
    with torch.no_grad():
        first.weight.copy_((root[:, None] * right[:rank]).reshape(first.weight.shape))
        second.weight.copy_((left[:, :rank] * root).reshape(second.weight.shape))
        if second.bias is not None:
            second.bias.copy_(layer.bias)  # type: ignore[arg-type]
    return _joined(first, second).train(layer.training)


def new_pair(model: nn.Module, name: str, rank: int) -> None:
    """Put two new layers in the place of one, in the network itself.

    Raises:
        ModelError: it is neither a linear layer nor a convolution in one group.
    """
    _replace(model, name, _joined(*_make_pair(model.get_submodule(name), rank)))


def _joined(first: nn.Module, second: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(reduce=first, expand=second))


def _make_pair(layer: nn.Module, rank: int) -> tuple[nn.Conv2d | nn.Linear, nn.Conv2d | nn.Linear]:
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False)
        return first, nn.Linear(rank, layer.out_features, bias=layer.bias is not None)
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1:
        raise ModelError(f"expected a linear layer or a convolution in one group, got {type(layer).__name__}.")
    size, stride = _pair(layer.kernel_size), _pair(layer.stride)
    padding = layer.padding if isinstance(layer.padding, str) else _pair(layer.padding)
    reduce = nn.Conv2d(
        layer.in_channels, rank, size, stride, padding, _pair(layer.dilation),
        bias=False, padding_mode=layer.padding_mode,
    )  # fmt: skip
    return reduce, nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None)


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return int(value[0]), int(value[1])


def split_layers(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Put two thin layers in the place of each that is named, in the network itself, and return it."""
    for name, rank in ranks.items():
        _replace(model, name, split_layer(model.get_submodule(name), rank))
    return model


def merge_layers(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """A copy of the network in which these layers are one each again, whose weights are the product of the two."""
    whole = copy.deepcopy(model)
    for name in ranks:
        pair = whole.get_submodule(name)
        _replace(whole, name, _merged(pair.get_submodule("reduce"), pair.get_submodule("expand")))
    return whole


def _merged(first: nn.Module, second: nn.Module) -> nn.Conv2d | nn.Linear:
    has_bias = second.bias is not None
    if isinstance(first, nn.Conv2d):
        padding = first.padding if isinstance(first.padding, str) else _pair(first.padding)
        one: nn.Conv2d | nn.Linear = nn.Conv2d(
            first.in_channels, len(second.get_parameter("weight")), _pair(first.kernel_size), _pair(first.stride),
            padding, _pair(first.dilation), bias=has_bias, padding_mode=first.padding_mode,
        )  # fmt: skip
    else:
        inner = first.get_parameter("weight")
        one = nn.Linear(inner.shape[1], len(second.get_parameter("weight")), bias=has_bias)
    factors = second.get_parameter("weight").detach(), first.get_parameter("weight").detach()
    one = one.to(dtype=factors[0].dtype).train(first.training)
    with torch.no_grad():
        product = factors[0].flatten(1).double() @ factors[1].flatten(1).double()
        one.weight.copy_(product.reshape(one.weight.shape))
        if one.bias is not None:
            one.bias.copy_(second.get_parameter("bias"))
    return one


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)
