"""Refit of a layer whose outputs pass a ReLU: what the ReLU cuts off need not be right, only negative.

With z the dense and v the present pre-activations, minimises the sum of (z - v)^2 over what the dense network passes
and of relu(v)^2 over what it cuts off, an upper bound of sum (relu(z) - relu(v))^2, by majorisation: an element that is
cut off is asked for min(v, 0) instead of z, the others for z, so each least-squares fit to these targets lowers the
bound. A small pull towards z keeps what is cut off where it was.

Source: the alternation follows the idea of X. Zhang et al., "Accelerating Very Deep Convolutional Networks for
Classification and Detection", 2016, with targets in place of their auxiliary variables.

Axes: t rows, m outputs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from entprune.residuals import NORMS, Residual, is_identity, norm_gain

_RELU_MODULES = (nn.ReLU, nn.ReLU6)
_RELU_FUNCTIONS = frozenset({F.relu, F.relu6, torch.relu, torch.relu_, "relu", "relu_"})
_GAIN_FLOOR = 1e-4  # of the largest: below it the sign of a pre-activation does not depend on the layer


@dataclass(frozen=True, kw_only=True, slots=True)
class Rectifier:
    """A dense layer whose outputs, normalised or added to a stream, only a ReLU reads.

    Attributes:
        layer: the dense layer.
        norm: BatchNorm between it and the ReLU, None if there is none.
    """

    layer: str
    norm: str | None


@dataclass(frozen=True, slots=True, eq=False)
class CutOff:
    """Where a ReLU cuts, in the layer's own units.

    Attributes:
        threshold: (m,) value at which the pre-activation is zero.
        side: (m,) 1 where larger outputs pass, -1 where smaller ones do, 0 where the layer does not decide.
    """

    threshold: Tensor
    side: Tensor

    def at(self, kept: np.ndarray | slice) -> CutOff:
        """Of some of the outputs."""
        return CutOff(threshold=self.threshold[kept], side=self.side[kept])

    def where(self, decides: Tensor) -> CutOff:
        """The same, with side 0 where the layer does not decide (m,)."""
        return CutOff(threshold=self.threshold, side=torch.where(decides, self.side, 0.0))

    def to(self, device: str) -> CutOff:
        """On another device."""
        return CutOff(threshold=self.threshold.to(device), side=self.side.to(device))

    def targets(self, dense: Tensor, present: Tensor, pull: float) -> Tensor:
        """What the layer should answer (t, m), from dense and present answers (t, m).

        Args:
            dense: of the dense network, summands of a residual stream included.
            present: of the network as it is.
            pull: weight of the dense answer where it is cut off, in [0, 1].
        """
        is_passed = (dense - self.threshold) * self.side > 0
        below = torch.where(
            self.side > 0, torch.minimum(present, self.threshold), torch.maximum(present, self.threshold)
        )
        return torch.where(is_passed | (self.side == 0), dense, torch.lerp(below, dense, pull))


def find_rectifiers(
    graph: fx.Graph, model: nn.Module, residuals: Collection[Residual], free: Collection[str]
) -> dict[str, Rectifier]:
    """Layers that are followed by a ReLU alone, by name.

    Args:
        graph: traced operations of the network.
        model: the network.
        residuals: additions that a layer corrects; others end the search.
        free: modules that are called once and may change.
    """
    corrected = {entry.layer for entry in residuals}
    found: dict[str, Rectifier] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module" and name in free and isinstance(model.get_submodule(name), (nn.Conv2d, nn.Linear)):
            entry = _follow(node, model, free, may_add=name in corrected)
            if entry is not None:
                found[name] = entry
    return found


def _follow(node: fx.Node, model: nn.Module, free: Collection[str], *, may_add: bool) -> Rectifier | None:
    """Walk forward while exactly one operation reads the value."""
    layer, norm, is_sum = str(node.target), None, False
    while len(node.users) == 1:
        (node,) = node.users
        module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, _RELU_MODULES) or (module is None and node.target in _RELU_FUNCTIONS):
            return Rectifier(layer=layer, norm=norm)
        if isinstance(module, NORMS) and norm is None and not is_sum and str(node.target) in free:
            norm = str(node.target)
        elif module is None and may_add and not is_sum and len(node.all_input_nodes) == 2:
            is_sum = True  # the only reader of a corrected branch is its addition
        elif module is None or not is_identity(module):
            return None
    return None


def cut_off(model: nn.Module, rectifier: Rectifier) -> CutOff | None:
    """Threshold and side for every output of the dense layer; None if its BatchNorm keeps no statistics."""
    size = len(model.get_submodule(rectifier.layer).get_parameter("weight"))
    if rectifier.norm is None:
        return CutOff(threshold=torch.zeros(size), side=torch.ones(size))
    norm = model.get_submodule(rectifier.norm)
    gain = norm_gain(norm)
    if gain is None or not isinstance(norm, NORMS) or norm.running_mean is None:
        return None
    is_open = gain.abs() > _GAIN_FLOOR * gain.abs().max()
    shift = norm.bias.detach() if norm.affine else torch.zeros_like(gain)
    threshold = norm.running_mean - torch.where(is_open, shift / torch.where(is_open, gain, 1.0), 0.0)
    return CutOff(threshold=threshold, side=torch.where(is_open, gain.sign(), 0.0))
