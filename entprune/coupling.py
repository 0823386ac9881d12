"""Runs a network on channel labels instead of numbers.

Every operator that moves data moves the labels of the data in the same way; element-wise operators unite the labels
that they bring together; dense layers end the labels of what they read and start new ones; an operator that mixes
channels in any other way pins them. What is left is who must be kept or removed together, found from what the network
really does, whatever modules its code is made of.

Axes: n images, c channels, h and w pixels, m outputs, d inputs, g groups of a grouped convolution.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from entprune.errors import ModelError
from entprune.label_rules import RULES, Call, LabelledLayer, pointwise, tensors_in, unknown
from entprune.labels import LabelSpace, along_axis, compact, core, varying_axes
from entprune.models.resnet import PaddedShortcut

_MAX_RAW_ELEMENTS = 2_000_000  # of a tensor that is used outside its layer; larger ones are pinned whole


@dataclass(slots=True, eq=False)
class Coupling:
    """What the run found out.

    Attributes:
        layers: by name, in the order of their first call.
        calls: names of the modules that were called in eval mode, in that order, with the number of their calls.
        space: the labels.
    """

    layers: dict[str, LabelledLayer] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    space: LabelSpace = field(default_factory=LabelSpace)


def couple(model: nn.Module, example_inputs: tuple[Tensor, ...]) -> Coupling:
    """Find which channels are tied together.

    A network with modules that are called in training alone (auxiliary heads) is run in that mode, too: it stays
    trainable.

    Args:
        model: network; it is not changed.
        example_inputs: arguments of its forward pass, two images or more, so that no axis of images is mistaken.

    Raises:
        ModelError: the network does not take such inputs.
    """
    model = copy.deepcopy(model).eval()
    coupling = Coupling()
    run = _LabelRun(model, coupling)
    run.execute(example_inputs)
    coupling.calls = dict(run.calls)
    leaves = {name for name, module in model.named_modules() if not list(module.children())}
    if any(name not in run.calls and list(model.get_submodule(name).parameters()) for name in leaves):
        model.train()
        run.execute(example_inputs, required=False)
    run.finish()
    return coupling


class _LabelRun(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One network's labels while it runs."""

    def __init__(self, model: nn.Module, coupling: Coupling) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, int] = {}
        self.space = coupling.space
        self.layers = coupling.layers
        self._model = model
        self._stack: list[str] = []
        self._labels: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._axes: dict[tuple[int, int], Tensor] = {}
        self._raw: dict[str, Tensor] = {}
        self._owners: dict[int, list[str]] = {}
        for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
            self._owners.setdefault(id(tensor), []).append(name)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch wraps the dispatch for its compiler, whose import takes seconds: nothing compiles in here."""
        return False

    # --- running ------------------------------------------------------------------------------------------------------

    def execute(self, inputs: tuple[Tensor, ...], *, required: bool = True) -> None:
        """Run the network once; what it reads and what it answers stays."""
        inputs = tuple(value.clone() for value in inputs)
        for value in inputs:
            self._labels[value] = compact(self.space, self._pinned(value.shape, "reads the network's input"))
        self.calls.clear()
        try:
            with self._watched(), torch.inference_mode(), self:
                outputs = self._model(*inputs)
        except Exception as error:
            if not required:
                return
            shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
            text = " ".join(str(error).split())[:200] or type(error).__name__
            raise ModelError(
                f"expected a network that takes images of shape {shapes}, got {type(self._model).__name__}: {text}; "
                "check the model and the input shape."
            ) from error
        for value in tree_leaves(outputs):
            if isinstance(value, Tensor) and value in self._labels:
                self.space.pin(core(self._labels[value]), "its outputs are the network's outputs")

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Keep track of the module that is running."""
        handles = []
        for name, module in self._model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name)))
            handles.append(module.register_forward_hook(self._leave(name), always_call=True))
        try:
            yield
        finally:
            self._stack.clear()
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self._stack.append(name)
            self.calls[name] = self.calls.get(name, 0) + 1

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Sequence[Any], output: Any) -> None:
            self._stack.pop()
            if isinstance(module, PaddedShortcut) and isinstance(output, Tensor):
                self._end_shortcut(name, inputs[0], output)

        return hook

    def _end_shortcut(self, name: str, inputs: Tensor, output: Tensor) -> None:
        read, written = self.channels(inputs, 1), self.channels(output, 1)
        if read is not None and written is not None:
            self.layers[name] = LabelledLayer(kind="shortcut", inputs=read, outputs=written)

    def finish(self) -> None:
        """Labels of tensors that were used outside a layer: they can be cut along one axis only."""
        for name, labels in self._raw.items():
            compacted = compact(self.space, labels)
            axes = varying_axes(compacted)
            if len(axes) > 1:
                self.space.pin(core(compacted), f"{name} varies along several axes")
            elif axes:
                outputs = along_axis(compacted, axes[0])
                assert outputs is not None  # noqa: S101 -- one varying axis
                self.layers[name] = LabelledLayer(kind="tensor", inputs=None, outputs=outputs, axis=axes[0])

    # --- operators ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operator and carry the labels of its tensors over to its result."""
        kwargs = dict(kwargs or {})
        rule = RULES.get(func.overloadpacket.__name__)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        if rule is None:
            with self:
                composed = func.decompose(*args, **kwargs)
            if composed is not NotImplemented:
                return composed
            rule = unknown
        call = Call(run=self, func=func, args=args, kwargs=kwargs, out=func(*args, **kwargs))
        if any(self._is_known(value) for value in tensors_in((args, kwargs))):
            rule(call)
        return call.out

    def _is_known(self, value: Tensor) -> bool:
        return value in self._labels or id(value) in self._owners

    # --- labels -------------------------------------------------------------------------------------------------------

    def where(self) -> str:
        """The module that is running, in words."""
        names = [name for name in self._stack if name]
        return f"'{names[-1]}'" if names else "the network's forward"

    def module(self) -> tuple[str, nn.Module]:
        """The module that is running."""
        name = self._stack[-1] if self._stack else ""
        return name, self._model.get_submodule(name)

    def is_state(self, value: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer of the network."""
        return id(value) in self._owners

    def get(self, value: Tensor) -> Tensor | None:
        """Compact labels of a tensor, None for a constant."""
        known: Tensor | None = self._labels.get(value)  # type: ignore[no-untyped-call]
        if known is not None:
            return compact(self.space, known)
        names = self._owners.get(id(value))
        if names is None or value.ndim == 0:
            return None
        if names[0] not in self._raw:
            if value.numel() > _MAX_RAW_ELEMENTS:
                self._raw[names[0]] = self._pinned(value.shape, f"{names[0]} is used outside its layer")
            else:
                self._raw[names[0]] = self.space.fresh(*value.shape)
        return compact(self.space, self._raw[names[0]])

    def set(self, value: Any, labels: Tensor) -> None:
        """Labels of a result."""
        if isinstance(value, Tensor) and value.ndim:
            self._labels[value] = compact(self.space, labels)

    def set_pinned(self, value: Any, reason: str) -> None:
        """A result whose channels must stay."""
        for part in tree_leaves(value):
            if isinstance(part, Tensor):
                self.set(part, self._pinned(part.shape, reason))

    def _pinned(self, shape: Sequence[int], reason: str) -> Tensor:
        label = self.space.fresh(1)
        self.space.pin(label, reason)
        return label.reshape([1] * len(shape)).expand(list(shape))

    def channels(self, value: Tensor, axis: int) -> Tensor | None:
        """(size,) labels along one axis of a tensor, None if they vary along another or there are none."""
        labels = self.get(value)
        return None if labels is None else along_axis(labels, axis)

    def axis_labels(self, tensor: Tensor, axis: int) -> Tensor:
        """(size,) labels of a parameter's axis, the same at every use."""
        key = (id(tensor), axis)
        if key not in self._axes:
            self._axes[key] = self.space.fresh(tensor.shape[axis])
        return self._axes[key]

    def owners(self, tensor: Any, module_types: tuple[type[nn.Module], ...]) -> list[str]:
        """Names of the layers of these types whose `weight` a tensor is."""
        names = self._owners.get(id(tensor), []) if isinstance(tensor, Tensor) else []
        layers = [name.rpartition(".")[0] for name in names if name.rpartition(".")[2] == "weight"]
        return [name for name in layers if isinstance(self._model.get_submodule(name), module_types)]
