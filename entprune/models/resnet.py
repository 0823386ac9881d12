"""Residual networks for 32x32 images: torchvision's ResNet-18 with a small stem, and He et al.'s 6n+2 family.

Axes: n samples, c channels, h and w pixels.
Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016, sections 3.3 (option A) and 4.2.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entprune.errors import ModelError


class PaddedShortcut(nn.Module):
    """Parameter-free shortcut (option A): keep every ``stride``-th pixel, then zero-pad the channels on both sides.

    Input channel ``i`` becomes output channel ``i + (out_channels - in_channels) // 2``; the other channels are zero.
    Once channels were removed on either side, ``source`` says for each output channel which input channel it takes, -1
    for zeros.
    """

    index: Tensor | None

    def __init__(self, stride: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.source: tuple[int, ...] | None = None
        self.register_buffer("index", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, ceil(h / stride), ceil(w / stride))."""
        x = x[:, :, :: self.stride, :: self.stride]
        if self.index is not None:
            return F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, self.index)  # the last channel is zero
        before = (self.out_channels - self.in_channels) // 2
        after = self.out_channels - self.in_channels - before
        return F.pad(x, (0, 0, 0, 0, before, after))

    def sources(self) -> tuple[int, ...]:
        """Input channel of each output channel, -1 for zeros."""
        if self.source is not None:
            return self.source
        before = (self.out_channels - self.in_channels) // 2
        return tuple(o - before if 0 <= o - before < self.in_channels else -1 for o in range(self.out_channels))

    def narrow(self, inputs: np.ndarray | None, outputs: np.ndarray | None) -> None:
        """Keep only some input and output channels (sorted positions; None keeps all)."""
        kept_inputs = list(range(self.in_channels)) if inputs is None else [int(channel) for channel in inputs]
        kept_outputs = list(range(self.out_channels)) if outputs is None else [int(channel) for channel in outputs]
        place = {channel: position for position, channel in enumerate(kept_inputs)} | {-1: -1}
        sources = self.sources()
        self.source = tuple(place.get(sources[channel], -1) for channel in kept_outputs)
        self.in_channels, self.out_channels = len(kept_inputs), len(kept_outputs)
        self.refresh()

    def refresh(self) -> None:
        """Derive the index from `source`; needed after that was set."""
        if self.source is None:
            self.index = None
        else:
            self.index = torch.tensor([self.in_channels if place < 0 else place for place in self.source])

    def extra_repr(self) -> str:
        """Show the attributes when the network is printed."""
        return f"stride={self.stride}, in_channels={self.in_channels}, out_channels={self.out_channels}"


class CifarBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a parameter-free shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        is_identity = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if is_identity else PaddedShortcut(stride, in_channels, out_channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, h / stride, w / stride)."""
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(residual + self.shortcut(x))  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class CifarResNet(nn.Module):
    """He et al.'s 6n+2 layers: three stages of ``blocks_per_stage`` blocks with 16, 32 and 64 channels."""

    def __init__(self, blocks_per_stage: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _make_stage(blocks_per_stage, 16, 16, stride=1)
        self.layer2 = _make_stage(blocks_per_stage, 16, 32, stride=2)
        self.layer3 = _make_stage(blocks_per_stage, 32, 64, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, c, h, w) to logits (n, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = torch.flatten(self.avgpool(x), 1)  # (n, 64, 1, 1) -> (n, 64)
        return self.linear(x)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


def _make_stage(num_blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = CifarBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(CifarBlock(out_channels, out_channels, 1) for _ in range(num_blocks - 1)))


def build_cifar_resnet(depth: int, num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Build a 6n+2 network; depth 20 has 269,722 parameters and depth 56 has 853,018 with the defaults.

    Raises:
        ModelError: ``depth`` is not 6n+2 with n >= 1.
    """
    if depth < 8 or (depth - 2) % 6 != 0:
        raise ModelError(f"cifar resnet: expected a depth of 6n+2 (20, 32, 44, 56, ...), got {depth}.")
    return CifarResNet((depth - 2) // 6, num_classes, in_channels)


def build_resnet18_cifar(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """Build torchvision's ResNet-18 with a 3x3 stride-1 stem and no max pooling; 11,173,962 parameters by default."""
    import torchvision.models  # noqa: PLC0415 -- takes more than a second, in each worker too

    model: nn.Module = torchvision.models.resnet18(weights=None, num_classes=num_classes)
    stem = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = stem
    model.maxpool = nn.Identity()
    return model
