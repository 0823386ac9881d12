"""What each operator does to channel labels: the rules of :mod:`entprune.coupling`.

Axes: n images, c channels, h and w pixels, m outputs, d inputs, g groups of a grouped convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from entprune.labels import FIXED_ZERO, LabelSpace, along_axis, compact, core, spread, varying_axes
from entprune.layers import CHANNEL_NORMS
from entprune.models.resnet import PaddedShortcut


@dataclass(slots=True, eq=False)
class LabelledLayer:
    """Labels along the axes of one layer, or of one tensor that is used outside a layer.

    Attributes:
        kind: "dense" (its inputs are read through a full matrix), "channelwise" (each output depends on the inputs of
            its own label), "shortcut" (moves channels), or "tensor".
        inputs: (d,) labels of what it reads, None where its inputs follow from its outputs.
        outputs: (m,) labels of what it writes, or of a tensor's positions along `axis`.
        axis: of a tensor.
    """

    kind: str
    inputs: Tensor | None
    outputs: Tensor
    axis: int = 0


class LabelledRun(Protocol):
    """What a rule may ask of the network that is running."""

    space: LabelSpace
    layers: dict[str, LabelledLayer]

    def get(self, value: Tensor) -> Tensor | None:
        """Compact labels of a tensor, None for a constant."""

    def set(self, value: Any, labels: Tensor) -> None:
        """Labels of a result."""

    def set_pinned(self, value: Any, reason: str) -> None:
        """A result whose channels must stay."""

    def is_state(self, value: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer of the network."""

    def channels(self, value: Tensor, axis: int) -> Tensor | None:
        """(size,) labels along one axis of a tensor, None if they vary along another or there are none."""

    def axis_labels(self, tensor: Tensor, axis: int) -> Tensor:
        """(size,) labels of a parameter's axis, the same at every use."""

    def owners(self, tensor: Any, module_types: tuple[type[nn.Module], ...]) -> list[str]:
        """Names of the layers of these types whose `weight` a tensor is."""

    def module(self) -> tuple[str, nn.Module]:
        """The module that is running."""

    def where(self) -> str:
        """The module that is running, in words."""


@dataclass(slots=True, eq=False)
class Call:
    """One executed operator."""

    run: LabelledRun
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def tensors(self) -> list[tuple[Tensor, Tensor | None]]:
        """Tensor arguments with their labels, None for constants."""
        return [(value, self.run.get(value)) for value in tensors_in((self.args, self.kwargs))]

    @property
    def name(self) -> str:
        """Name of the operator; an in-place one has that of its twin."""
        return str(self.func.overloadpacket.__name__).rstrip("_")

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def refuse(self, reason: str | None = None) -> None:
        """Pin everything that the operator reads and writes."""
        reason = reason or f"{self.name} in {self.run.where()} mixes channels in a way that cannot be sliced"
        for value in tensors_in((self.args, self.kwargs)):
            if not self.run.is_state(value):
                labels = self.run.get(value)
                if labels is not None:
                    self.run.space.pin(core(labels), reason)
        self.run.set_pinned(self.out, reason)


def unknown(call: Call) -> None:
    """An operator without a rule: everything that it touches must stay."""
    call.refuse()


def _ignore(call: Call) -> None:
    """The result is no function of the values: sizes, flags, scalars."""


def _same(call: Call) -> None:
    """The result has the labels of the first tensor: identities, and new tensors like another one."""
    value, labels = call.tensors()[0]
    if labels is not None and isinstance(call.out, Tensor) and call.out.shape == value.shape:
        call.run.set(call.out, labels)


def pointwise(call: Call) -> None:
    """Unite what comes together; a broadcast operand is tied to all positions, and must stay."""
    space, outs = call.run.space, [value for value in tree_leaves(call.out) if isinstance(value, Tensor)]
    operands = call.tensors()
    shape = np.broadcast_shapes(*(tuple(value.shape) for value, _ in operands))  # torch's own imports a second's worth
    wide = [_lift(labels, len(shape)) for _, labels in operands if labels is not None]
    varying = {axis for labels in wide for axis in varying_axes(labels)}
    joined: Tensor | None = None
    reason = f"{call.name} in {call.run.where()} spreads it over several channels"
    for value, labels in operands:
        sizes = [1] * (len(shape) - value.ndim) + list(value.shape)
        spreads = any(sizes[axis] == 1 and shape[axis] > 1 for axis in varying)
        if labels is None:
            if any(sizes[axis] > 1 for axis in varying):
                for other in wide:
                    space.pin(core(other), f"a constant of fixed size acts on its channels in {call.run.where()}")
            continue
        lifted = core(_lift(labels, len(shape)))
        if spreads:
            space.pin(lifted, reason)
        elif joined is None:
            joined = lifted
        else:
            space.unite(joined, lifted)
            joined = torch.where(joined > FIXED_ZERO, joined, lifted)  # broadcast; zeros give way
    for out in outs:
        if joined is None or tuple(out.shape) != tuple(shape):
            call.run.set_pinned(out, reason)
        else:
            call.run.set(out, joined.expand(out.shape))


def _lift(labels: Tensor, ndim: int) -> Tensor:
    return labels.reshape([1] * (ndim - labels.ndim) + list(labels.shape)) if labels.ndim < ndim else labels


def _move(call: Call) -> None:
    """Views, permutations, concatenations: the operator itself moves the labels."""
    moved = _moved(call)
    for out, labels in zip(tensors_in(call.out), tensors_in(moved), strict=True):
        call.run.set(out, _straighten(call, labels))


def _moved(call: Call) -> Any:
    def replace(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(replace(part) for part in value)
        labels = call.run.get(value) if isinstance(value, Tensor) else None
        if labels is None and isinstance(value, Tensor) and value.is_floating_point():
            return torch.full(value.shape, FIXED_ZERO)
        return value if labels is None else labels

    args, kwargs = replace(call.args), {name: replace(value) for name, value in call.kwargs.items()}
    if call.name in _VIEWS:
        return torch.ops.aten.reshape(args[0], list(call.out.shape))
    return call.func(*args, **{key: value for key, value in kwargs.items() if key not in ("dtype", "memory_format")})


_VIEWS = frozenset({"view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "reshape"})


def _straighten(call: Call, labels: Tensor) -> Tensor:
    """Labels may vary along one axis only: where a view tears an axis apart, unite what lies at equal positions."""
    labels = compact(call.run.space, labels)
    axes = varying_axes(labels)
    for axis in axes[:-1]:
        call.run.space.unite(labels.narrow(axis, 0, 1), core(labels))
        labels = compact(call.run.space, labels)
    return labels


def _chunk(call: Call) -> None:
    """Equal parts stay equal only if the same positions go from each of them; unequal ones cannot be kept."""
    value, labels = call.tensors()[0]
    if labels is None:
        return
    parts, moved = tensors_in(call.out), tensors_in(_moved(call))
    torn = any(parts[0].shape[axis] != value.shape[axis] for axis in varying_axes(labels))
    if torn and len({part.shape for part in parts}) > 1:
        call.refuse(f"{call.name} in {call.run.where()} cuts its channels into unequal parts")
        return
    for part in moved[1:] if torn else ():
        call.run.space.unite(moved[0], part)
    for out, part in zip(parts, moved, strict=True):
        call.run.set(out, part)


def _unbind(call: Call) -> None:
    """Parts along another axis move labels; single channels are fixed positions."""
    value, labels = call.tensors()[0]
    if labels is None or int(call.argument(1, "dim", 0)) % value.ndim in varying_axes(labels):
        call.refuse(f"{call.name} in {call.run.where()} takes some channels at fixed positions")
    else:
        _move(call)


def _cut(call: Call) -> None:
    """A slice along another axis moves labels; one of channels must be an equal part, position for position."""
    value, labels = call.tensors()[0]
    if labels is None or not isinstance(call.out, Tensor):
        return
    axis = int(call.argument(1, "dim", 0)) % value.ndim
    if axis not in varying_axes(labels) or call.out.shape == value.shape:
        _move(call)
        return
    length, size = call.out.shape[axis] if call.out.ndim == value.ndim else 1, value.shape[axis]
    start = int(call.argument(2, "start", 0) or 0) % size
    if call.name == "select" or length < 2 or size % length or start % length or call.argument(4, "step", 1) != 1:
        call.refuse(f"{call.name} in {call.run.where()} takes some channels at fixed positions")
        return
    first = labels.narrow(axis, 0, length)
    for begin in range(length, size, length):
        call.run.space.unite(first, labels.narrow(axis, begin, length))
    call.run.set(call.out, first)


def _pad(call: Call) -> None:
    """Zeros around pixels change no labels; zeros beside channels are places where no channel is."""
    value, labels = call.tensors()[0]
    if labels is None:
        return
    sides = list(call.argument(1, "pad"))
    touched = {value.ndim - 1 - number // 2 for number, width in enumerate(sides) if width}
    varying = set(varying_axes(labels)) | ({1} if value.ndim == 4 else {value.ndim - 1})
    is_movable = isinstance(call.run.module()[1], PaddedShortcut)
    if not touched & varying:
        call.run.set(call.out, core(labels).expand(call.out.shape))
        return
    if min(sides) < 0:
        call.refuse(f"{call.name} in {call.run.where()} crops channels")
        return
    padded = torch.nn.functional.pad(labels, sides, value=FIXED_ZERO)
    channel = along_axis(compact(call.run.space, padded), 1)
    if is_movable and channel is not None:  # the shortcut's zeros go with whatever they are added to
        zeros = channel == FIXED_ZERO
        channel[zeros] = call.run.space.fresh(int(zeros.sum()))
        padded = spread(channel, 1, call.out.shape)
    call.run.set(call.out, padded)


def _reduce(call: Call) -> None:
    """Means and the like over pixels keep the labels; over channels they mix them."""
    value, labels = call.tensors()[0]
    if labels is None:
        return
    dims = call.argument(1, "dim")
    if isinstance(dims, Tensor):  # the larger of two tensors
        pointwise(call)
        return
    if not isinstance(dims, (int, list, tuple)) or isinstance(dims, bool):
        dims = range(value.ndim)
    axes = {int(dim) % value.ndim for dim in ([dims] if isinstance(dims, int) else dims)} or set(range(value.ndim))
    if axes & set(varying_axes(labels)):
        call.refuse(f"{call.name} in {call.run.where()} reduces over channels")
        return
    for out in tensors_in(call.out):
        small = labels
        for axis in sorted(axes, reverse=True):
            small = small.narrow(axis, 0, 1) if out.ndim == value.ndim else small.select(axis, 0)
        call.run.set(out, small.expand(out.shape))


def _normalise_along(call: Call) -> None:
    """Softmax, cumulative sums, sorting: along pixels nothing changes, along channels they are mixed."""
    value, labels = call.tensors()[0]
    if labels is None:
        return
    if int(call.argument(1, "dim", -1)) % value.ndim in varying_axes(labels):
        call.refuse(f"{call.name} in {call.run.where()} mixes channels")
        return
    for out in tensors_in(call.out):
        call.run.set(out, labels)


def _spatial(call: Call) -> None:
    """Pooling and interpolation: pixels come and go, channels stay."""
    value, labels = call.tensors()[0]
    if labels is None:
        return
    channel = along_axis(labels, 1) if value.ndim >= 3 else None
    if channel is None:
        call.refuse(f"{call.name} in {call.run.where()} runs over channels")
        return
    for out in tensors_in(call.out):
        call.run.set(out, spread(channel, 1, out.shape))


def _convolution(call: Call) -> None:
    value, weight = call.args[0], call.argument(1, "weight")
    names = call.run.owners(weight, (nn.Conv2d,))
    channel = call.run.channels(value, 1)
    if not names or channel is None or value.ndim != 4:
        call.refuse(f"{call.run.where()} reads it in a way that is not understood ({call.name})")
        return
    groups = int(call.argument(6, "groups", 1))
    outputs = call.run.axis_labels(weight, 0)
    if groups == 1:
        _dense(call, names, channel, outputs)
    else:  # whole groups go together: what a group reads and what it writes
        rows = channel.reshape(groups, -1), outputs.reshape(groups, -1)
        call.run.space.unite(rows[0], rows[0][:, :1])
        call.run.space.unite(rows[1], rows[0][:, :1])
        for name in names:
            call.run.layers[name] = LabelledLayer(kind="channelwise", inputs=None, outputs=outputs)
    call.run.set(call.out, spread(outputs, 1, call.out.shape))


def _linear(call: Call) -> None:
    value, weight = call.args[0], call.argument(1, "weight")
    names = call.run.owners(weight, (nn.Linear,))
    channel = call.run.channels(value, -1)
    if not names or channel is None:
        call.refuse(f"{call.run.where()} reads it in a way that is not understood ({call.name})")
        return
    outputs = call.run.axis_labels(weight, 0)
    _dense(call, names, channel, outputs)
    call.run.set(call.out, spread(outputs, call.out.ndim - 1, call.out.shape))


def _dense(call: Call, names: Sequence[str], channel: Tensor, outputs: Tensor) -> None:
    inputs = call.run.axis_labels(call.argument(1, "weight"), 1)
    call.run.space.unite(channel, inputs)
    call.run.space.pin(inputs[channel <= FIXED_ZERO], "the layer that reads it reads zeros beside it")
    for name in names:
        call.run.layers[name] = LabelledLayer(kind="dense", inputs=inputs, outputs=outputs)


def _channel_norm(call: Call) -> None:
    """Normalisation of each channel by itself: BatchNorm, InstanceNorm."""
    value = call.args[0]
    channel = call.run.channels(value, 1)
    name, module = call.run.module()
    if channel is None or not isinstance(module, CHANNEL_NORMS):
        call.refuse(f"{call.name} in {call.run.where()} is not a layer that can be sliced")
        return
    _follow(call, name, module, channel)
    call.run.set(tensors_in(call.out)[0], spread(channel, 1, call.out.shape))


def _follow(call: Call, name: str, module: nn.Module, channel: Tensor) -> None:
    """A layer with one entry per channel."""
    own = [tensor for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)) if tensor.ndim]
    for tensor in own:
        call.run.space.unite(call.run.axis_labels(tensor, 0), channel)
    call.run.layers[name] = LabelledLayer(
        kind="channelwise", inputs=None, outputs=call.run.axis_labels(own[0], 0) if own else channel
    )


def _layer_norm(call: Call) -> None:
    """Normalisation over the last axis: channels are removed from the sums as well."""
    value, labels = call.args[0], call.run.get(call.args[0])
    name, module = call.run.module()
    sizes = list(call.argument(1, "normalized_shape"))
    channel = along_axis(labels, -1) if labels is not None and len(sizes) == 1 else None
    if channel is None or not isinstance(module, nn.LayerNorm):
        call.refuse(
            f"{call.name} in {call.run.where()} normalises over channels and is not a LayerNorm over the last axis"
        )
        return
    _follow(call, name, module, channel)
    call.run.set(call.out, spread(channel, value.ndim - 1, call.out.shape))


def _group_norm(call: Call) -> None:
    """Equal numbers from each group where groups are wide, whole groups where there are many."""
    channel = call.run.channels(call.args[0], 1)
    name, module = call.run.module()
    if channel is None or not isinstance(module, nn.GroupNorm):
        call.refuse(f"{call.name} in {call.run.where()} is not a layer that can be sliced")
        return
    rows = channel.reshape(module.num_groups, -1)
    is_wide = rows.shape[1] >= rows.shape[0]
    call.run.space.unite(rows, rows[:1] if is_wide else rows[:, :1])
    _follow(call, name, module, channel)
    call.run.set(call.out, spread(channel, 1, call.out.shape))


def _prelu(call: Call) -> None:
    name, module = call.run.module()
    channel = call.run.channels(call.args[0], 1)
    if not isinstance(module, nn.PReLU) or channel is None:
        call.refuse(f"{call.name} in {call.run.where()} is not a layer that can be sliced")
        return
    if module.num_parameters > 1:
        _follow(call, name, module, channel)
    call.run.set(call.out, spread(channel, 1, call.out.shape))


def _pixel_shuffle(call: Call) -> None:
    """Each block of r * r channels becomes the pixels of one."""
    channel = call.run.channels(call.args[0], 1)
    if channel is None or call.args[0].ndim != 4:
        call.refuse()
        return
    blocks = channel.reshape(call.out.shape[1], -1)
    call.run.space.unite(blocks, blocks[:, :1])
    call.run.set(call.out, spread(blocks[:, 0], 1, call.out.shape))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested arguments or results."""
    return [part for part in tree_leaves(value) if isinstance(part, Tensor)]


# Element-wise operators that carry no such tag in torch.
_ELEMENTWISE = (
    "hardswish", "hardtanh", "hardsigmoid", "relu6", "leaky_relu", "elu", "celu", "selu", "silu", "gelu", "mish",
    "rrelu", "relu", "sigmoid", "tanh", "softplus", "threshold", "copy", "add", "sub", "mul", "div",
)  # fmt: skip

RULES: dict[str, Callable[[Call], None]] = {
    **{name + ending: pointwise for name in _ELEMENTWISE for ending in ("", "_")},
    **dict.fromkeys(("conv2d", "convolution", "_convolution"), _convolution),
    **dict.fromkeys(("conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), unknown),
    "linear": _linear,
    **dict.fromkeys(("batch_norm", "instance_norm"), _channel_norm),
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "prelu": _prelu,
    **dict.fromkeys(("pixel_shuffle",), _pixel_shuffle),
    **dict.fromkeys(
        (
            "max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool2d",
            "adaptive_max_pool2d", "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "max_pool3d", "avg_pool3d",
            "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d",
        ),
        _spatial,
    ),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "norm", "linalg_vector_norm", "var_mean"), _reduce
    ),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "sort", "topk"), _normalise_along),
    "unbind": _unbind,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _chunk),
    **dict.fromkeys(("slice", "select", "narrow"), _cut),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(
        (
            "view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose",
            "t", "movedim", "cat", "concat", "concatenate", "stack", "expand", "expand_as", "repeat", "flip",
            "swapaxes", "swapdims",
        ),
        _move,
    ),
    **dict.fromkeys(
        (
            "contiguous", "clone", "detach", "detach_", "alias", "to", "_to_copy", "dropout", "dropout_",
            "feature_dropout", "feature_dropout_", "alpha_dropout", "alpha_dropout_", "empty_like", "zeros_like",
            "ones_like", "full_like", "rand_like", "randn_like", "lift_fresh", "native_dropout",
        ),
        _same,
    ),
    **dict.fromkeys(
        (
            "_local_scalar_dense", "item", "is_nonzero", "equal", "sym_size", "new_empty", "new_zeros", "new_ones",
            "new_full", "bernoulli_", "uniform_", "normal_",
        ),
        _ignore,
    ),
}  # fmt: skip
