"""Labelled images by name: what calibration, search, training and testing read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from entprune.datasets.arrays import DOWNLOADED, load_digits, load_downloaded, load_npz
from entprune.datasets.checks import check_labels, check_pairing
from entprune.datasets.folder import load_folder
from entprune.datasets.order import choose_validation, split_training
from entprune.datasets.splits import ArraySplit, FolderSplit, ImageData
from entprune.errors import DataError
from entprune.evaluation import ImageSplit
from entprune.models.specs import call_factory, describe_unknown, is_code_spec

__all__ = ["ArraySplit", "FolderSplit", "ImageData", "ImageSplit", "choose_validation", "load_data", "split_training"]

_SPEC_FORMS = ("digits", *DOWNLOADED, "npz:FILE", "imagefolder:DIR", "package.module:factory")


def load_data(
    spec: str,
    *,
    root: Path | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
    download: bool = True,
) -> ImageData:
    """Load a data set by its specification.

    Args:
        spec: one of

            - ``digits``: scikit-learn's 8x8 digits, values 0..16 scaled to 0..1, a fixed stratified quarter to test;
            - ``mnist``, ``fashion_mnist``, ``cifar10``, ``cifar100``: torchvision's layout under ``root``;
            - ``npz:FILE``: arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``, and if wanted ``x_val`` and
              ``y_val`` (a validation split), ``num_classes`` and ``class_names``; images (n, h, w), (n, h, w, c) or
              (n, c, h, w), where c is the smaller of the outer axes;
              FILE may be a URI that fsspec opens, such as ``s3://bucket/images.npz``;
            - ``imagefolder:DIR``: files in ``train/CLASS/`` and ``test/CLASS/`` or ``val/CLASS/``; of both, ``val`` is
              the validation split;
            - ``package.module:factory``: a function that returns an :class:`ImageData`; it gets those of the arguments
              below that it accepts.
        root: folder of downloaded data; ``data`` in the current folder by default.
        mean: of each channel after scaling bytes to 0..1; by default the data set's usual one, for ``npz`` the train
            split's own, for ``imagefolder`` ImageNet's.
        std: the same for the standard deviation.
        image_size: height and width for ``imagefolder``, 224 by default; other data keep their own.
        download: whether missing data may be fetched.

    Raises:
        DataError: the specification is unknown, or the data are missing or unusable.
    """
    kind, _, location = spec.partition(":")
    if is_code_spec(spec):
        options = {"root": root, "mean": mean, "std": std, "image_size": image_size, "download": download}
        return _load_from_factory(spec, options)
    if kind == "imagefolder" and location:
        return load_folder(spec, Path(location), mean, std, image_size)
    if kind == "npz" and location:
        data = load_npz(spec, location, mean, std)
    elif spec == "digits":
        data = load_digits(mean, std)
    elif spec in DOWNLOADED:
        data = load_downloaded(spec, Path("data") if root is None else Path(root), mean, std, download)
    else:
        raise DataError(describe_unknown("data", spec, _SPEC_FORMS))
    if image_size is not None and data.input_shape[1:] != (image_size, image_size):
        height, width = data.input_shape[1:]
        raise DataError(f"data '{spec}': expected image_size {height}x{width}, got {image_size}; leave it out.")
    return data


def _load_from_factory(spec: str, options: dict[str, Any]) -> ImageData:
    data, accepted = call_factory(spec, DataError, options)
    ignored = [name for name in ("mean", "std", "image_size") if options[name] is not None and name not in accepted]
    if ignored:
        raise DataError(f"factory '{spec}': it accepts no {', '.join(ignored)}; leave them out.")
    if not isinstance(data, ImageData):
        raise DataError(f"factory '{spec}': expected it to return an ImageData, got {type(data).__name__}.")
    for part, split in (("train", data.train), ("test", data.test), ("validation", data.validation)):
        if split is None:
            continue
        labels = check_labels(spec, part, np.asarray(split.labels))
        check_pairing(spec, part, len(split), labels, data.num_classes)
        shape = tuple(split.batch(np.arange(1)).shape)
        if shape != (1, *data.input_shape):
            raise DataError(f"factory '{spec}': expected a batch of shape {(1, *data.input_shape)}, got {shape}.")
    return data
