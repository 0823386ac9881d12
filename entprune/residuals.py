"""Residual additions: a branch whose last layer can make up for the error that the other branch already carries.

Where y = BN(W x) + s and the stream s has changed by pruning, the branch is refit to the dense sum minus the present s,
in the units of W x: its target becomes  W x_dense + (s_dense - s) / (gamma / sigma).

Axes: m outputs of the layer.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from entprune.tracing import called_modules

_SCALE_FLOOR = 0.05  # of the largest: a channel that the normalisation hardly lets through cannot correct anything
_ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True, kw_only=True, slots=True)
class Residual:
    """The last layer of a branch, and what is added to it.

    Attributes:
        layer: dense layer whose refit makes up for the error.
        norm: BatchNorm between it and the addition, None if there is none.
        other: name of the graph node that is added, known before the layer runs.
    """

    layer: str
    norm: str | None
    other: str


@dataclass(frozen=True, slots=True, eq=False)
class ResidualGraph:
    """Residual additions together with the operations that name them.

    Attributes:
        graph: traced operations of the network.
        layers: the layers that make up for errors.
    """

    graph: fx.Graph
    layers: tuple[Residual, ...]


def find_residuals(
    graph: fx.Graph, model: nn.Module, layers: Collection[str], protected: Collection[str] = ()
) -> tuple[Residual, ...]:
    """Additions that a layer can correct, in execution order.

    Args:
        graph: traced operations of the network; a shortcut without parameters is moved before the layer, in place.
        model: the network.
        layers: those that may be refit.
        protected: modules that must not change.
    """
    once = {name for name, count in called_modules(graph).items() if count == 1 and name not in protected}
    found: list[Residual] = []
    for node in list(graph.nodes):
        summands = [part for part in node.args[:2] if isinstance(part, fx.Node)]
        if node.target not in _ADDITIONS or len(summands) != 2:
            continue
        for branch, other in (summands, summands[::-1]):
            end, norm = _last_layer(branch, model, once)
            if end is None or str(end.target) not in layers:
                continue
            source = _known_before(end, other, graph, model)
            if source is not None:
                found.append(Residual(layer=str(end.target), norm=norm, other=source.name))
                break
    return tuple(found)


def _known_before(end: fx.Node, other: fx.Node, graph: fx.Graph, model: nn.Module) -> fx.Node | None:
    """The summand, if it can be had before the layer runs."""
    position = {node: number for number, node in enumerate(graph.nodes)}
    while position[other] > position[end] and _has_module(other, model, is_identity):
        other = other.all_input_nodes[0]  # still held, since the identity reads it later
    if position[other] < position[end]:
        return other
    is_free = _has_module(other, model, lambda module: not list(module.parameters()))
    if is_free and all(position[used] < position[end] for used in other.all_input_nodes):
        end.prepend(other)
        return other
    return None


def is_identity(module: nn.Module) -> bool:
    """Whether a module hands its input on in evaluation mode."""
    vision = sys.modules.get("torchvision.ops")  # a network that needs it has imported it; it takes a second
    return isinstance(module, _IDENTITIES) or (vision is not None and isinstance(module, vision.StochasticDepth))


def _has_module(node: fx.Node, model: nn.Module, fits: Callable[[nn.Module], bool]) -> bool:
    return node.op == "call_module" and fits(model.get_submodule(str(node.target)))


def _last_layer(node: fx.Node, model: nn.Module, once: Collection[str]) -> tuple[fx.Node | None, str | None]:
    """Follow a branch backwards through identities and one BatchNorm to a dense layer that nothing else reads."""
    norm: str | None = None
    while node.op == "call_module" and len(node.users) == 1 and isinstance(node.args[0], fx.Node):
        module = model.get_submodule(str(node.target))
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            return node, norm
        if isinstance(module, NORMS) and norm is None and str(node.target) in once:
            norm = str(node.target)
        elif not is_identity(module):
            break
        node = node.args[0]
    return None, None


def find_norms(graph: fx.Graph, model: nn.Module) -> dict[str, str]:
    """BatchNorm that alone reads a dense layer, by that layer's name."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        users = list(node.users)
        is_layer = _has_module(node, model, lambda module: isinstance(module, (nn.Conv2d, nn.Linear)))
        if is_layer and len(users) == 1 and _has_module(users[0], model, lambda module: isinstance(module, NORMS)):
            found[str(node.target)] = str(users[0].target)
    return found


def norm_gain(norm: nn.Module) -> Tensor | None:
    """(m,) factor by which a BatchNorm multiplies each channel in eval mode, None if it keeps no statistics."""
    if not isinstance(norm, NORMS) or norm.running_var is None:
        return None
    gain = (norm.running_var + norm.eps).rsqrt()
    return gain * norm.weight.detach() if norm.affine else gain


def output_gain(model: nn.Module, layer: str, norm: str | None) -> Tensor:
    """(m,) magnitude with which each output of a dense layer goes on; `norm` is the BatchNorm that alone reads it."""
    gain = None if norm is None else norm_gain(model.get_submodule(norm))
    return torch.ones(len(model.get_submodule(layer).get_parameter("weight"))) if gain is None else gain.abs()


def inverse_gain(model: nn.Module, residual: Residual) -> Tensor:
    """(m,) factor from the sum's units to the layer's outputs, 0 where the normalisation hardly lets them through."""
    layer = model.get_submodule(residual.layer)
    if residual.norm is None:
        return torch.ones(len(layer.get_parameter("weight")))
    gain = norm_gain(model.get_submodule(residual.norm))
    if gain is None:
        return torch.zeros(len(layer.get_parameter("weight")))
    is_open = gain.abs() > _SCALE_FLOOR * gain.abs().max()
    return torch.where(is_open, 1.0 / torch.where(is_open, gain, 1.0), 0.0)
