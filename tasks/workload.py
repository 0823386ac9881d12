"""What the stages of a run have in common: images and network, the engine, and what makes a stage a Prefect task."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from torch import nn

from entprune.artifact import ModelCard
from entprune.calibration import LayerStatistics
from entprune.candidates import answers_only
from entprune.config import Budget, PruneConfig
from entprune.datasets import ArraySplit, ImageData, ImageSplit, choose_validation, split_training
from entprune.errors import EntpruneError
from entprune.predictions import with_perturbed
from entprune.stages import ImageSet, Network, analyse
from tasks.actors import RayRunner
from tasks.keys import StageKeys, hash_images, hash_network
from tasks.progress import StageClock
from tasks.store import Store

P = ParamSpec("P")
R = TypeVar("R")


class Inputs(Protocol):
    """What a run works on, loaded and checked."""

    @property
    def data(self) -> ImageData:
        """Images and labels."""

    @property
    def network(self) -> Network:
        """The analysed dense network."""

    @property
    def checkpoint_sha256(self) -> str:
        """Of the file that its weights came from."""


class Workload:
    """Everything that a run's stages read. No dataclass: Prefect walks through those in search of futures.

    Attributes:
        network: dense.
        data: whole data set.
        checkpoint_sha256: of the file that the weights came from.
        calibration, validation, test: images of each purpose, cut out of their splits.
        validation_split: of the data that the validation images are from, "validation" or "train".
        validation_indices: of the validation images in the train split; none if they are from the other.
        config, budget: what is asked.
        keys: of stored results.
    """

    def __init__(self, inputs: Inputs, config: PruneConfig, budget: Budget) -> None:
        self.network, self.data, self.checkpoint_sha256 = inputs.network, inputs.data, inputs.checkpoint_sha256
        self.config = config = decided(config, inputs)
        self.budget = budget
        count = config.validation_samples or 0
        calibration, self.validation_indices = split_training(
            self.data,
            calibration=config.calibration_samples or 0,
            validation=count if self.data.validation is None else 0,
            seed=config.seed,
        )
        self.validation_split, split, chosen = "train", self.data.train, self.validation_indices
        if self.data.validation is not None:
            self.validation_split, split = "validation", self.data.validation
            chosen = choose_validation(self.data, number=count, seed=config.seed)
        everything = np.arange(len(self.data.test))
        self.calibration = cut_out(self.data.train, calibration)
        self.validation = with_perturbed(cut_out(split, chosen), config)
        self.test = ImageSet(split=self.data.test, indices=everything)
        self.keys = StageKeys(
            network=hash_network(self.network.model),
            calibration=hash_images(self.data, "train", calibration),
            validation=hash_images(
                self.data, self.validation_split, chosen, config.perturbed_share or 0.0, config.seed
            ),
            test=hash_images(self.data, "test", everything),
            config=config,
        )

    def start_round(self, model: nn.Module, budget: Budget) -> Workload:
        """The same images and settings for a network that was pruned and tuned before."""
        later = copy.copy(self)
        later.budget = budget
        if model is not self.network.model:
            later.network = analyse(model, self.network.input_shape, self.config)
            later.keys = dataclasses.replace(self.keys, network=hash_network(later.network.model))
        return later

    def tunes_on_validation(self, num_rounds: int) -> bool:
        """Whether fine-tuning reads the validation images, too: training images on which no tuned network is judged.

        Only rounds with an accuracy budget judge tuned networks.
        """
        is_judged = num_rounds > 1 and self.budget.max_accuracy_drop is not None
        return len(self.validation_indices) > 0 and not is_judged

    def card(self, model_spec: str) -> ModelCard:
        """What the portable artifact needs to know."""
        data = self.data
        return ModelCard(
            model_spec=model_spec,
            num_classes=data.num_classes,
            input_shape=data.input_shape,
            mean=data.mean,
            std=data.std,
            class_names=data.class_names,
        )


def decided(config: PruneConfig, inputs: Inputs) -> PruneConfig:
    """The settings with what was left open decided by the network and the data."""
    return config.sized_for(inputs.network.dense_macs(), has_unseen=inputs.data.validation is not None)


def cut_out(split: ImageSplit, indices: np.ndarray) -> ImageSet:
    """The chosen images alone, so that workers are not sent the rest; of a split in memory only."""
    if not isinstance(split, ArraySplit):
        return ImageSet(split=split, indices=indices)
    cut = dataclasses.replace(split, images=split.images[indices], labels=split.labels[indices])
    return ImageSet(split=cut, indices=np.arange(len(indices)))


class Calibration:
    """Statistics of every layer, whose moments can be let go: Prefect holds on to what a task returned until the end.

    Attributes:
        statistics: per layer.
    """

    def __init__(self, statistics: dict[str, LayerStatistics]) -> None:
        self.statistics = statistics

    def drop_moments(self, network: Network) -> None:
        """Keep what candidates need alone."""
        self.statistics = answers_only(self.statistics, network)


class Engine:
    """What carries out a run's stages. No dataclass, for the same reason.

    Attributes:
        runner: hands units to workers.
        store: results of this and earlier runs.
        clock: times stages and passes on progress.
        finetune_threads: torch threads of a unit that has the cluster to itself.
    """

    def __init__(self, runner: RayRunner, store: Store, clock: StageClock, *, finetune_threads: int = 1) -> None:
        self.runner, self.store, self.clock = runner, store, clock
        self.finetune_threads = finetune_threads

    @contextmanager
    def counting(self, step: str, number: int, total: int) -> Iterator[None]:
        """Report the one unit that is run inside as one of several that follow each other."""
        before = self.runner.progress
        self.runner.progress = lambda *_: self.clock.advance(step, number, total)
        try:
            yield
        finally:
            self.runner.progress = before


def is_worth_retrying(_: Any, __: Any, state: Any) -> bool:
    """Whether a failed task may succeed if it is run again: never where the library has said what is wrong."""
    error = getattr(state.data, "result", state.data)
    return not isinstance(error, EntpruneError)


def stage_task(name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """A Prefect task; the store keeps results, because Prefect would have to pickle handles, networks and moments."""
    return task(name=name, cache_policy=NO_CACHE, persist_result=False, retries=1, retry_condition_fn=is_worth_retrying)
