"""Names of stored results, each made of the hashes of everything that the result depends on."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from entprune.config import PruneConfig
from entprune.datasets import ImageData
from entprune.evaluation import Precision
from entprune.finetune import FinetuneConfig
from entprune.groups import ChannelGroup
from entprune.path import PathSetting
from entprune.plan import PruningPlan
from entprune.stages import Part
from entprune.tracing import trace

# Raised whenever a stage would give other results on the same inputs: entries of older code are then not found.
STAGE_VERSIONS = {
    "answers": 3,
    "moments": 2,
    "shards": 1,
    "paths": 5,
    "candidates": 6,
    "latencies": 1,
    "logits": 1,
    "ranges": 1,
    "finetuned": 2,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class StageKeys:
    """Keys of one run's results.

    Attributes:
        network: hash of the dense network.
        calibration, validation, test: hashes of the images that are read.
        config: of the run; each key takes the settings that matter for it.
    """

    network: str
    calibration: str
    validation: str
    test: str
    config: PruneConfig

    def answers(self, layers: tuple[str, ...]) -> str:
        """Dense answers of some layers."""
        return content_key("answers", {**self._statistics(), "layers": list(layers), **self._residuals()})

    def moments(self, layers: tuple[str, ...]) -> str:
        """Moments of what some layers read."""
        return content_key("moments", {**self._statistics(), "layers": list(layers)})

    def shard(self, layers: tuple[str, ...], consumers: tuple[str, ...], part: Part) -> str:
        """What a part of the calibration images says of some layers."""
        inputs = {"layers": list(layers), "consumers": list(consumers), "part": list(part), **self._residuals()}
        return content_key("shards", {**self._statistics(), **inputs})

    def path(self, group: ChannelGroup, setting: PathSetting) -> str:
        """One continuation of one group; other groups do not matter."""
        inputs = {"group": hash_group(group), "setting": setting.to_dict(), **self._residuals()}
        return content_key("paths", {**self._statistics(), **inputs})

    def candidate(self, plan: PruningPlan) -> str:
        """One assembled network with its predictions; the budget does not matter."""
        refit = {**asdict(self.config.refit()), **self._residuals()}
        scored = {"validation": self.validation, "precision": self.config.precision}
        return content_key("candidates", {**self._statistics(), "plan": plan.digest(), "refit": refit, **scored})

    def latency(self, plan: PruningPlan, batch_size: int) -> str:
        """Time that a plan's network takes, which depends on the machine."""
        machine = [platform.node(), platform.processor(), platform.machine()]
        inputs = {"network": self.network, "plan": plan.digest(), "batch_size": batch_size, "machine": machine}
        return content_key("latencies", {**inputs, "threads": self.config.threads})

    def logits(self, model: nn.Module, images: str, precision: Precision = "float32") -> str:
        """What a network answers to some images."""
        inputs = {"network": hash_network(model), "images": images, "precision": precision}
        return content_key("logits", {**self._numerics(), **inputs})

    def logits_range(self, logits: str, part: Part) -> str:
        """A range of the logits of that key."""
        return content_key("ranges", {"logits": logits, "part": list(part)})

    def finetuned(self, model: nn.Module, config: FinetuneConfig, held_out: str) -> str:
        """Weights after fine-tuning on all images of a split but some, of which this is the hash."""
        settings = {"finetune": asdict(config), "held_out": held_out}
        inputs = {"student": hash_network(model), "teacher": self.network, **settings}
        return content_key("finetuned", inputs)

    def _residuals(self) -> dict[str, Any]:
        return {"correct_residuals": self.config.correct_residuals, "protected": sorted(self.config.keep)}

    def _numerics(self) -> dict[str, Any]:
        return {"device": self.config.device.partition(":")[0], "threads": self.config.threads}

    def _statistics(self) -> dict[str, Any]:
        names = ("calibration_shards", "batch_size", "min_rows", "rows_per_feature", "seed")
        return {
            **self._numerics(),
            "network": self.network,
            "calibration": self.calibration,
            "sampling": {name: getattr(self.config, name) for name in names},
        }


def content_key(stage: str, inputs: Mapping[str, Any]) -> str:
    """SHA-256 of everything that a stage's result depends on.

    Args:
        stage: one of :data:`STAGE_VERSIONS`.
        inputs: plain values; arrays and networks by their hashes.
    """
    content = {"stage": stage, "version": STAGE_VERSIONS[stage], "torch": torch.__version__, "inputs": inputs}
    return _hash_plain(content)


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def hash_network(model: nn.Module) -> str:
    """SHA-256 of a network: its weights, its layers' settings and what its forward pass does."""
    state = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    return _hash_plain([trace(model).code, str(model), _foreign_code(model), hash_arrays(state)])


def _foreign_code(model: nn.Module) -> dict[str, str]:
    """Source of the module classes that are not torch's: the traced graph does not look into those without children."""
    classes = {type(module) for module in model.modules() if not type(module).__module__.startswith("torch.")}
    found: dict[str, str] = {}
    for kind in classes:
        try:
            found[f"{kind.__module__}.{kind.__qualname__}"] = inspect.getsource(kind)
        except (OSError, TypeError):  # made in a shell, say
            found[f"{kind.__module__}.{kind.__qualname__}"] = ""
    return found


def hash_group(group: ChannelGroup) -> str:
    """SHA-256 of a group: its channels and where its consumers read them."""
    index = {piece.layer: piece.index for piece in group.consumers}
    return _hash_plain([group.name, group.num_channels, hash_arrays(index)])


def hash_images(data: ImageData, split: str, indices: np.ndarray, perturbed: float = 0.0, seed: int = 0) -> str:
    """SHA-256 of normalised images of a split, in their order, of which a share is perturbed."""
    chosen = hash_arrays({"indices": indices.astype(np.int64)})
    content = [data.sha256, list(data.mean), list(data.std), list(data.input_shape), split, chosen]
    return _hash_plain([*content, ["perturbed", perturbed, seed]] if perturbed else content)


def _hash_plain(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
