"""Seeded orders of labelled images: which of them go where."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from entprune.datasets.splits import ImageData, Labels
from entprune.errors import DataError


def split_training(
    data: ImageData, *, calibration: int, validation: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw disjoint calibration and validation images from the train split, each with the classes in proportion.

    Neither depends on the size of the other. Any leading part of the calibration indices is balanced as well.

    Args:
        data: whose train split is divided.
        calibration: number of calibration images; at most half of the train split is taken.
        validation: number of validation images; at most half of the train split is taken.
        seed: of the shuffle.

    Returns:
        Calibration indices and validation indices into ``data.train``.

    Raises:
        DataError: a number is negative, or fewer than two training images exist.
    """
    labels = data.train.labels
    if calibration < 1 or validation < 0 or len(labels) < 2:
        raise DataError(
            f"data '{data.name}': expected calibration >= 1, validation >= 0 and 2 or more training images, "
            f"got {calibration}, {validation} and {len(labels)}."
        )
    order = balanced_order(labels, np.random.default_rng(seed))
    half = len(labels) // 2
    num_validation = min(validation, half)
    return order[: min(calibration, half)], order[len(order) - num_validation :]


def choose_validation(data: ImageData, *, number: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw images of the data's own validation split, with the classes in proportion.

    Args:
        data: whose validation split is read.
        number: of images; at most all are taken.
        seed: of the shuffle.

    Returns:
        Indices into ``data.validation``.

    Raises:
        DataError: the data have no such split.
    """
    if data.validation is None:
        raise DataError(f"data '{data.name}': expected a validation split, got none.")
    return balanced_order(data.validation.labels, np.random.default_rng(seed))[:number]


def balanced_order(labels: Labels, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Shuffle so that every stretch holds the classes in proportion: the k-th of m images of a class lies near k/m."""
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + generator.random(len(members))) / len(members)
    return np.argsort(position, kind="stable").astype(np.int64)
