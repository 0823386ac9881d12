"""Layers that run several times, or that share a weight: one set of weights for all their inputs.

Such a layer cannot be refit where it is reached, because its later inputs do not exist yet. Its weights are
re-estimated from the dense network's moments instead, summed over all its calls. Where these are kept as rows (far more
features than rows), the sliced weights stay as they are.

Axes: d features, m outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from entprune.layers import LayerSelection
from entprune.moments import Moments
from entprune.ridge import factorise


def refit_repeated(
    smaller: nn.Module,
    dense: nn.Module,
    selection: Mapping[str, LayerSelection],
    moments: Mapping[str, Moments],
    *,
    relative_ridge: float,
) -> None:
    """Re-estimate the sliced weights of such layers, in place.

    Args:
        smaller: sliced network.
        dense: the network before slicing.
        selection: kept positions of every layer.
        moments: of the inputs of such layers in the dense network.
        relative_ridge: as a fraction of the mean input variance.
    """
    for names in _tied(dense, moments):
        kept = selection.get(names[0], LayerSelection())
        if kept.inputs is None:
            continue
        layer: nn.Module = dense.get_submodule(names[0])
        weight = layer.get_parameter("weight").detach().flatten(1).double()
        rows = slice(None) if kept.outputs is None else torch.from_numpy(kept.outputs)
        weight, columns = weight[rows], torch.from_numpy(_features(layer, kept.inputs))
        refit = _refit(weight, columns, sum(torch.from_numpy(moments[name].scatter) for name in names), relative_ridge)
        for name in names:
            _write(smaller.get_submodule(name), weight, refit, columns, torch.from_numpy(moments[name].mean))


def _tied(model: nn.Module, layers: Collection[str]) -> Iterator[list[str]]:
    """Layers by shared weight."""
    found: dict[int, list[str]] = {}
    for name in layers:
        found.setdefault(id(model.get_submodule(name).get_parameter("weight")), []).append(name)
    yield from found.values()


def _features(layer: nn.Module, inputs: np.ndarray) -> np.ndarray:
    """Columns of the unfolded weight that read the kept inputs."""
    taps = layer.get_parameter("weight").shape[2:].numel()
    return np.asarray((inputs[:, None] * taps + np.arange(taps)).ravel())


def _refit(weight: Tensor, columns: Tensor, scatter: Tensor | int, relative_ridge: float) -> Tensor:
    """Q = W_K + W_R G_RK (G_KK + ridge)^-1: (m, k) float64; nothing is shrunk that the kept features explain."""
    gram = torch.as_tensor(scatter)
    within = gram[columns][:, columns]
    factor = factorise(within, relative_ridge * float(within.diagonal().mean().clamp_min(1e-12)))
    missing = weight.clone()
    missing[:, columns] = 0.0
    solved = torch.cholesky_solve((missing @ gram[:, columns]).T, factor).T
    return weight[:, columns] + solved


def _write(layer: nn.Module, weight: Tensor, refit: Tensor, columns: Tensor, mean: Tensor) -> None:
    """New weight; the bias absorbs the shift of the mean."""
    with torch.no_grad():
        target = layer.get_parameter("weight")
        target.copy_(refit.reshape(target.shape).to(target))
        if layer.bias is not None:
            layer.get_parameter("bias").add_((weight @ mean - refit @ mean[columns]).to(target))
