"""Finished networks from where they were written, and what they must be fed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from entprune.artifact import load_model, read_card
from entprune.datasets import ImageData, load_data
from entprune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import nn


def load_network(source: str) -> tuple[nn.Module, dict[str, Any]]:
    """A network from a folder or the registry, and what is known about how to feed it.

    Raises:
        ArtifactError: the folder is unusable. EngineError: the registry has no such version.
    """
    if source.startswith("models:/"):
        from tasks import registry  # noqa: PLC0415 -- takes seconds, and a folder does not need it

        return registry.load_registered(source)
    return load_model(Path(source)), read_card(Path(source)).to_dict()


def find_input_shape(source: str, card: dict[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width of one image, as far as that was recorded.

    Raises:
        ConfigError: it was not.
    """
    shape = card.get("input_shape")
    if not shape:
        raise ConfigError(f"'{source}': expected a network that says which images it takes; give --input-shape C,H,W.")
    channels, height, width = (int(size) for size in shape)
    return channels, height, width


def load_matching_data(
    spec: str, root: Path | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, card: dict[str, Any]
) -> ImageData:
    """Data in the form that a network expects, as far as that was recorded.

    Raises:
        DataError: the data are unusable, or of another form.
    """
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
