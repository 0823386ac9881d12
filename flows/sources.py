"""Finished networks from where they were written, and data in the form that they expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from entprune.artifact import load_model, read_card
from entprune.datasets import ImageData, load_data
from entprune.errors import ConfigError, DataError


def load_network(source: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network from a folder or the registry, and what is known about how to feed it."""
    if source.startswith("models:/"):
        from tasks import tracking

        return tracking.load_registered(source)
    from entprune.artifact import load_model, read_card

    folder = Path(source)
    if (folder / "model").is_dir():
        folder = folder / "model"
    return load_model(folder), read_card(folder).to_dict()


def load_matching_data(
    spec: str, root: Path | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, card: dict[str, Any]
) -> ImageData:
    """Data in the form that a network expects, as far as that was recorded."""
    from entprune.datasets import load_data
    from entprune.errors import DataError

    mean, std = mean or tuple(card.get("mean") or ()) or None, std or tuple(card.get("std") or ()) or None
    shape = tuple(card.get("input_shape") or ())
    image_size = shape[1] if shape and spec.startswith("imagefolder:") else None
    images = load_data(spec, root=root, mean=mean, std=std, image_size=image_size)
    num_classes = card.get("num_classes") or images.num_classes
    if (shape and shape != tuple(images.input_shape)) or num_classes < images.num_classes:
        raise DataError(
            f"data '{spec}': expected images {shape or images.input_shape} of at most {num_classes} classes, as the "
            f"network was trained on, got {images.input_shape} and {images.num_classes}; give the data it was made for."
        )
    return images
