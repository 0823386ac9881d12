"""What travels with a registered version for programs that do not know this package."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from entprune.errors import EntpruneError
from entprune.export import check_export_path, export_model
from entprune.storage import atomic_write_text

PREPROCESSING_NAME, ONNX_NAME = "preprocessing.json", "model.onnx"

_logger = logging.getLogger(__name__)


def write_consumer_files(
    model: nn.Module, input_shape: tuple[int, int, int], card: Mapping[str, Any], folder: Path
) -> list[Path]:
    """Write how images are prepared, and the network for ONNX Runtime where the packages for it are installed.

    Args:
        model: it is not changed.
        input_shape: (C, H, W) of one image.
        card: mean, std and class names, as far as they are known.
        folder: exists and is empty.

    Returns:
        The files; without the ONNX one if it cannot be written, which is logged and fails nothing.
    """
    preprocessing = folder / PREPROCESSING_NAME
    content = describe_preprocessing(input_shape, card)
    atomic_write_text(preprocessing, json.dumps(content, indent=2, allow_nan=False) + "\n")
    onnx = folder / ONNX_NAME
    try:
        check_export_path(onnx)
        export_model(model, onnx, input_shape=input_shape, metadata=content)
    except EntpruneError as error:
        _logger.warning("the registered version goes without %s: %s", ONNX_NAME, error)
        return [preprocessing]
    return [preprocessing, onnx]


def describe_preprocessing(input_shape: tuple[int, int, int], card: Mapping[str, Any]) -> dict[str, Any]:
    """Steps from pixels to what the network takes, and what its answer means, as plain values."""
    channels, height, width = input_shape
    return {
        "input": {"dtype": "float32", "layout": "NCHW", "channels": channels, "height": height, "width": width},
        "steps": ["scale pixel values to 0..1", "subtract mean per channel", "divide by std per channel"],
        "mean": list(card.get("mean") or ()),
        "std": list(card.get("std") or ()),
        "output": {"kind": "logits", "num_classes": card.get("num_classes")},
        "class_names": list(card.get("class_names") or ()),
    }
