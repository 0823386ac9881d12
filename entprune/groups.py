"""Which channels can only be kept or removed together, and which layers write and read them.

The coupling comes from torch-pruning's dependency graph; nothing else in the package knows that library.

Axes: c channels of the group, b features per channel in one layer (1 for a convolution, H*W for a linear layer after
a flatten).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, fx, nn

from entprune.errors import ModelError
from entprune.models.resnet import PaddedShortcut

# Layers whose input channels are read through a dense weight, and followers that act on each channel alone.
_DENSE = (nn.Conv2d, nn.Linear)
_FOLLOWERS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerSlice:
    """Where a group's channels lie in one layer.

    Attributes:
        layer: dotted module name.
        index: (c, b) positions of each channel along the layer's input axis (consumers) or output axis (producers,
            followers).
    """

    layer: str
    index: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChannelGroup:
    """Channels that are kept or removed together.

    Attributes:
        name: name of the first producer in execution order.
        num_channels: c.
        producers: layers whose outputs are the channels.
        followers: channel-wise layers with parameters on the way (BatchNorm).
        consumers: layers that read the channels through a dense weight.
    """

    name: str
    num_channels: int
    producers: tuple[LayerSlice, ...]
    followers: tuple[LayerSlice, ...]
    consumers: tuple[LayerSlice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Unprunable:
    """A layer whose output channels stay, and why."""

    layer: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelGroups:
    """All prunable groups of a network in execution order, and every layer that is not prunable."""

    groups: tuple[ChannelGroup, ...]
    unprunable: tuple[Unprunable, ...]

    def named(self, name: str) -> ChannelGroup:
        """Return the group called `name`."""
        for group in self.groups:
            if group.name == name:
                return group
        raise ModelError(
            f"expected a channel group of this network, got {name!r}; groups: {[g.name for g in self.groups]}."
        )


class _KeptAsIs(tp.pruner.function.BasePruningFunc):  # type: ignore[misc]
    """Makes a parameter-free module visible in the dependency graph: groups that pass through it are refused."""

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:  # noqa: ARG002 -- their interface
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: PaddedShortcut) -> int:
        return int(layer.out_channels)

    def get_in_channels(self, layer: PaddedShortcut) -> int:
        return int(layer.in_channels)


def trace(model: nn.Module) -> fx.GraphModule:
    """Symbolically trace the network.

    Raises:
        ModelError: its forward pass depends on data in a way that cannot be traced.
    """
    try:
        return _LeafTracer.trace_module(model)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"expected a network that torch.fx can trace, got {type(model).__name__}: {reason}. "
            "Replace Python control flow on tensors by tensor operations."
        ) from error


class _LeafTracer(fx.Tracer):
    """Keeps the built-in shortcut module whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, PaddedShortcut) or super().is_leaf_module(m, module_qualified_name)

    @classmethod
    def trace_module(cls, model: nn.Module) -> fx.GraphModule:
        return fx.GraphModule(model, cls().trace(model))


def find_groups(model: nn.Module, example_input: Tensor, *, keep: Iterable[str] = ()) -> ChannelGroups:
    """Find the channel groups of a network.

    Args:
        model: network; it is not changed.
        example_input: (n, C, H, W) one batch of the right shape.
        keep: shell patterns of layer names that must not change at all, neither outputs nor inputs.

    Returns:
        Prunable groups and the layers left alone, each with a reason.

    Raises:
        ModelError: the network cannot be traced, or a pattern matches no layer.
    """
    model = copy.deepcopy(model).eval()  # tracing marks and hooks what it walks through
    names = {module: name for name, module in model.named_modules()}
    order = _call_order(trace(model))
    patterns = tuple(keep)
    _check_patterns(patterns, order)
    shared = shared_layers(model)
    found: list[ChannelGroup] = []
    unprunable: list[Unprunable] = []
    for raw in _coupled_sets(model, example_input):
        group, problem = _convert(raw, names, order, keep=patterns, shared=shared)
        if problem is None and group is not None:
            found.append(group)
        else:
            unprunable.extend(
                Unprunable(layer=names[module], reason=problem or "unknown")
                for module in dict.fromkeys(item.dep.target.module for item in raw if _writes(item))
                if isinstance(module, _DENSE)
            )
    position = {name: place for place, name in enumerate(order)}
    found.sort(key=lambda group: position[group.name])
    unprunable.sort(key=lambda entry: position.get(entry.layer, len(position)))
    return ChannelGroups(groups=tuple(found), unprunable=tuple(unprunable))


def _call_order(graph_module: fx.GraphModule) -> dict[str, int]:
    """Names of the called modules in execution order with the number of calls of each."""
    calls: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    return calls


def _check_patterns(patterns: Sequence[str], order: Iterable[str]) -> None:
    layers = list(order)
    for pattern in patterns:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise ModelError(f"keep pattern {pattern!r} matches no layer; expected one of {', '.join(layers[:12])}.")


def _coupled_sets(model: nn.Module, example_input: Tensor) -> list[Any]:
    """Coupled sets as torch-pruning finds them; it hooks the network and follows gradients."""
    logger_level = logging.getLogger("torch_pruning").level
    model.requires_grad_(True)
    try:
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(
                model, example_inputs=example_input, customized_pruners={PaddedShortcut: _KeptAsIs()}, verbose=False
            )
        return list(graph.get_all_groups(root_module_types=list(_DENSE)))
    except Exception as error:
        raise ModelError(
            f"expected a network whose channel coupling can be traced, got {type(model).__name__}: {error}."
        ) from error
    finally:
        logging.getLogger("torch_pruning").setLevel(logger_level)


def _writes(item: Any) -> bool:
    return str(item.dep.handler.__name__) == "prune_out_channels"


def _convert(
    raw: Any, names: dict[nn.Module, str], calls: dict[str, int], *, keep: Sequence[str], shared: frozenset[str]
) -> tuple[ChannelGroup | None, str | None]:
    """Turn one coupled set into a group, or say why it cannot be pruned."""
    roles: dict[str, dict[str, list[Any]]] = {"producers": {}, "followers": {}, "consumers": {}}
    num_channels = len(raw[0].idxs)
    for item in raw:
        module = item.dep.target.module
        name = names.get(module)
        if isinstance(module, nn.Parameter):
            return None, "a parameter outside any layer acts on its channels"
        if name is None:  # an operation without parameters, such as an addition
            continue
        role, problem = _role(module, _writes(item))
        if problem is None and calls.get(name, 0) != 1:
            problem = "is called more than once"
        if problem is None and name in shared:
            problem = "shares its parameters with another layer"
        if problem is not None:
            return None, f"{name} ({type(module).__name__}) {problem}"
        if any(fnmatchcase(name, pattern) for pattern in keep):
            return None, f"{name} is protected by --keep"
        roles[role].setdefault(name, []).append(item)
    if not roles["consumers"]:
        return None, "its outputs are the network's outputs"
    try:
        slices = {role: _slices(items, num_channels, calls) for role, items in roles.items()}
        _check_extents(slices, {name: module for module, name in names.items()}, num_channels)
    except ModelError as error:
        return None, str(error)
    return ChannelGroup(name=slices["producers"][0].layer, num_channels=num_channels, **slices), None


def _check_extents(slices: dict[str, tuple[LayerSlice, ...]], layers: dict[str, nn.Module], num_channels: int) -> None:
    """A producer writes exactly the group's channels, and nobody has more channels than the layer."""
    for role, pieces in slices.items():
        for piece in pieces:
            width = (input_width if role == "consumers" else output_width)(layers[piece.layer])
            if piece.index.max() >= width or (role == "producers" and width != num_channels):
                raise ModelError(f"{piece.layer} has {width} channels, which other layers see as {num_channels}")


def input_width(layer: nn.Module) -> int:
    """Length of a layer's input axis: channels of a convolution or BatchNorm, features of a linear layer."""
    return _first_size(layer, ("in_channels", "in_features", "num_features"))


def output_width(layer: nn.Module) -> int:
    """Length of a layer's output axis."""
    return _first_size(layer, ("out_channels", "out_features", "num_features"))


def _first_size(layer: nn.Module, names: Sequence[str]) -> int:
    sizes: list[Any] = [getattr(layer, name) for name in names if hasattr(layer, name)]
    return int(sizes[0])


def shared_layers(model: nn.Module) -> frozenset[str]:
    """Names of the layers that hold a parameter of another layer."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    return frozenset(name for names in owners.values() if len(names) > 1 for name in names)


def _role(module: nn.Module, writes: bool) -> tuple[str, str | None]:
    if isinstance(module, PaddedShortcut):
        return "followers", "pads channels on a shortcut, which couples streams of different widths"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "producers", "is a grouped convolution"
    if isinstance(module, _DENSE):
        return ("producers" if writes else "consumers"), None
    if isinstance(module, _FOLLOWERS):
        return "followers", None
    return "followers", "is a layer type whose channels cannot be sliced"


def _slices(items: dict[str, list[Any]], num_channels: int, calls: dict[str, int]) -> tuple[LayerSlice, ...]:
    position = {name: place for place, name in enumerate(calls)}
    ordered = sorted(items, key=lambda name: position[name])
    return tuple(LayerSlice(layer=name, index=_channel_index(items[name], num_channels, name)) for name in ordered)


def _channel_index(items: list[Any], num_channels: int, name: str) -> np.ndarray:
    """(c, b) positions in the layer for each channel of the group."""
    positions: list[set[int]] = [set() for _ in range(num_channels)]
    for item in items:
        for position, root in zip(item.idxs, item.root_idxs, strict=True):
            positions[int(root)].add(int(position))
    widths = {len(entry) for entry in positions}
    if len(widths) != 1:
        raise ModelError(f"{name} reads its channels in blocks of unequal size")
    index = np.array([sorted(entry) for entry in positions], dtype=np.int64)
    if np.unique(index).size != index.size:
        raise ModelError(f"{name} mixes several channels of the group in one feature")
    return index
