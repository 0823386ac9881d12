"""Which channels can only be kept or removed together, and which layers write and read them.

Axes: c channels of the group, b features per channel in one layer (1 for a convolution, H*W for a linear layer after
a flatten).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor, nn

from entprune.coupling import Coupling, couple
from entprune.errors import ModelError
from entprune.label_rules import LabelledLayer
from entprune.labels import FIXED_ZERO
from entprune.tracing import trace

_NO_READER = "no layer that can be re-estimated reads its outputs"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerSlice:
    """Where a group's channels lie in one layer.

    Attributes:
        layer: dotted module name, or the name of a parameter or buffer that is used outside a layer.
        index: (c, b) positions of each channel along the layer's input axis (consumers, readers) or output axis
            (producers, followers).
        axis: of such a parameter or buffer.
    """

    layer: str
    index: np.ndarray
    axis: int = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChannelGroup:
    """Channels that are kept or removed together.

    Attributes:
        name: name of the first producer in execution order, with a number if it writes several groups.
        num_channels: c; what is tied together (a whole group of a grouped convolution, say) is one of them.
        producers: dense layers whose outputs are the channels.
        followers: channel-wise layers on the way that have an entry for each (normalisations, depthwise and grouped
            convolutions, shortcuts, scales).
        consumers: layers that read the channels through a dense weight: the regressions.
        readers: layers whose inputs are cut without a regression: shortcuts, and heads that run in training alone.
    """

    name: str
    num_channels: int
    producers: tuple[LayerSlice, ...]
    followers: tuple[LayerSlice, ...]
    consumers: tuple[LayerSlice, ...]
    readers: tuple[LayerSlice, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Unprunable:
    """A layer whose output channels stay, all or some, and why."""

    layer: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelGroups:
    """All prunable groups of a network in execution order, and every layer that is not prunable.

    Attributes:
        groups: prunable groups.
        unprunable: layers left alone, each with the reason.
        protected: layers that must not change at all.
    """

    groups: tuple[ChannelGroup, ...]
    unprunable: tuple[Unprunable, ...]
    protected: frozenset[str] = field(default_factory=frozenset)

    def named(self, name: str) -> ChannelGroup:
        """Return the group called `name`."""
        for group in self.groups:
            if group.name == name:
                return group
        raise ModelError(
            f"expected a channel group of this network, got {name!r}; groups: {[g.name for g in self.groups]}."
        )


def find_groups(
    model: nn.Module, example_input: Tensor | tuple[Tensor, ...], *, keep: Iterable[str] = ()
) -> ChannelGroups:
    """Find the channel groups of a network.

    Args:
        model: network; it is not changed.
        example_input: (n, C, H, W) one batch of two images or more, or all arguments of the forward pass.
        keep: shell patterns of layer names that must not change at all, neither outputs nor inputs.

    Returns:
        Prunable groups and the layers left alone, each with a reason.

    Raises:
        ModelError: the network cannot be traced, does not take such inputs, or a pattern matches no layer.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    coupling = couple(model, inputs)
    trace(copy.deepcopy(model).eval())  # what cannot be traced cannot be assembled later: say so now
    protected = _protect(coupling, tuple(keep))
    finder = _GroupFinder(model, coupling)
    return ChannelGroups(groups=finder.groups(), unprunable=finder.unprunable(), protected=protected)


def _protect(coupling: Coupling, patterns: Sequence[str]) -> frozenset[str]:
    """Pin everything that the kept layers read and write."""
    layers = [*dict.fromkeys([*(name for name in coupling.calls if name), *coupling.layers])]
    protected: set[str] = set()
    for pattern in patterns:
        matched = [layer for layer in layers if fnmatchcase(layer, pattern)]
        if not matched:
            known = [layer for layer in layers if layer in coupling.layers]
            raise ModelError(f"keep pattern {pattern!r} matches no layer; expected one of {', '.join(known[:12])}.")
        protected.update(matched)
    for name in layers:
        if name in protected or any(name.startswith(f"{kept}.") for kept in protected):
            protected.add(name)
            _pin_layer(coupling, name)
    return frozenset(protected)


def _pin_layer(coupling: Coupling, name: str) -> None:
    layer = coupling.layers.get(name)
    if layer is None:
        return
    reason = f"{name} is protected by --keep"
    coupling.space.pin(layer.outputs, reason)
    if layer.inputs is not None:
        coupling.space.pin(layer.inputs, reason)


@dataclass(frozen=True, slots=True)
class _Place:
    """Positions of one class of labels in one layer."""

    role: str
    layer: str
    axis: int
    positions: tuple[int, ...]


class _GroupFinder:
    """Turns classes of labels into groups: classes with the same layers and the same counts are one group."""

    def __init__(self, model: nn.Module, coupling: Coupling) -> None:
        self._model, self._coupling = model, coupling
        self._pinned = coupling.space.pinned()
        self._roots: dict[str, np.ndarray] = {}
        self._places = self._collect()
        self._grouped: set[int] = set()
        self._found = self._group()

    def groups(self) -> tuple[ChannelGroup, ...]:
        return self._found

    def unprunable(self) -> tuple[Unprunable, ...]:
        """Dense layers of which outputs stay, in execution order, then those that never ran."""
        entries = [
            Unprunable(layer=name, reason=reason)
            for name in self._coupling.layers
            if self._is_producer(name) and (reason := self._why(name)) is not None
        ]
        for name, module in self._model.named_modules():
            if _has_matrix(module) and name not in self._coupling.layers:
                unknown = f"{type(module).__name__} is a layer type that is not pruned"
                reason = unknown if name in self._coupling.calls else "it is never called"
                entries.append(Unprunable(layer=name, reason=reason))
        return tuple(entries)

    def _is_producer(self, name: str) -> bool:
        layer = self._coupling.layers[name]
        return layer.kind == "dense" or (layer.kind == "channelwise" and _has_matrix(self._model.get_submodule(name)))

    def _why(self, name: str) -> str | None:
        """Why outputs of a layer stay, None if all of them are in groups."""
        roots = self._roots[name]
        left = [int(root) for root in roots if int(root) not in self._grouped]
        if not left:
            return None
        reason = next((self._pinned[root] for root in left if root in self._pinned), None)
        if reason is None:
            has_reader = any(place.role == "consumers" for root in left for place in self._places.get(root, ()))
            reason = "its channels are all tied together" if has_reader else _NO_READER
        return reason if len(left) == len(roots) else f"{len(left)} of its {len(roots)} outputs stay: {reason}"

    def _collect(self) -> dict[int, list[_Place]]:
        """Where each class occurs, in execution order."""
        places: dict[int, list[_Place]] = {}
        for name, layer in self._coupling.layers.items():
            self._roots[name] = self._coupling.space.find(layer.outputs).numpy()
            for role, roots in self._axes(name, layer):
                for root, positions in _split(roots).items():
                    place = _Place(role, name, layer.axis, tuple(positions.tolist()))
                    places.setdefault(root, []).append(place)
        return places

    def _axes(self, name: str, layer: LabelledLayer) -> list[tuple[str, np.ndarray]]:
        """Roles of a layer with the roots along its axes."""
        outputs = [("producers" if layer.kind == "dense" else "followers", self._roots[name])]
        if layer.inputs is None:
            return outputs
        runs = layer.kind == "dense" and name in self._coupling.calls
        return [("consumers" if runs else "readers", self._coupling.space.find(layer.inputs).numpy()), *outputs]

    def _group(self) -> tuple[ChannelGroup, ...]:
        alike: dict[tuple[tuple[str, str, int, int], ...], list[int]] = {}
        for root, places in self._places.items():
            roles = {place.role for place in places}
            if root != FIXED_ZERO and root not in self._pinned and {"producers", "consumers"} <= roles:
                signature = tuple((place.role, place.layer, place.axis, len(place.positions)) for place in places)
                alike.setdefault(signature, []).append(root)
        found: list[ChannelGroup] = []
        taken: dict[str, int] = {}
        order = {name: number for number, name in enumerate(self._coupling.layers)}
        for roots in sorted(alike.values(), key=lambda roots: self._key(roots, order)):
            if len(roots) < 2:
                continue
            group = self._build(roots, taken)
            self._grouped.update(roots)
            found.append(group)
        return tuple(found)

    def _key(self, roots: Sequence[int], order: Mapping[str, int]) -> tuple[int, int]:
        first = next(place for place in self._places[roots[0]] if place.role == "producers")
        return order[first.layer], first.positions[0]

    def _build(self, roots: list[int], taken: dict[str, int]) -> ChannelGroup:
        parts: dict[str, list[LayerSlice]] = {"producers": [], "followers": [], "consumers": [], "readers": []}
        first = next(number for number, place in enumerate(self._places[roots[0]]) if place.role == "producers")
        roots = sorted(roots, key=lambda root: self._places[root][first].positions)
        for number, place in enumerate(self._places[roots[0]]):
            index = np.array([self._places[root][number].positions for root in roots], dtype=np.int64)
            parts[place.role].append(LayerSlice(layer=place.layer, index=index, axis=place.axis))
        name = parts["producers"][0].layer
        taken[name] = taken.get(name, 0) + 1
        return ChannelGroup(
            name=name if taken[name] == 1 else f"{name}#{taken[name]}",
            num_channels=len(roots),
            **{role: tuple(slices) for role, slices in parts.items()},
        )


def _split(roots: np.ndarray) -> dict[int, np.ndarray]:
    """Positions of each root, sorted."""
    order = np.argsort(roots, kind="stable")
    values, starts = np.unique(roots[order], return_index=True)
    return dict(zip(values.tolist(), np.split(order, starts[1:]), strict=True))


def _has_matrix(module: nn.Module) -> bool:
    """Convolutions and linear layers of every kind, and what else holds a weight matrix of its own."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim > 1


def shared_layers(model: nn.Module) -> frozenset[str]:
    """Names of the layers that hold a parameter of another layer."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    return frozenset(name for names in owners.values() if len(names) > 1 for name in names)
