"""Fine-tuning of a pruned network with the dense one as its teacher.

Formula: loss = w T^2 KL(softmax(t / T) || softmax(s / T)) + (1 - w) CE(s, label), with student logits s, teacher
logits t, temperature T and distillation weight w. The factor T^2 keeps the gradient's size independent of T.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entprune.datasets import ImageSplit
from entprune.evaluation import Progress, resolve_device
from entprune.memory_format import fastest_format, lay_out
from entprune.resumption import TrainingState
from entprune.training import OnEpoch, TrainConfig, fit, require


@dataclass(frozen=True, kw_only=True, slots=True)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
        epochs: passes over the training images.
        batch_size: images in one step.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: of the weights of convolutions and linear layers.
        optimiser: ``"sgd"`` or ``"adamw"``.
        temperature: T, softens both distributions.
        distillation_weight: w in [0, 1]; 0 ignores the teacher, 1 the labels.
        augment: whether to shift and mirror the images at random.
        clip_norm: a longer gradient is cut to this norm; None leaves it. Answers at temperature T pull up to T
            times as hard as labels, too hard for the few steps of a small data set.
        seed: of order, augmentation and dropout.
        device: where to train, such as ``"cpu"`` or ``"cuda"``.
        amp: bfloat16 autocast; None means wherever the device computes in it natively.
    """

    epochs: int = 3
    batch_size: int = 128
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    optimiser: str = "sgd"
    temperature: float = 4.0
    distillation_weight: float = 0.9
    augment: bool = True
    clip_norm: float | None = 5.0
    seed: int = 0
    device: str = "cpu"
    amp: bool | None = None

    def __post_init__(self) -> None:
        """Check the ranges; raises ConfigError."""
        require(0 < self.temperature < math.inf, f"temperature > 0, got {self.temperature}")
        require(0 <= self.distillation_weight <= 1, f"distillation_weight in [0, 1], got {self.distillation_weight}")
        self.to_train_config()

    def to_train_config(self) -> TrainConfig:
        """Return the part that any training needs, its ranges checked."""
        return TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            optimiser=self.optimiser,
            augment=self.augment,
            clip_norm=self.clip_norm,
            seed=self.seed,
            device=self.device,
            amp=self.amp,
        )


def finetune(
    student: nn.Module,
    teacher: nn.Module,
    split: ImageSplit,
    config: FinetuneConfig,
    *,
    validation_indices: npt.NDArray[np.int64] | None = None,
    progress: Progress | None = None,
    state: TrainingState | None = None,
    on_epoch: OnEpoch | None = None,
    last_epoch: int | None = None,
) -> nn.Module:
    """Fine-tune a copy of the student; neither network is changed.

    Args:
        student: the pruned network.
        teacher: the dense network it came from.
        split: the training images.
        config: the recipe. The same seed, device and thread count give the same network.
        validation_indices: images of the split that must not be trained on.
        progress: called after each step with the steps done, their total and a text.
        state, on_epoch, last_epoch: to go on with an interrupted run, see :func:`entprune.training.fit`.

    Returns:
        The fine-tuned network in evaluation mode, on the student's device.

    Raises:
        ArtifactError: the state is that of another network.
        ConfigError: the device is unusable, or the loss stopped being finite.
        DataError: fewer than two images are left to train on.
    """
    excluded = np.empty(0, dtype=np.int64) if validation_indices is None else validation_indices
    indices = np.setdiff1d(np.arange(len(split)), excluded)
    tuned = copy.deepcopy(student).requires_grad_()
    guide = _Teacher(teacher, config.device)

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        if config.distillation_weight == 0:  # the teacher costs more than the student
            return F.cross_entropy(logits, labels)
        return distillation_loss(logits, guide(images), labels, config.temperature, config.distillation_weight)

    settings = config.to_train_config()
    fit(tuned, split, indices, loss, settings, progress, state=state, on_epoch=on_epoch, last_epoch=last_epoch)
    return tuned


class _Teacher:
    """A frozen copy of the dense network in the memory format that suits it."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self._model = copy.deepcopy(model).to(resolve_device(device)).eval().requires_grad_(requires_grad=False)
        self._format: torch.memory_format | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits (n, classes), float32, of images on the device."""
        if self._format is None:
            self._format = fastest_format(self._model, images[:2])
            lay_out(self._model, self._format)
        with torch.no_grad():
            logits: Tensor = self._model(images.contiguous(memory_format=self._format))
            return logits.float()


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, distillation_weight: float
) -> Tensor:
    """Return the mean loss of the formula above over n samples.

    Args:
        logits: s, (n, classes).
        teacher_logits: t, (n, classes).
        labels: (n,).
        temperature: T > 0.
        distillation_weight: w in [0, 1].
    """
    divergence = F.kl_div(
        F.log_softmax(logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return distillation_weight * temperature**2 * divergence + (1 - distillation_weight) * F.cross_entropy(
        logits, labels
    )
