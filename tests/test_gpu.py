"""On a CUDA device: training by replay ends where training step by step ends, and a network is pruned there."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import entprune
from entprune import replay
from entprune.config import Budget, PruneConfig
from entprune.datasets import ArraySplit, load_data
from entprune.evaluation import accuracy
from entprune.finetune import FinetuneConfig, finetune
from entprune.models import build_model
from entprune.resumption import TrainingState
from entprune.training import TrainConfig, fit, train

pytestmark = pytest.mark.gpu


def make_split(num_images: int = 512) -> ArraySplit:
    """Colour images whose class is the brightest channel."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, num_images)
    images = generator.integers(0, 128, (num_images, 3, 32, 32), dtype=np.uint8)
    images[np.arange(num_images), labels] += 40
    return ArraySplit(images=images, labels=labels, mean=(0.3,) * 3, std=(0.2,) * 3)


def make_model() -> nn.Module:
    return build_model("resnet20_cifar", num_classes=3, input_shape=(3, 32, 32))


def cross_entropy(logits: Tensor, _: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def config(**settings: Any) -> TrainConfig:
    defaults = {"epochs": 2, "batch_size": 32, "learning_rate": 0.02, "device": "cuda", "amp": False}
    return TrainConfig(**defaults | settings)


def fitted(settings: TrainConfig, loss: Any = cross_entropy, **options: Any) -> nn.Module:
    model, split = make_model(), make_split()
    fit(model, split, np.arange(len(split)), loss, settings, **options)
    return model


def distance(first: nn.Module, second: nn.Module) -> float:
    """Of the weights, relative."""
    a, b = (torch.cat([value.double().flatten() for value in net.state_dict().values()]) for net in (first, second))
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_replayed_steps_train_as_launched_ones_do(monkeypatch: pytest.MonkeyPatch, optimiser: str) -> None:
    settings = config(optimiser=optimiser, learning_rate=0.02 if optimiser == "sgd" else 0.001)
    replayed = fitted(settings)
    monkeypatch.setattr(replay, "_STEPS_BEFORE", 10**9)
    launched = fitted(settings)
    assert distance(replayed, launched) < 2e-3
    assert distance(launched, make_model()) > 2e-2


def test_steps_are_replayed_where_nothing_forbids_it() -> None:
    calls: list[int] = []

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return cross_entropy(logits, images, labels)

    fitted(config(), loss)  # 32 steps: three launched ones, and the recorded one
    assert len(calls) == 4


def test_a_step_that_reads_a_value_back_is_launched_each_time() -> None:
    values: list[float] = []

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        result = cross_entropy(logits, images, labels)
        values.append(float(result.detach()))
        return result

    model = fitted(config(), loss)
    assert len(values) == 32
    assert values[-1] < values[0] / 2
    assert accuracy(model, make_split()) > 90


def test_replay_learns_in_bfloat16_with_a_teacher() -> None:
    split = make_split()
    teacher = fitted(config(epochs=4, amp=None))
    assert accuracy(teacher, split) > 95
    settings = FinetuneConfig(epochs=4, batch_size=32, device="cuda", learning_rate=0.05)
    student = finetune(make_model(), teacher, split, settings)
    assert accuracy(student, split) > 95


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_resumed_run_ends_where_the_undisturbed_one_does(optimiser: str) -> None:
    settings, states = config(optimiser=optimiser, learning_rate=0.002), list[TrainingState]()
    whole = fitted(settings, on_epoch=states.append)
    resumed = fitted(settings, state=states[0])
    assert distance(whole, resumed) < 2e-3


def test_images_that_are_on_the_device_are_those_of_the_split() -> None:
    seen: dict[type, list[Tensor]] = {ArraySplit: [], Wrapped: []}
    for split in (make_split(), Wrapped(make_split())):
        batches = seen[type(split)]

        def loss(logits: Tensor, images: Tensor, labels: Tensor, batches: list[Tensor] = batches) -> Tensor:
            batches.extend((images.cpu(), labels.cpu()))  # reading back: every step calls this
            return logits.sum()

        fit(make_model(), split, np.arange(64), loss, config(epochs=1))  # type: ignore[arg-type]
    assert len(seen[ArraySplit]) == 4
    for resident, brought in zip(*seen.values(), strict=True):
        torch.testing.assert_close(resident, brought)  # the device divides a little otherwise


class Wrapped:
    """A split of an unknown class, as users bring them."""

    def __init__(self, split: ArraySplit) -> None:
        self._split, self.labels, self.batch = split, split.labels, split.batch

    def __len__(self) -> int:
        return len(self._split)


def test_pruning_on_the_device_agrees_with_the_cpu() -> None:
    data = load_data("digits")
    network = build_model("digits_cnn", num_classes=10, input_shape=data.input_shape)
    dense = train(network, data, TrainConfig(epochs=6, device="cuda")).model
    results = [
        entprune.prune(
            copy.deepcopy(dense), data.train, budget=Budget(parameters_removed=0.6), test=data.test,
            config=PruneConfig(device=device),
        ).report["one_shot"]
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    assert results[0]["parameters_removed"] == pytest.approx(results[1]["parameters_removed"], abs=0.01)
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=1.5)
