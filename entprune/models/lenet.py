"""Small networks for greyscale digits: LeNet-5 for 28x28 images, and a batch-normalised one for 8x8 images.

Axes: n samples, c channels, h and w pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from entprune.errors import ModelError


class LeNet(nn.Module):
    """Two 5x5 convolutions (20, 50), each with ReLU and 2x2 pooling, and two linear layers (500, classes)."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        pooled_size = ((image_size - 4) // 2 - 4) // 2
        if pooled_size < 1:
            raise ModelError(
                f"lenet: expected images of at least 16x16, got {image_size}x{image_size}; use digits_cnn."
            )
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(50 * pooled_size**2, 500)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(500, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, c, h, w) to logits (n, num_classes)."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = torch.flatten(x, 1)  # (n, 50, 4, 4) -> (n, 800) for 28x28 images
        x = self.relu3(self.fc1(x))
        return self.fc2(x)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


class DigitsCnn(nn.Module):
    """Two padded 3x3 convolutions (32, 64) with BatchNorm and ReLU, one 2x2 pooling, two linear layers."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        pooled_size = image_size // 2
        if pooled_size < 1:
            raise ModelError(f"digits_cnn: expected images of at least 2x2, got {image_size}x{image_size}.")
        self.conv1 = nn.Conv2d(in_channels, 32, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(64)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(64 * pooled_size**2, 128)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, c, h, w) to logits (n, num_classes)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.pool(self.relu2(self.bn2(self.conv2(x))))
        x = torch.flatten(x, 1)  # (n, 64, 4, 4) -> (n, 1024) for 8x8 images
        x = self.relu3(self.fc1(x))
        return self.fc2(x)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


def build_lenet(num_classes: int = 10, in_channels: int = 1, image_size: int = 28) -> LeNet:
    """Build LeNet-5 for square images; 431,080 parameters with the defaults.

    Raises:
        ModelError: the image is smaller than 16x16.
    """
    return LeNet(num_classes, in_channels, image_size)


def build_digits_cnn(num_classes: int = 10, in_channels: int = 1, image_size: int = 8) -> DigitsCnn:
    """Build the tiny batch-normalised network for 8x8 digits.

    Raises:
        ModelError: the image is smaller than 2x2.
    """
    return DigitsCnn(num_classes, in_channels, image_size)
