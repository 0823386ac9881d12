"""In which order a network's activations lie in memory while it trains.

Axes: n samples, c channels, h and w pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from entprune.evaluation import locate_model

# In channels_last torch 2.13's batch normalisation takes its gradient 2 to 7 times as long as channel by channel where
# the number of channels is small and no multiple of this.
_WHOLE_VECTOR = 16
_FEW_CHANNELS = 64


def fastest_format(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Return channels_last for networks with convolutions, which then run faster on CPUs and GPUs.

    A network whose code counts on the ordinary order (`x.view(n, -1)` behind a convolution) gets that: a copy is tried
    on the images.

    Args:
        model: network on the images' device.
        images: (n, c, h, w), at least two.
    """
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return torch.contiguous_format
    trial = lay_out(copy.deepcopy(model), torch.channels_last)
    try:
        with torch.no_grad():
            trial(images.contiguous(memory_format=torch.channels_last))
    except RuntimeError:  # what a view of another order raises
        return torch.contiguous_format
    return torch.channels_last


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Put the network's parameters of rank 4 into a memory format, in place, and return it."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return model


@contextmanager
def thin_norms_by_channel(model: nn.Module, memory_format: torch.memory_format) -> Iterator[None]:
    """Let batch normalisations of few channels read and write contiguous tensors while a network trains on a CPU.

    The rest stays in channels_last. Values change by rounding alone.

    Args:
        model: network on the device where it trains; it gets hooks, which go at the end.
        memory_format: of its activations.
    """
    is_slow_here = memory_format == torch.channels_last and locate_model(model).type == "cpu"
    with ExitStack() as stack:
        for module in filter(_is_thin_norm, model.modules() if is_slow_here else ()):
            stack.callback(module.register_forward_pre_hook(_enter).remove)
            stack.callback(module.register_forward_hook(_leave).remove)
        yield


def _is_thin_norm(module: nn.Module) -> bool:
    if not isinstance(module, nn.BatchNorm2d):
        return False
    return module.num_features < _FEW_CHANNELS and module.num_features % _WHOLE_VECTOR != 0


class _Reordered(torch.autograd.Function):
    """A tensor in one memory format, its gradient in another (torch's own conversion leaves the gradient as it is)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, there: torch.memory_format, back: torch.memory_format) -> Tensor:
        ctx.back = back
        return values.clone(memory_format=there)  # never the tensor itself: the next layer may work in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.contiguous(memory_format=ctx.back), None, None


def _reordered(values: Tensor, there: torch.memory_format, back: torch.memory_format) -> Tensor:
    result: Tensor = _Reordered.apply(values, there, back)
    return result


def _enter(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(_reordered(values, torch.contiguous_format, torch.channels_last) for values in given)  # at most one


def _leave(_: nn.Module, __: tuple[Tensor, ...], result: Tensor) -> Tensor:
    return _reordered(result, torch.channels_last, torch.contiguous_format)
