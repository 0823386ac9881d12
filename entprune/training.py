"""Training by a plain recipe: one cycle of the learning rate, light augmentation, label smoothing, bfloat16 where it is native.

Axes: n samples, c channels, h and w pixels.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entprune.datasets import ImageData, ImageSplit
from entprune.errors import ConfigError, DataError
from entprune.evaluation import Progress, accuracy, locate_model, resolve_device

# (logits, augmented images, labels) of one batch -> loss
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]

_WARM_UP_FRACTION = 0.25
_MOMENTUM = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train.

    Attributes:
        epochs: passes over the training images.
        batch_size: images in one step; a last, smaller batch is left out of the epoch.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: of the weights of convolutions and linear layers; biases and BatchNorm have none.
        optimiser: ``"sgd"`` (Nesterov momentum 0.9) or ``"adamw"``, which wants a peak near 0.002.
        label_smoothing: probability mass spread over all classes, in [0, 1).
        augment: whether to shift the images at random, and to mirror those with 3 channels.
        seed: of order, augmentation and dropout.
        device: where to train, such as ``"cpu"`` or ``"cuda"``.
        amp: bfloat16 autocast; None means wherever the device computes in it natively.
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    optimiser: str = "sgd"
    label_smoothing: float = 0.0
    augment: bool = True
    seed: int = 0
    device: str = "cpu"
    amp: bool | None = None

    def __post_init__(self) -> None:
        """Check the ranges; raises ConfigError."""
        require(self.epochs >= 1, f"epochs >= 1, got {self.epochs}")
        require(self.batch_size >= 2, f"batch_size >= 2, got {self.batch_size}")
        require(0 < self.learning_rate < math.inf, f"learning_rate > 0, got {self.learning_rate}")
        require(0 <= self.weight_decay < math.inf, f"weight_decay >= 0, got {self.weight_decay}")
        require(self.optimiser in {"sgd", "adamw"}, f"optimiser 'sgd' or 'adamw', got '{self.optimiser}'")
        require(0 <= self.label_smoothing < 1, f"label_smoothing in [0, 1), got {self.label_smoothing}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochRecord:
    """What one epoch did.

    Attributes:
        epoch: its number, from 1.
        loss: mean over the steps.
        accuracy: top-1 on the augmented training images, percent.
        seconds: duration.
    """

    epoch: int
    loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainResult:
    """A trained network and how it got there.

    Attributes:
        model: in evaluation mode, on the device of the network that was given.
        history: one record for each epoch.
        accuracy: top-1 on the test split, percent.
    """

    model: nn.Module
    history: tuple[EpochRecord, ...]
    accuracy: float


def train(model: nn.Module, data: ImageData, config: TrainConfig, progress: Progress | None = None) -> TrainResult:
    """Train a copy of a network on the train split and measure it on the test split.

    Args:
        model: the network with its initial parameters; it is not changed.
        data: what to train and test on.
        config: the recipe. The same seed, device and thread count give the same network.
        progress: called after each step with the steps done, their total and a text.

    Raises:
        ConfigError: the device is unusable, or the loss stopped being finite.
        DataError: there are fewer than two training images.
    """

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001 -- one signature for all losses
        return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)

    trained = copy.deepcopy(model)
    history = fit(trained, data.train, np.arange(len(data.train)), loss, config, progress)
    return TrainResult(
        model=trained, history=history, accuracy=accuracy(trained, data.test, device=config.device)
    )


def fit(
    model: nn.Module,
    split: ImageSplit,
    indices: npt.NDArray[np.int64],
    loss_function: LossFunction,
    config: TrainConfig,
    progress: Progress | None = None,
) -> tuple[EpochRecord, ...]:
    """Minimise a loss over some images, changing the network in place; arguments and errors as for :func:`train`.

    Args:
        indices: which images of the split are trained on.
        loss_function: gets logits (n, classes), the augmented images (n, c, h, w) and labels (n,) on the training device.

    Returns:
        One record for each epoch. The network is left in evaluation mode, on the device it came from.
    """
    if len(indices) < 2:
        raise DataError(f"training: expected at least 2 images, got {len(indices)}; give more training data.")
    home, device = locate_model(model), resolve_device(config.device)
    model.to(device).train()
    optimiser = _make_optimiser(model, config)
    steps_per_epoch = max(1, len(indices) // config.batch_size)
    total_steps = config.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: one_cycle(step, total_steps))
    is_mixed = has_native_bfloat16(device) if config.amp is None else config.amp
    history: list[EpochRecord] = []
    with _seeded(config.seed, device) as (order_generator, generator):
        for epoch in range(1, config.epochs + 1):
            start, tally = time.perf_counter(), torch.zeros(2, device=device)  # sum of losses, number correct
            order = indices[order_generator.permutation(len(indices))]
            for step in range(steps_per_epoch):
                chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
                images = split.batch(chosen).to(device)
                images = augment(images, generator) if config.augment else images
                labels = torch.from_numpy(split.labels[chosen]).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=is_mixed):
                    logits = model(images)
                    loss = loss_function(logits.float(), images, labels)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimiser.step()
                schedule.step()
                with torch.no_grad():
                    tally += torch.stack((loss.detach(), (logits.argmax(dim=1) == labels).sum()))
                _report(progress, (epoch - 1) * steps_per_epoch + step + 1, total_steps, epoch, history)
            num_seen = min(len(indices), steps_per_epoch * config.batch_size)
            history.append(_record_epoch(epoch, tally, steps_per_epoch, num_seen, time.perf_counter() - start))
            _require_finite(history[-1], config)
    model.to(home).eval()
    return tuple(history)
