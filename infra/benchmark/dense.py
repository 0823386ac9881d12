"""Part `dense`: networks trained longer by the recipe of `entprune train`, for the other parts to prune.

The checkpoint, rounded to float16, goes to the folder of the others; its hash and the recipe are the record. Wants a
GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from entprune.checkpoints import load_checkpoint, save_state, sha256_file
from entprune.evaluation import accuracy
from entprune.models import build_model
from entprune.training import TrainConfig, train
from infra.benchmark.networks import LONG_TRAINED, find_network
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject

RECIPE = TrainConfig(epochs=60, batch_size=256, learning_rate=0.2)
_ELSEWHERE = ("seed", "device", "amp")  # in the subject and the run


class DenseMeter:
    """Trains one network.

    Args:
        request: what is asked.
    """

    def __init__(self, request: Request) -> None:
        self._request, self._entry = request, find_network(request.network)
        self._data = self._entry.load_data(request.folders.data)

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Hash of the images."""
        return {"data_sha256": self._data.sha256}

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:
        """Accuracy of the stored checkpoint and what it cost."""
        config = TrainConfig(**{**key, "seed": subject.seed, "device": self._request.device})
        network = self._build(subject.seed)
        result = train(network, self._data, config)
        path = self._request.folders.checkpoints / self._entry.checkpoint
        save_state(result.model.half(), path)
        stored = load_checkpoint(network, path)
        return {
            "accuracy": accuracy(stored, self._data.test, device=config.device),
            "train_accuracy_augmented": result.history[-1].accuracy,
            "epoch_seconds": sum(record.seconds for record in result.history) / len(result.history),
            "checkpoint_sha256": sha256_file(path),
            "checkpoint_bytes": path.stat().st_size,
        }

    def _build(self, seed: int) -> nn.Module:
        data = self._data
        return build_model(
            self._entry.model_spec, num_classes=data.num_classes, input_shape=data.input_shape, seed=seed
        )


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """One cell for each network."""
    recipe = asdict(RECIPE)
    key = {name: value for name, value in recipe.items() if name not in _ELSEWHERE}
    return [(Subject(part="dense", network=request.network, seed=request.seed), key)]


PART = Part(
    name="dense", networks=tuple(LONG_TRAINED), threads=2, cells=cells, meter=DenseMeter,
    headline=("accuracy", "epoch_seconds"),
)  # fmt: skip
