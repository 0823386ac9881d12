"""What a data set is: splits of labelled images that are decoded and normalised when a batch is asked for.

Axes: n samples, c channels, h and w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from entprune.errors import DataError
from entprune.evaluation import ImageSplit

Labels = npt.NDArray[np.int64]

_SMALLEST_PHOTO = 128  # pixels; smaller images are icons, of which nothing is cut off


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ArraySplit:
    """Images kept in memory.

    Attributes:
        images: (n, c, h, w), uint8 (0..255, read as 0..1) or float32 (taken as they are).
        labels: (n,).
        mean: of each channel, subtracted after scaling.
        std: of each channel, divided by.
    """

    images: npt.NDArray[Any]
    labels: Labels
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        """Return the number of images n."""
        return len(self.images)

    def batch(self, indices: npt.NDArray[np.integer[Any]]) -> Tensor:
        """Return the images at ``indices``, normalised, float32 (len(indices), c, h, w)."""
        images = torch.from_numpy(self.images[indices])  # indexing by an array copies: the split stays as it is
        return normalise(images, self.mean, self.std)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FolderSplit:
    """Images decoded from files when they are asked for.

    The shorter side is resized to ``image_size``, or to 8/7 of it (256 for 224) from 128 pixels on, as is usual for
    photographs; then the centre is cut out.

    Attributes:
        paths: one file for each image.
        labels: (n,).
        image_size: height and width in pixels after cropping.
        mean: of each channel, subtracted after scaling to 0..1.
        std: of each channel, divided by.
    """

    paths: tuple[Path, ...]
    labels: Labels
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        """Return the number of images n."""
        return len(self.paths)

    def batch(self, indices: npt.NDArray[np.integer[Any]]) -> Tensor:
        """Return the images at ``indices``, normalised, float32 (len(indices), 3, image_size, image_size).

        Raises:
            DataError: a file cannot be decoded.
        """
        decoded = [_decode_image(self.paths[index], self.image_size) for index in indices]
        pixels = np.stack(decoded) if decoded else np.empty((0, self.image_size, self.image_size, 3), np.uint8)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (n, h, w, c) -> (n, c, h, w)
        return normalise(images, self.mean, self.std)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageData:
    """A data set for classification.

    Attributes:
        name: the specification it was loaded by.
        train: for training and calibration, and for validation where there is no split for it.
        test: for the final measurement only.
        num_classes: labels lie in [0, num_classes).
        input_shape: (c, h, w) of one image.
        mean: of each channel; what was subtracted.
        std: of each channel; what was divided by.
        class_names: one for each class.
        sha256: of the images before normalisation and the labels, not of mean and std. For ``imagefolder`` of the
            sorted relative paths, the file sizes and the image size, not of what is in the files.
        validation: to choose by; images that the network was not trained on. None if there is no such split.
    """

    name: str
    train: ImageSplit
    test: ImageSplit
    num_classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    sha256: str
    validation: ImageSplit | None = None


def normalise(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Scale uint8 to 0..1, subtract the mean and divide by the standard deviation of each channel.

    Images of one channel are contiguous and channels-last at once. They get the strides of the latter, whatever the
    array had before it went to another process: torch chooses its convolutions by them, and these are twice as fast.

    Args:
        images: (n, c, h, w), uint8 or float32 on any device; the latter are changed in place.
        mean, std: (c,).

    Returns:
        (n, c, h, w) float32.
    """
    channels = (-1, 1, 1)  # (c,) -> (c, 1, 1)
    scaled = images.float().div_(255) if images.dtype == torch.uint8 else images
    shift, scale = (torch.as_tensor(values, device=images.device).view(channels) for values in (mean, std))
    normalised = scaled.sub_(shift).div_(scale)
    count, num_channels, height, width = images.shape
    if num_channels != 1:
        return normalised
    return normalised.reshape(count, height, width, 1).permute(0, 3, 1, 2)


def _decode_image(path: Path, image_size: int) -> npt.NDArray[np.uint8]:
    """Read one image as (image_size, image_size, 3)."""
    try:
        with Image.open(path) as image:
            shorter_side = round(image_size * 8 / 7) if image_size >= _SMALLEST_PHOTO else image_size
            scale = shorter_side / min(image.size)
            width, height = (max(image_size, round(side * scale)) for side in image.size)
            resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
            left, top = (width - image_size) // 2, (height - image_size) // 2
            return np.asarray(resized.crop((left, top, left + image_size, top + image_size)))
    except Exception as cause:  # a damaged or oversized image can make the decoder raise almost anything
        raise DataError(f"image '{path}': cannot be decoded ({type(cause).__name__}); remove or replace it.") from cause
