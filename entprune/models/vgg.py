"""VGG-16 with BatchNorm for 32x32 images: torchvision's convolutional part and one linear layer.

Axes: n samples, c channels, h and w pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from entprune.errors import ModelError

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class Vgg16Cifar(nn.Module):
    """Thirteen 3x3 convolutions with bias, BatchNorm and ReLU in five pooled stages, then one linear layer."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        if image_size < 32:
            raise ModelError(
                f"vgg16_cifar: expected images of at least 32x32, got {image_size}x{image_size}; use lenet."
            )
        self.features = _make_features(in_channels)
        self.classifier = nn.Linear(512 * (image_size // 32) ** 2, num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, c, h, w) to logits (n, num_classes)."""
        x = self.features(x)
        x = torch.flatten(x, 1)  # (n, 512, 1, 1) -> (n, 512) for 32x32 images
        return self.classifier(x)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


def _make_features(in_channels: int) -> nn.Sequential:
    """Stack the stages; positions, and with them key names, are those of torchvision's ``vgg16_bn().features``."""
    layers: list[nn.Module] = []
    for widths in _STAGES:
        for width in widths:
            layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            in_channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def build_vgg16_cifar(num_classes: int = 10, in_channels: int = 3, image_size: int = 32) -> Vgg16Cifar:
    """Build VGG-16 with BatchNorm for square images; 14,728,266 parameters with the defaults.

    Raises:
        ModelError: the image is smaller than 32x32.
    """
    return Vgg16Cifar(num_classes, in_channels, image_size)
