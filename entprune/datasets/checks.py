"""Checks of images, labels and normalisation, each with one sentence for the user.

Axes: n samples, c channels, h and w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from entprune.datasets.splits import Labels
from entprune.errors import DataError

_MAX_CLASSES = 100_000  # above it, what was given as labels is something else


def check_images(name: str, part: str, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the images as contiguous (n, c, h, w), uint8 or float32."""
    where = f"data '{name}', {part} split"
    if images.ndim not in (3, 4) or min(images.shape[1:], default=0) < 1:
        raise DataError(f"{where}: expected images (n, h, w), (n, h, w, c) or (n, c, h, w), got shape {images.shape}.")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"{where}: expected images of dtype uint8 or float, got {images.dtype}; convert them.")
    if images.ndim == 3:
        images = images[:, np.newaxis]  # (n, h, w) -> (n, 1, h, w)
    elif images.shape[3] <= images.shape[1]:
        images = images.transpose(0, 3, 1, 2)  # (n, h, w, c) -> (n, c, h, w)
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise DataError(f"{where}: expected finite pixel values, found NaN or infinite ones; repair the images.")
    return np.ascontiguousarray(images)


def check_labels(name: str, part: str, labels: npt.NDArray[Any]) -> Labels:
    """Return the labels as int64 (n,)."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]  # (n, 1) -> (n,)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"data '{name}', {part} split: expected integer labels of shape (n,), "
            f"got {labels.dtype} of shape {labels.shape}; give the class number of each image."
        )
    return labels.astype(np.int64)


def check_pairing(name: str, part: str, num_images: int, labels: Labels, num_classes: int) -> None:
    """Require one label in [0, num_classes) for each image, and at least one image."""
    where = f"data '{name}', {part} split"
    if num_images == 0:
        raise DataError(f"{where}: expected at least one image, got none.")
    if num_images != len(labels):
        raise DataError(
            f"{where}: expected one label for each image, got {num_images} images and {len(labels)} labels."
        )
    if num_classes > _MAX_CLASSES:
        raise DataError(
            f"{where}: expected labels below {_MAX_CLASSES}, got {labels.max()}; number the classes from 0."
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"{where}: expected labels in [0, {num_classes}), got {labels.min()} to {labels.max()}; number the classes "
            "from 0, each present in the train split."
        )


def check_normalisation(
    name: str, mean: Sequence[float], std: Sequence[float], num_channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation as one finite number for each channel."""
    means, stds = tuple(float(value) for value in mean), tuple(float(value) for value in std)
    if len(means) != num_channels or len(stds) != num_channels:
        raise DataError(
            f"data '{name}': expected {num_channels} values of mean and of std, got {len(means)} and {len(stds)}; "
            "give one for each channel."
        )
    if not np.isfinite((*means, *stds)).all() or min(stds) <= 0:
        raise DataError(f"data '{name}': expected finite means and positive std, got mean {means} and std {stds}.")
    return means, stds
