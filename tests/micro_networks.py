"""Tiny networks, one for each way in which channels are coupled, and images for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from entprune.datasets import ArraySplit

IMAGE_SHAPE = (2, 6, 6)


class Chain(nn.Module):
    """Convolution with BatchNorm and in-place ReLU, convolution with bias, flatten of 2x2 pixels, two linear layers."""

    def __init__(self, widths: tuple[int, int, int] = (6, 5, 7), *, bias: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, widths[0], 3, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, stride=2)
        self.relu2 = nn.ReLU(inplace=True)
        self.fc1 = nn.Linear(4 * widths[1], widths[2])
        self.relu3 = nn.ReLU(inplace=True)
        self.fc2 = nn.Linear(widths[2], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.conv2(x))
        return self.fc2(self.relu3(self.fc1(torch.flatten(x, 1))))


class Residual(nn.Module):
    """A stream that two convolutions write and three layers read, and an inner channel group."""

    def __init__(self, width: int = 6, inner: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)  # called three times: it has no parameters
        self.side = nn.Conv2d(width, 3, 1)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn0(self.stem(x)))
        y = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(x + self.bn2(self.conv2(y)))
        return self.fc(x.mean((2, 3))) + self.side(x).mean((2, 3))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 beside a projection shortcut, as in ResNet-50."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 1, bias=False)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1, stride=2, bias=False)
        self.conv3 = nn.Conv2d(5, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(2, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        return self.fc(torch.relu(out).mean((2, 3)))


class Concat(nn.Module):
    """Two branches concatenated, BatchNorm over both, one reader."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(2, 3, 3, padding=1)
        self.right = nn.Conv2d(2, 5, 1)
        self.bn = nn.BatchNorm2d(8)
        self.join = nn.Conv2d(8, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        return self.fc(torch.relu(self.join(self.bn(x))).mean((2, 3)))


class Depthwise(nn.Module):
    """A depthwise convolution between two ordinary ones, and one group that has nothing to do with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.conv2 = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.conv1(x))))
        return self.fc(torch.relu(self.conv2(x)).mean((2, 3)))


def random_split(num_images: int = 64, seed: int = 0) -> ArraySplit:
    """Normal images with three random labels."""
    generator = np.random.default_rng(seed)
    images = generator.normal(size=(num_images, *IMAGE_SHAPE)).astype(np.float32)
    labels = generator.integers(0, 3, size=num_images)
    channels = IMAGE_SHAPE[0]
    return ArraySplit(images=images, labels=labels, mean=(0.0,) * channels, std=(1.0,) * channels)


def warm_up(model: nn.Module, *, batches: int = 3) -> nn.Module:
    """Give BatchNorm layers statistics and parameters of their own, as training does; eval mode."""
    model.train()
    with torch.no_grad():
        for number in range(batches):
            model(random_split(32, seed=100 + number).batch(np.arange(32)))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.eval()
