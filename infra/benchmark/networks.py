"""The trained networks that are measured, and the bench on which each lies: statistics and paths, computed once.

Checkpoints and data are no part of the project; the folders come from the command line.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from entprune.calibration import LayerStatistics
from entprune.candidates import CandidateJob
from entprune.checkpoints import load_checkpoint, sha256_file
from entprune.config import Budget, PruneConfig
from entprune.datasets import ImageData, load_data, split_training
from entprune.errors import ConfigError
from entprune.models import build_model
from entprune.path import SparsityPath
from entprune.predictions import is_correct, predict
from entprune.pruning import candidate_job
from entprune.runner import InProcessRunner
from entprune.stages import ImageSet, Network, analyse, calibrate, solve

_TRACING = threading.Lock()  # torch.fx patches all modules while it traces one
_PLAIN = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedNetwork:
    """One trained network.

    Attributes:
        name: of it in results; that of the built-in model unless `model` says otherwise.
        checkpoint: file name.
        data: built-in data set; `DATA.npz` in the data folder takes its place where it exists.
        mean, std: with which it was trained, None for the data set's usual ones.
        parameters_removed, macs_removed: budgets of the comparison.
        model: built-in model, where several trained networks share one.
    """

    name: str
    checkpoint: str
    data: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    parameters_removed: tuple[float, ...]
    macs_removed: tuple[float, ...]
    model: str = ""

    @property
    def model_spec(self) -> str:
        """How the unpruned network is built."""
        return self.model or self.name

    def budgets(self) -> tuple[Budget, ...]:
        """Of the comparison, the middle of each kind first."""
        sizes = [Budget(parameters_removed=value) for value in _middle_first(self.parameters_removed)]
        return (*sizes, *(Budget(macs_removed=value) for value in _middle_first(self.macs_removed)))

    def load_data(self, folder: Path) -> ImageData:
        """Images of the data set, from its `.npz` file or torchvision's layout."""
        packed = folder / f"{self.data}.npz"
        spec = f"npz:{packed}" if packed.is_file() else self.data
        return load_data(spec, root=folder, mean=self.mean, std=self.std, download=False)


def _middle_first(values: tuple[float, ...]) -> list[float]:
    middle = values[len(values) // 2]
    return [middle, *(value for value in values if value != middle)]


def _cifar(name: str, norm: tuple[tuple[float, ...], ...], **budgets: tuple[float, ...]) -> TrainedNetwork:
    checkpoint = f"{name.removesuffix('_cifar')}_cifar10.pt"
    mean, std = norm
    return TrainedNetwork(name=name, checkpoint=checkpoint, data="cifar10", mean=mean, std=std, **budgets)


NETWORKS: dict[str, TrainedNetwork] = {
    network.name: network
    for network in (
        TrainedNetwork(
            name="lenet", checkpoint="lenet_mnist.pt", data="mnist",
            parameters_removed=(0.85, 0.92, 0.96), macs_removed=(0.7, 0.85),
        ),
        _cifar("vgg16_cifar", _PLAIN, parameters_removed=(0.75, 0.85, 0.91), macs_removed=(0.45,)),
        _cifar("resnet18_cifar", _PLAIN, parameters_removed=(0.65, 0.75, 0.82), macs_removed=(0.4,)),
        _cifar("resnet56_cifar", _IMAGENET, parameters_removed=(0.3,), macs_removed=(0.3, 0.45, 0.53)),
    )
}  # fmt: skip


# Trained by the part `dense`, longer than those above, as people train before they prune.
LONG_TRAINED: dict[str, TrainedNetwork] = {
    f"{network.name}_long": replace(
        network, name=f"{network.name}_long", model=network.name, checkpoint=f"{network.name}_long.pt"
    )
    for network in (NETWORKS["vgg16_cifar"], NETWORKS["resnet18_cifar"])
}


def find_network(name: str) -> TrainedNetwork:
    """The network of that name; ConfigError if there is none."""
    everything = NETWORKS | LONG_TRAINED
    if name not in everything:
        raise ConfigError(f"network: expected one of {', '.join(everything)}, got {name!r}.")
    return everything[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Folders:
    """Where the inputs lie.

    Attributes:
        data: data sets.
        checkpoints: trained networks.
    """

    data: Path
    checkpoints: Path


class Bench:
    """One network with its images; statistics and paths are computed when first asked for, and then kept.

    Args:
        entry: which network.
        model: with its trained weights.
        data: its images.
        config: settings; its seed draws the splits, and numbers of images that it leaves open follow from the network.
        checkpoint_sha256: of the file that the weights came from.
    """

    def __init__(
        self, entry: TrainedNetwork, model: nn.Module, data: ImageData, config: PruneConfig, checkpoint_sha256: str
    ) -> None:
        self.entry, self.model, self.data = entry, model, data
        self.network: Network = analyse(model, data.input_shape, config)
        self.config = config = config.sized_for(self.network.dense_macs())
        self.facts = {"checkpoint_sha256": checkpoint_sha256, "data_sha256": data.sha256}
        self._runner = InProcessRunner(threads=config.threads)
        calibration, validation = split_training(
            data,
            calibration=config.calibration_samples or 0,
            validation=config.validation_samples or 0,
            seed=config.seed,
        )
        self.calibration = ImageSet(split=data.train, indices=calibration)
        self.validation = ImageSet(split=data.train, indices=validation)
        self.test = ImageSet(split=data.test, indices=np.arange(len(data.test)))

    @cached_property
    def statistics(self) -> dict[str, LayerStatistics]:
        """Moments and answers of every layer on the calibration images."""
        return calibrate(self.network, self.calibration, self.config, self._runner)

    @cached_property
    def paths(self) -> Mapping[str, SparsityPath]:
        """This project's sparsity paths."""
        return solve(self.network, self.statistics, self.config, self._runner)

    @cached_property
    def job(self) -> CandidateJob:
        """What the assembly reads; nothing is scored on validation images."""
        everything = Budget(parameters_removed=0.0)
        return candidate_job(
            self.network, self.calibration, self.statistics, None, everything, self.config, self._runner
        )

    def outcomes(self, model: nn.Module) -> np.ndarray:
        """(n,) bool: which test images are classified correctly; the end of a cell, never a basis of a choice."""
        logits = predict(model, self.test, self.config, self._runner, stage="test")
        return is_correct(logits, self.test)

    def accuracy(self, model: nn.Module) -> float:
        """Percent of the test images classified correctly."""
        return 100.0 * float(self.outcomes(model).mean())


def load_bench(entry: TrainedNetwork, folders: Folders, config: PruneConfig) -> Bench:
    """Read checkpoint and images of one network.

    Raises:
        CheckpointError, DataError: they are missing or do not fit.
    """
    checkpoint = folders.checkpoints / entry.checkpoint
    data = entry.load_data(folders.data)
    model = build_model(entry.model_spec, num_classes=data.num_classes, input_shape=data.input_shape)
    with _TRACING:
        return Bench(entry, load_checkpoint(model, checkpoint), data, config, sha256_file(checkpoint))
