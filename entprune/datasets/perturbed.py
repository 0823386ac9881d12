"""Images of which some are turned, scaled, shifted and recoloured a little: new to a network that knows them by heart.

Axes: n images, c channels, h and w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from entprune.evaluation import ImageSplit

# Largest changes. Digits stay upright, and nothing is mirrored.
_ANGLE = float(np.radians(7.5))
_SCALE = 0.06
_SHIFT = 0.05  # of half the side
_CONTRAST = 0.15
_BRIGHTNESS = 0.25  # of normalised values


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PerturbedSplit:
    """Images of another split, some of them perturbed, the same way whenever they are read.

    Attributes:
        split: where the images come from.
        indices: (n,) of the images in it.
        draws: (n, 6) in [-1, 1]: angle, scale, two shifts, contrast and brightness of each image as parts of the
            largest change; 0 throughout leaves an image as it is.
    """

    split: ImageSplit
    indices: npt.NDArray[np.int64]
    draws: npt.NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of images n."""
        return len(self.indices)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Return the class of each image, (n,)."""
        return self.split.labels[self.indices]

    @property
    def is_perturbed(self) -> npt.NDArray[np.bool_]:
        """Return whether each image is perturbed, (n,)."""
        return np.asarray(self.draws.any(1))

    def batch(self, indices: npt.NDArray[np.integer]) -> Tensor:
        """Return the images at ``indices``, normalised, float32 (len(indices), c, h, w)."""
        images = self.split.batch(self.indices[indices])
        draws = self.draws[indices]
        chosen = torch.from_numpy(np.flatnonzero(draws.any(1)))
        if len(chosen):
            images = images.clone()  # what the other split gave may be its own
            images[chosen] = perturb(images[chosen], torch.from_numpy(draws[chosen.numpy()]))
        return images


def perturb_share(split: ImageSplit, indices: npt.NDArray[np.int64], share: float, seed: int) -> PerturbedSplit:
    """Perturb a share of some images, evenly spread over their order.

    Args:
        split: where the images come from.
        indices: (n,) of the images in it.
        share: of them, from 0 to 1.
        seed: of the random changes.
    """
    steps = np.floor(np.arange(len(indices) + 1) * share)
    draws = np.random.default_rng(seed).uniform(-1.0, 1.0, (len(indices), 6)).astype(np.float32)
    draws[np.diff(steps) == 0.0] = 0.0
    return PerturbedSplit(split=split, indices=indices, draws=draws)


def perturb(images: Tensor, draws: Tensor) -> Tensor:
    """Turn by up to 7.5 degrees, scale by 6 %, shift by 2.5 % of the side; change contrast by 15 %, brightness by 0.25.

    Pixels are interpolated linearly; beyond the border it is repeated. Contrast is about each image's own mean.

    Args:
        images: (n, c, h, w), normalised.
        draws: (n, 6) in [-1, 1], see :class:`PerturbedSplit`.

    Returns:
        New images of the same shape. An image's result does not depend on the others.
    """
    angle, scale, across, down, contrast, brightness = (part.view(-1, 1, 1) for part in draws.unbind(1))
    height, width = images.shape[2:]
    y, x = (torch.linspace(1.0 / size - 1.0, 1.0 - 1.0 / size, size) for size in (height, width))  # pixel centres
    x, y = x.view(1, 1, -1), y.view(1, -1, 1) * (height / width)
    size = 1.0 + _SCALE * scale
    cosine, sine = size * torch.cos(_ANGLE * angle), size * torch.sin(_ANGLE * angle)
    grid = torch.stack(
        [
            cosine * x - sine * y + _SHIFT * across,
            (sine * x + cosine * y) * (width / height) + _SHIFT * down,
        ],
        dim=3,
    )
    moved = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    middle = moved.mean((1, 2, 3), keepdim=True)
    return middle + (moved - middle) * (1.0 + _CONTRAST * contrast).unsqueeze(3) + _BRIGHTNESS * brightness.unsqueeze(3)
