"""Data sets that are folders of image files, one folder for each class.

Axes: n samples, h and w pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from entprune.datasets.checks import check_normalisation, check_pairing
from entprune.datasets.splits import FolderSplit, ImageData, Labels
from entprune.errors import DataError

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_DEFAULT_IMAGE_SIZE = 224


def load_folder(
    spec: str, folder: Path, mean: Sequence[float] | None, std: Sequence[float] | None, image_size: int | None
) -> ImageData:
    """Load ``train/CLASS/``, ``test/CLASS/`` and ``val/CLASS/``; labels number the sorted class names.

    One of the last two will do, to test; where there are both, ``val`` is the validation split.
    """
    image_size = _DEFAULT_IMAGE_SIZE if image_size is None else image_size
    others = [folder / name for name in ("test", "val") if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not others:
        raise DataError(f"data '{spec}': expected folders 'train' and 'test' (or 'val') in '{folder}'; check the path.")
    if image_size < 1:
        raise DataError(f"data '{spec}': expected image_size >= 1, got {image_size}.")
    class_names = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
    for part in others:
        strangers = sorted({entry.name for entry in part.iterdir() if entry.is_dir()} - set(class_names))
        if strangers:
            raise DataError(f"data '{spec}': classes {', '.join(strangers)} are in '{part.name}' but not in 'train'.")
    means, stds = check_normalisation(
        spec, _IMAGENET_MEAN if mean is None else mean, _IMAGENET_STD if std is None else std, 3
    )
    splits = []
    digest = hashlib.sha256(f"{image_size}\n".encode())
    for part in (folder / "train", *others):
        paths, labels = _list_images(part, class_names)
        check_pairing(spec, part.name, len(paths), labels, len(class_names))
        for path in paths:
            digest.update(f"{path.relative_to(folder).as_posix()}\t{path.stat().st_size}\n".encode())
        splits.append(FolderSplit(paths=paths, labels=labels, image_size=image_size, mean=means, std=stds))
    return ImageData(
        name=spec,
        train=splits[0],
        test=splits[1],
        num_classes=len(class_names),
        input_shape=(3, image_size, image_size),
        mean=means,
        std=stds,
        class_names=tuple(class_names),
        sha256=digest.hexdigest(),
        validation=splits[2] if len(others) > 1 else None,
    )


def _list_images(folder: Path, class_names: Sequence[str]) -> tuple[tuple[Path, ...], Labels]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_name in enumerate(class_names):
        found = sorted(path for path in (folder / class_name).rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
        paths += found
        labels += [label] * len(found)
    return tuple(paths), np.asarray(labels, dtype=np.int64)
