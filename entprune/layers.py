"""What pruning can narrow: the layer types it knows, how each is cut, which sizes it has, and how it is made empty.

Axes: c channels, m outputs, d inputs, g groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entprune.errors import ModelError
from entprune.models.resnet import PaddedShortcut

CHANNEL_NORMS = (nn.modules.batchnorm._NormBase,)  # noqa: SLF001 -- BatchNorm and InstanceNorm of every dimension
_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")

#: Sizes of each known layer type; a subclass counts as its base.
_SIZES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Conv2d, ("in_channels", "out_channels", "groups")),
    (nn.Linear, ("in_features", "out_features")),
    *((kind, ("num_features",)) for kind in CHANNEL_NORMS),
    (nn.LayerNorm, ("normalized_shape",)),
    (nn.GroupNorm, ("num_channels", "num_groups")),
    (nn.PReLU, ("num_parameters",)),
    (PaddedShortcut, ("in_channels", "out_channels", "source")),
)


@dataclass(slots=True)
class LayerSelection:
    """Positions of one layer that stay along its input and output axes; None means all.

    Attributes:
        inputs, outputs: sorted positions.
        axis: of a tensor outside a layer, along which `outputs` are meant.
    """

    inputs: np.ndarray | None = None
    outputs: np.ndarray | None = None
    axis: int = 0


def is_dense(layer: nn.Module) -> bool:
    """Whether every output reads every input, so that the layer is one regression."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)


def input_width(layer: nn.Module) -> int:
    """Length of a layer's input axis: channels of a convolution or BatchNorm, features of a linear layer."""
    return _first_size(layer, ("in_channels", "in_features", "num_features", "num_channels", "num_parameters"))


def output_width(layer: nn.Module) -> int:
    """Length of a layer's output axis."""
    return _first_size(layer, ("out_channels", "out_features", "num_features", "num_channels", "num_parameters"))


def _first_size(layer: nn.Module, names: tuple[str, ...]) -> int:
    if isinstance(layer, nn.LayerNorm):
        return int(layer.normalized_shape[-1])
    sizes: list[Any] = [getattr(layer, name) for name in names if hasattr(layer, name)]
    return int(sizes[0])


def find_part(model: nn.Module, name: str) -> nn.Module | Tensor:
    """A layer, or a parameter or buffer, by its dotted name."""
    owner, _, last = name.rpartition(".")
    part: nn.Module | Tensor = getattr(model.get_submodule(owner), last)
    return part


def part_width(part: nn.Module | Tensor, axis: int = 0) -> int:
    """Length of the output axis of a layer, or of one axis of a tensor."""
    return int(part.shape[axis]) if isinstance(part, Tensor) else output_width(part)


# --- cutting ----------------------------------------------------------------------------------------------------------


def narrow_layers(model: nn.Module, selections: Mapping[str, LayerSelection]) -> None:
    """Keep only the selected positions of layers and tensors, in place; what layers shared they share afterwards.

    Raises:
        ModelError: a layer that is touched cannot be sliced.
    """
    before = dict(model.named_parameters(remove_duplicate=False))
    for name, selection in selections.items():
        part = find_part(model, name)
        if isinstance(part, Tensor):
            _replace(model, name, part, selection)
        else:
            narrow_layer(part, selection, name)
    _share_again(model, before)


def _replace(model: nn.Module, name: str, tensor: Tensor, selection: LayerSelection) -> None:
    if selection.outputs is None:
        return
    owner, _, last = name.rpartition(".")
    kept = tensor.detach().index_select(selection.axis, torch.from_numpy(selection.outputs).to(tensor.device))
    setattr(model.get_submodule(owner), last, _like(kept, tensor))


def _share_again(model: nn.Module, before: Mapping[str, nn.Parameter]) -> None:
    first: dict[int, nn.Parameter] = {}
    for name, old in before.items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        new = first.setdefault(id(old), getattr(module, last))
        if getattr(module, last) is not new:
            setattr(module, last, new)


def narrow_layer(layer: nn.Module, selection: LayerSelection, name: str) -> None:
    """Keep only the selected inputs and outputs of one layer, in place.

    Raises:
        ModelError: the layer type cannot be sliced.
    """
    if isinstance(layer, PaddedShortcut):
        layer.narrow(selection.inputs, selection.outputs)
    elif isinstance(layer, (nn.Conv2d, nn.Linear)):
        _narrow_dense(layer, selection)
    elif isinstance(layer, (*CHANNEL_NORMS, nn.LayerNorm, nn.GroupNorm, nn.PReLU)):
        _narrow_channelwise(layer, selection.outputs)
    else:
        raise ModelError(
            f"layer {name!r}: expected a convolution, linear layer or normalisation, got {type(layer).__name__}."
        )


def _narrow_dense(layer: nn.Conv2d | nn.Linear, selection: LayerSelection) -> None:
    weight = layer.weight.detach()
    per_group = weight.shape[0] // layer.groups if isinstance(layer, nn.Conv2d) else 0
    if selection.outputs is not None:
        weight = weight[torch.from_numpy(selection.outputs)]
        if layer.bias is not None:
            layer.bias = _like(layer.bias.detach()[torch.from_numpy(selection.outputs)], layer.bias)
    if selection.inputs is not None:
        weight = weight[:, torch.from_numpy(selection.inputs)]
    layer.weight = _like(weight, layer.weight)
    if isinstance(layer, nn.Conv2d):
        layer.groups = 1 if layer.groups == 1 else weight.shape[0] // per_group
        layer.out_channels, layer.in_channels = weight.shape[0], weight.shape[1] * layer.groups
    else:
        layer.out_features, layer.in_features = weight.shape


def _narrow_channelwise(layer: nn.Module, outputs: np.ndarray | None) -> None:
    if outputs is None:
        return
    kept = torch.from_numpy(outputs)
    for name in _PER_CHANNEL:
        value = getattr(layer, name, None)
        if isinstance(value, Tensor):
            setattr(layer, name, _like(value.detach()[kept], value))
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups = kept_norm_groups(layer, outputs)
    _set_width(layer, len(outputs))


def kept_norm_groups(layer: nn.GroupNorm, outputs: np.ndarray) -> int:
    """Groups of a GroupNorm after the cut: whole groups were removed, or equal numbers from each.

    Raises:
        ModelError: neither.
    """
    counts = np.bincount(outputs // (layer.num_channels // layer.num_groups), minlength=layer.num_groups)
    left = counts[counts > 0]
    if len(set(left.tolist())) != 1:
        raise ModelError(f"expected whole groups or equal numbers of a GroupNorm's channels, got {counts.tolist()}.")
    return len(left)


def _set_width(layer: nn.Module, width: int) -> None:
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (width,)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = width
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = width
    else:
        layer.num_features = width  # type: ignore[assignment]  # of the normalisations


def _like(value: Tensor, like: Tensor) -> Tensor | nn.Parameter | Any:
    """A copy of the kind of another tensor: parameters stay parameters."""
    value = value.clone()
    return nn.Parameter(value, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else value


# --- sizes, recorded and given ----------------------------------------------------------------------------------------


def layer_sizes(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Kind and sizes of every layer that pruning can narrow, and shapes of the tensors outside such layers."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        known = _known(layer)
        if known is not None:
            kind, fields = known
            found[name] = {"type": kind} | {field: _plain(getattr(layer, field)) for field in fields}
            continue
        for own, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            full_name = f"{name}.{own}" if name else own
            found[full_name] = {"type": "tensor", "shape": list(tensor.shape)}
    return found


def _known(layer: nn.Module) -> tuple[str, tuple[str, ...]] | None:
    for kind, fields in _SIZES:
        if isinstance(layer, kind):
            return type(layer).__name__, fields
    return None


def _plain(value: Any) -> Any:
    return [int(part) for part in value] if isinstance(value, (tuple, list)) else None if value is None else int(value)


def resize(model: nn.Module, name: str, sizes: Mapping[str, Any]) -> None:
    """Give a layer or tensor other sizes; its values are left empty."""
    part = find_part(model, name) if name else model
    if isinstance(part, Tensor):
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, _like(part.detach().new_empty(sizes["shape"]), part))
        return
    for field, size in sizes.items():
        if field != "type":
            setattr(part, field, tuple(size) if isinstance(size, list) else size)
    if isinstance(part, PaddedShortcut):
        part.refresh()
    for own, shape in _shapes(part).items():
        value = getattr(part, own, None)
        if isinstance(value, Tensor):
            setattr(part, own, _like(value.detach().new_empty(shape), value))


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    if isinstance(layer, nn.Conv2d):
        per_output = layer.in_channels // layer.groups
        return {"weight": (layer.out_channels, per_output, *layer.kernel_size), "bias": (layer.out_channels,)}
    if isinstance(layer, nn.Linear):
        return {"weight": (layer.out_features, layer.in_features), "bias": (layer.out_features,)}
    if isinstance(layer, PaddedShortcut):
        return {}
    return dict.fromkeys(_PER_CHANNEL, (output_width(layer),))
