"""Fine-tuning: the loss is the formula, the student approaches the teacher, validation images stay unseen."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from entprune import Budget, prune
from entprune.datasets import ArraySplit, load_data
from entprune.errors import ArtifactError, ConfigError, DataError
from entprune.evaluation import accuracy
from entprune.finetune import FinetuneConfig, distillation_loss, finetune
from entprune.models import build_model
from entprune.resumption import TrainingState
from entprune.storage import load_training, save_training
from entprune.training import TrainConfig, train


def make_split(num_images: int = 48) -> ArraySplit:
    generator = np.random.default_rng(0)
    images = generator.normal(size=(num_images, 1, 4, 4)).astype(np.float32)
    return ArraySplit(images=images, labels=np.arange(num_images, dtype=np.int64) % 3, mean=(0.0,), std=(1.0,))


def make_network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16 * width, 3)).eval()


def is_same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


def distance(student: nn.Module, teacher: nn.Module, split: ArraySplit) -> float:
    images = split.batch(np.arange(len(split)))
    with torch.no_grad():
        return float((student(images).softmax(1) - teacher(images).softmax(1)).abs().mean())


def test_an_epoch_on_few_images_does_not_undo_the_pruning() -> None:
    data = load_data("digits")
    network = build_model("digits_cnn", num_classes=10, input_shape=data.input_shape)
    dense = train(network, data, TrainConfig(epochs=10)).model
    pruned = prune(dense, data.train.batch(np.arange(600)), budget=Budget(parameters_removed=0.97)).model
    clipped, torn = (
        accuracy(finetune(pruned, dense, data.train, replace(FinetuneConfig(epochs=1), **setting)), data.test)
        for setting in ({}, {"clip_norm": None})
    )
    assert clipped > accuracy(pruned, data.test) - 5.0
    assert torn < clipped  # 57 to 84 % against 97 to 98 with three seeds when this was written


def test_loss_is_the_formula() -> None:
    student, teacher, labels = torch.randn(5, 4), torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    temperature, weight = 3.0, 0.7
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    entropy = -student.log_softmax(1)[range(5), labels].mean()
    expected = weight * temperature**2 * divergence + (1 - weight) * entropy
    torch.testing.assert_close(distillation_loss(student, teacher, labels, temperature, weight), expected)


def test_loss_of_a_perfect_copy_is_zero_without_labels() -> None:
    logits = torch.randn(5, 4)
    assert float(distillation_loss(logits, logits, torch.zeros(5, dtype=torch.long), 4.0, 1.0)) == pytest.approx(0)


def test_student_approaches_the_teacher_and_neither_argument_changes() -> None:
    split, teacher, student = make_split(), make_network(8, seed=1), make_network(4, seed=2)
    teacher_before, student_before = copy.deepcopy(teacher), copy.deepcopy(student.requires_grad_(False))
    config = FinetuneConfig(epochs=30, batch_size=16, learning_rate=0.05, distillation_weight=1.0, augment=False)
    tuned = finetune(student, teacher, split, config)
    assert distance(tuned, teacher, split) < distance(student, teacher, split) / 2
    assert not tuned.training
    assert is_same(teacher, teacher_before)
    assert is_same(student, student_before)
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_without_distillation_the_teacher_does_not_matter() -> None:
    split, student = make_split(), make_network(4, seed=2)
    config = FinetuneConfig(epochs=1, batch_size=16, distillation_weight=0.0)
    first, second = (finetune(student, make_network(8, seed=seed), split, config) for seed in (3, 4))
    assert is_same(first, second)


def test_teacher_that_does_not_matter_is_not_asked() -> None:
    class Silent(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise AssertionError(f"asked about {len(images)} images")

    split, student = make_split(), make_network(4, seed=2)
    assert not is_same(finetune(student, Silent(), split, FinetuneConfig(epochs=1, distillation_weight=0.0)), student)
    with pytest.raises(AssertionError, match="asked about"):
        finetune(student, Silent(), split, FinetuneConfig(epochs=1))


def test_seed_decides_the_outcome() -> None:
    split, teacher, student = make_split(), make_network(8, seed=1), make_network(4, seed=2)
    first, again, other = (
        finetune(student, teacher, split, FinetuneConfig(epochs=1, batch_size=16, seed=seed)) for seed in (0, 0, 1)
    )
    assert is_same(first, again)
    assert not is_same(first, other)


def test_validation_images_are_not_read() -> None:
    class Recorder(ArraySplit):
        def batch(self, indices: Any) -> torch.Tensor:
            seen.update(indices.tolist())
            return super().batch(indices)

    seen: set[int] = set()
    split = make_split()
    recorder = Recorder(images=split.images, labels=split.labels, mean=split.mean, std=split.std)
    validation_indices = np.array([0, 5, 17, 47])
    config = FinetuneConfig(epochs=2, batch_size=11)  # 44 images are left: four whole batches
    calls: list[int] = []
    finetune(
        make_network(4, seed=2), make_network(8, seed=1), recorder, config,
        validation_indices=validation_indices, progress=lambda done, total, text: calls.append(total - done),
    )  # fmt: skip
    assert seen == set(range(48)) - set(validation_indices.tolist())
    assert calls == list(range(7, -1, -1))


class InterruptedRunError(Exception):
    """Stands for whatever ends a run early."""


def make_dropout_network(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1), nn.Flatten(), nn.Linear(16 * width, 3)).eval()


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("amp", [False, True])
def test_interrupted_run_goes_on_to_the_same_weights(optimiser: str, amp: bool, tmp_path: Path) -> None:
    split, teacher, student = make_split(), make_network(8, seed=1), make_dropout_network(5, seed=2)
    config = FinetuneConfig(epochs=3, batch_size=16, optimiser=optimiser, learning_rate=0.01, amp=amp)
    undisturbed = finetune(student, teacher, split, config)

    def interrupt(done: int, total: int, text: str) -> None:
        if text == "training, epoch 2":
            raise InterruptedRunError

    kept = tmp_path / "state.safetensors"
    with pytest.raises(InterruptedRunError):
        finetune(student, teacher, split, config, progress=interrupt, on_epoch=lambda state: save_training(state, kept))
    torch.manual_seed(77)  # another process
    steps: list[int] = []
    resumed = finetune(
        student, teacher, split, config, state=load_training(kept), progress=lambda done, *_: steps.append(done)
    )
    assert load_training(kept).epoch == 1
    assert steps == [4, 5, 6, 7, 8, 9]
    assert is_same(resumed, undisturbed)


def test_epochs_one_by_one_give_the_weights_of_one_run() -> None:
    split, teacher, student = make_split(), make_network(8, seed=1), make_dropout_network(4, seed=2)
    config = FinetuneConfig(epochs=3, batch_size=16)
    states: list[TrainingState] = []
    for epoch in (1, 2, 3):
        last = finetune(
            student, teacher, split, config,
            state=states[-1] if states else None, on_epoch=states.append, last_epoch=epoch,
        )  # fmt: skip
    assert [state.epoch for state in states] == [1, 2, 3]
    assert is_same(last, finetune(student, teacher, split, config))
    assert all(np.array_equal(states[-1].network_arrays(last)[k], v.numpy()) for k, v in last.state_dict().items())


def test_state_of_another_network_is_refused() -> None:
    split, teacher = make_split(), make_network(8, seed=1)
    states: list[TrainingState] = []
    config = FinetuneConfig(epochs=2, batch_size=16)
    finetune(make_network(4, seed=2), teacher, split, config, on_epoch=states.append, last_epoch=1)
    with pytest.raises(ArtifactError, match="expected the tensors of this network"):
        finetune(make_network(5, seed=2), teacher, split, config, state=states[0])


def test_nothing_left_to_train_on_is_explained() -> None:
    with pytest.raises(DataError, match="expected at least 2 images, got 0"):
        finetune(
            make_network(4, seed=2), make_network(8, seed=1), make_split(), FinetuneConfig(),
            validation_indices=np.arange(48),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature > 0, got 0.0"),
        ({"distillation_weight": 1.1}, r"distillation_weight in \[0, 1\], got 1.1"),
        ({"epochs": 0}, "epochs >= 1, got 0"),
        ({"optimiser": "lion"}, "optimiser 'sgd' or 'adamw'"),
        ({"clip_norm": 0.0}, "clip_norm > 0 or None, got 0.0"),
    ],
)
def test_settings_out_of_range_are_explained(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"training: expected {message}"):
        FinetuneConfig(**setting)
