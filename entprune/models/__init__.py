"""Networks by name: built-in ones, torchvision's, or the user's own factory function."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from entprune.errors import ModelError
from entprune.models.lenet import build_digits_cnn, build_lenet
from entprune.models.resnet import PaddedShortcut, build_cifar_resnet, build_resnet18_cifar
from entprune.models.specs import call_factory, describe_unknown, is_code_spec
from entprune.models.vgg import build_vgg16_cifar

__all__ = ["MODEL_NAMES", "PaddedShortcut", "build_model", "is_code_spec"]

_SIZED_BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "lenet": build_lenet,
    "digits_cnn": build_digits_cnn,
    "vgg16_cifar": build_vgg16_cifar,
}
_POOLED_BUILDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18_cifar": build_resnet18_cifar,
    "resnet20_cifar": partial(build_cifar_resnet, 20),
    "resnet32_cifar": partial(build_cifar_resnet, 32),
    "resnet44_cifar": partial(build_cifar_resnet, 44),
    "resnet56_cifar": partial(build_cifar_resnet, 56),
}

MODEL_NAMES: tuple[str, ...] = (*_SIZED_BUILDERS, *_POOLED_BUILDERS)


def build_model(spec: str, *, num_classes: int, input_shape: tuple[int, int, int], seed: int = 0) -> nn.Module:
    """Build an untrained network; the global random state is left as it was.

    Args:
        spec: a name of :data:`MODEL_NAMES`, ``torchvision:NAME``, or ``package.module:factory``. The factory gets
            ``num_classes`` if it accepts it. The current folder is not put on the import path.
        num_classes: length of the logit vector.
        input_shape: channels, height and width of one image.
        seed: of the initial parameters.

    Raises:
        ModelError: the specification is unknown, or the network cannot take such images.
    """
    if num_classes < 1 or min(input_shape) < 1:
        raise ModelError(
            f"model '{spec}': expected num_classes >= 1 and a positive (channels, height, width), "
            f"got num_classes={num_classes} and input_shape={tuple(input_shape)}."
        )
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        if spec in MODEL_NAMES:
            return _build_builtin(spec, num_classes, input_shape)
        if spec.startswith("torchvision:"):
            return _build_torchvision(spec, num_classes, input_shape)
        if is_code_spec(spec):
            return _build_from_factory(spec, num_classes)
    raise ModelError(describe_unknown("model", spec, (*MODEL_NAMES, "torchvision:NAME", "package.module:factory")))


def _build_builtin(name: str, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    channels, height, width = input_shape
    if name in _POOLED_BUILDERS:
        return _POOLED_BUILDERS[name](num_classes, channels)
    if height != width:
        raise ModelError(f"model '{name}': expected square images, got {height}x{width}; crop them or use a ResNet.")
    return _SIZED_BUILDERS[name](num_classes, channels, height)


def _build_torchvision(spec: str, num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    import torchvision.models  # noqa: PLC0415 -- takes more than a second, in each worker too

    name = spec.removeprefix("torchvision:")
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ModelError(describe_unknown("torchvision classifier", name, known))
    if input_shape[0] != 3:
        raise ModelError(
            f"model '{spec}': expected images with 3 channels, got {input_shape[0]}; "
            "use a built-in network or a factory of your own."
        )
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    return model


def _build_from_factory(spec: str, num_classes: int) -> nn.Module:
    model, _ = call_factory(spec, ModelError, {"num_classes": num_classes})
    if not isinstance(model, nn.Module):
        raise ModelError(f"factory '{spec}': expected it to return a torch.nn.Module, got {type(model).__name__}.")
    return model
