"""Shrink pretrained convolutional networks.

Find the sparse subnetwork from data, re-estimate its weights, prove it equal::

    result = entprune.prune(model, images, budget=entprune.Budget(max_accuracy_drop=0.5), evaluate=(images, labels))
    entprune.save(result, "smaller") model = entprune.load("smaller")
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from entprune.artifact import load_model, save_model
from entprune.config import Budget, PruneConfig
from entprune.export import export_model
from entprune.path import PathSetting
from entprune.plan import PruningPlan
from entprune.pruning import PruningResult, prune

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "PathSetting",
    "PruneConfig",
    "PruningPlan",
    "PruningResult",
    "export_model",
    "load",
    "prune",
    "save",
]


def save(result: PruningResult, directory: str | Path) -> None:
    """Write the portable artifact of a result: safetensors and JSON, no pickle.

    Raises:
        OutputError: the folder cannot be written.
    """
    save_model(result.model, result.plan, result.card, Path(directory))


def load(directory: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Rebuild a saved network in eval mode.

    Args:
        directory: written by :func:`save`, or the output folder of a run or its `model` folder.
        model: an unpruned instance of the network, needed where the artifact names no built-in or torchvision model.

    Raises:
        ArtifactError: the folder is missing, damaged, or needs `model`.
    """
    return load_model(Path(directory), model=model)
