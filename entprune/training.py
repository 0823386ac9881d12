"""Training by a plain recipe: one cycle of the learning rate, light augmentation, bfloat16 where it is native.

Axes: n samples, c channels, h and w pixels.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entprune.augmentation import augment
from entprune.datasets import ImageData, ImageSplit
from entprune.datasets.resident import place_images
from entprune.errors import ConfigError, DataError
from entprune.evaluation import Progress, accuracy, has_native_bfloat16, locate_model, resolve_device
from entprune.memory_format import fastest_format, lay_out, thin_norms_by_channel
from entprune.replay import RECORDING, ReplayedStep, Step
from entprune.resumption import TrainingState, capture_arrays, restore_arrays

# (logits, augmented images, labels) of one batch -> loss
LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
OnEpoch = Callable[[TrainingState], None]

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
        clip_norm: a longer gradient of all parameters together is cut to this norm; None leaves it.
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
    clip_norm: float | None = None
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
        require(self.clip_norm is None or self.clip_norm > 0, f"clip_norm > 0 or None, got {self.clip_norm}")


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
    return TrainResult(model=trained, history=history, accuracy=accuracy(trained, data.test, device=config.device))


def fit(
    model: nn.Module,
    split: ImageSplit,
    indices: npt.NDArray[np.int64],
    loss_function: LossFunction,
    config: TrainConfig,
    progress: Progress | None = None,
    *,
    state: TrainingState | None = None,
    on_epoch: OnEpoch | None = None,
    last_epoch: int | None = None,
) -> tuple[EpochRecord, ...]:
    """Minimise a loss over some images, changing the network in place; errors as for :func:`train`.

    Args:
        model: the network, changed in place.
        split: where the images come from.
        indices: which of them are trained on.
        loss_function: gets logits (n, classes), augmented images (n, c, h, w) and labels (n,) on the training device.
        config: the recipe; its label smoothing is up to the loss function.
        progress: called after each step with the steps done, their total and a text.
        state: of the same run after some epoch; it goes on from there and ends with the weights, bit by bit, that it
            would have had undisturbed.
        on_epoch: called after each epoch with the state to go on from.
        last_epoch: stop after this one, with the schedule of all of them.

    Returns:
        One record for each epoch. The network is left in evaluation mode, on the device it came from.

    Raises:
        ArtifactError: the state is that of another network.
    """
    if len(indices) < 2:
        raise DataError(f"training: expected at least 2 images, got {len(indices)}; give more training data.")
    home, device = locate_model(model), resolve_device(config.device)
    model.to(device).train()
    steps_per_epoch = max(1, len(indices) // config.batch_size)
    with _seeded_dropout(config.seed, device):
        loop = _Loop(model, split, loss_function, config, device, config.epochs * steps_per_epoch)
        loop.use_fastest_format(indices[:2])
        if state is not None:
            loop.restore(state)
        with thin_norms_by_channel(model, loop.memory_format):
            for epoch in range(len(loop.history) + 1, (last_epoch or config.epochs) + 1):
                loop.history.append(_run_epoch(loop, epoch, _batches(loop, indices, steps_per_epoch), progress))
                _check_finite(loop.history[-1], config)
                if on_epoch is not None:
                    on_epoch(loop.capture())
    lay_out(model.to(home), torch.contiguous_format).eval()
    return tuple(loop.history)


def _check_finite(record: EpochRecord, config: TrainConfig) -> None:
    if not math.isfinite(record.loss):
        raise ConfigError(
            f"training diverged in epoch {record.epoch}: expected a finite loss, got {record.loss}; "
            f"lower the learning rate (now {config.learning_rate})."
        )


def one_cycle(step: int, total_steps: int) -> float:
    """Return the learning rate of a step as a fraction of its peak: a linear rise over a quarter, then half a cosine.

    Args:
        step: from 0.
        total_steps: length of the schedule; 0 < result <= 1 for every step below it.
    """
    warm_up_steps = max(1, round(_WARM_UP_FRACTION * total_steps))
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    elapsed = (step + 1 - warm_up_steps) / (total_steps + 1 - warm_up_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, elapsed)))


def require(condition: bool, expectation: str) -> None:
    """Check a setting; the expectation reads "epochs >= 1, got 0".

    Raises:
        ConfigError: the condition does not hold.
    """
    if not condition:
        raise ConfigError(f"training: expected {expectation}.")


class _Loop:
    """One training run: what a step reads and moves on."""

    def __init__(
        self,
        model: nn.Module,
        split: ImageSplit,
        loss_function: LossFunction,
        config: TrainConfig,
        device: torch.device,
        total_steps: int,
    ) -> None:
        self.model, self.split, self.loss_function = model, split, loss_function
        self.config, self.device, self.total_steps = config, device, total_steps
        self.is_mixed = has_native_bfloat16(str(device)) if config.amp is None else config.amp
        self.memory_format = torch.contiguous_format
        self.rate = torch.zeros((), device=device) if device.type == "cuda" else None  # a recorded step reads it there
        self.optimiser = _make_optimiser(model, config, self.rate)
        self.images = place_images(split, device)
        self.learn: Step = self._learn if self.rate is None else ReplayedStep(self._learn, device)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.order_generator = np.random.default_rng(config.seed)
        self.steps = 0
        self.history: list[EpochRecord] = []

    def step(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """Train on one batch; returns its loss and its number of correct images, (2,), on the training device."""
        images, labels = self._fetch(indices)
        images = augment(images, self.generator) if self.config.augment else images
        self._set_rate(self.config.learning_rate * one_cycle(self.steps, self.total_steps))
        self.steps += 1
        return self.learn(images.contiguous(memory_format=self.memory_format), labels)

    def _fetch(self, indices: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        if self.images is not None:
            return self.images.batch(indices)
        labels = torch.from_numpy(self.split.labels[indices])
        return self.split.batch(indices).to(self.device), labels.to(self.device)

    def _set_rate(self, rate: float) -> None:
        if self.rate is not None:
            self.rate.fill_(rate)
        for group in self.optimiser.param_groups:  # a restored optimiser has its own
            group["lr"] = rate if self.rate is None else self.rate

    def _learn(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_mixed):
            logits = self.model(images).float()
            loss = self.loss_function(logits, images, labels)
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimiser.step()
        return torch.stack((loss.detach(), (logits.detach().argmax(dim=1) == labels).sum()))

    def capture(self) -> TrainingState:
        """The state to go on from."""
        content = {
            "epoch": len(self.history),
            "steps": self.steps,
            "history": [asdict(record) for record in self.history],
            "order": self.order_generator.bit_generator.state,
        }
        generators = {"augmentation": self.generator.get_state(), "cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        return TrainingState(arrays=capture_arrays(self.model, self.optimiser, generators), content=content)

    def restore(self, state: TrainingState) -> None:
        """Go on from a state."""
        generators = restore_arrays(state.arrays, self.model, self.optimiser)
        self.generator.set_state(generators["augmentation"])
        torch.set_rng_state(generators["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(generators["cuda"], self.device)
        self.order_generator.bit_generator.state = dict(state.content["order"])
        self.steps = int(state.content["steps"])
        self.history = [EpochRecord(**entry) for entry in state.content["history"]]

    def use_fastest_format(self, indices: npt.NDArray[np.int64]) -> None:
        """Choose by a trial on some images; the generators draw the same numbers whether or not it drew some."""
        images = self.split.batch(indices).to(self.device)
        with _forked_generators(self.device), torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_mixed):
            self.memory_format = fastest_format(self.model, images)
        lay_out(self.model, self.memory_format)


def _batches(loop: _Loop, indices: npt.NDArray[np.int64], num_batches: int) -> list[npt.NDArray[np.int64]]:
    """The images of the next epoch in a new order; those of a last batch that is not full are left out."""
    order, size = loop.order_generator.permutation(indices), loop.config.batch_size
    return [order[start : start + size] for start in range(0, num_batches * size, size)]


def _run_epoch(
    loop: _Loop, epoch: int, batches: Sequence[npt.NDArray[np.int64]], progress: Progress | None
) -> EpochRecord:
    start = time.perf_counter()
    tally = torch.zeros(2, device=loop.device)  # sum of losses, number of correct images
    for position, indices in enumerate(batches, start=1):
        tally += loop.step(indices)
        if progress is not None:
            progress((epoch - 1) * len(batches) + position, loop.total_steps, f"training, epoch {epoch}")
    loss_sum, num_correct = tally.tolist()
    return EpochRecord(
        epoch=epoch,
        loss=loss_sum / len(batches),
        accuracy=100.0 * num_correct / sum(len(indices) for indices in batches),
        seconds=time.perf_counter() - start,
    )


def _make_optimiser(model: nn.Module, config: TrainConfig, rate: Tensor | None) -> torch.optim.Optimizer:
    """The optimiser, and where a tensor holds the learning rate, one that reads it on the device."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    lr, on_device = (config.learning_rate, None) if rate is None else (rate, True)
    if config.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=on_device, capturable=on_device is not None)
    return torch.optim.SGD(groups, lr=lr, momentum=_MOMENTUM, nesterov=True, fused=on_device)


@contextmanager
def _seeded_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators that dropout draws from, and put their state back."""
    with _forked_generators(device):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with RECORDING, torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _forked_generators(device: torch.device) -> Iterator[None]:
    """Put the state of the global generators back afterwards."""
    fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else ())
    with ExitStack() as stack:
        with RECORDING:
            stack.enter_context(fork)
        try:
            yield
        finally:
            with RECORDING:
                stack.close()
