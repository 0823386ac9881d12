"""Images that lie on a GPU as they are stored, so that a batch costs no transfer.

Axes: n samples, c channels, h and w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from entprune.datasets.splits import ArraySplit, normalise
from entprune.evaluation import ImageSplit

_LARGEST_SHARE = 0.25  # of the device's free memory; the rest is for activations


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ResidentImages:
    """The images of a split on a device.

    Attributes:
        images: (n, c, h, w), uint8 or float32, as the split keeps them.
        labels: (n,) int64.
        mean, std: (c,).
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def batch(self, indices: npt.NDArray[np.integer]) -> tuple[Tensor, Tensor]:
        """Images, normalised, float32 (len(indices), c, h, w), and labels (len(indices),) on the device."""
        chosen = torch.from_numpy(np.asarray(indices, dtype=np.int64)).to(self.images.device)
        return normalise(self.images[chosen], self.mean, self.std), self.labels[chosen]


def place_images(split: ImageSplit, device: torch.device) -> ResidentImages | None:
    """Copy a split to a device.

    Returns:
        None where that saves nothing: on the CPU, for images that are decoded one by one, and where the device has too
        little memory for all of them.
    """
    if device.type != "cuda" or type(split) is not ArraySplit:
        return None
    if split.images.nbytes > _LARGEST_SHARE * torch.cuda.mem_get_info(device)[0]:
        return None
    return resident_images(split, device)


def resident_images(split: ArraySplit, device: torch.device) -> ResidentImages:
    """The images of a split on a device, whatever the device."""
    return ResidentImages(
        images=torch.from_numpy(split.images).to(device),
        labels=torch.from_numpy(split.labels).to(device),
        mean=torch.tensor(split.mean, device=device),
        std=torch.tensor(split.std, device=device),
    )
