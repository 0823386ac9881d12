"""Fine-tuning: the loss is the formula, the student approaches the teacher, validation images stay unseen."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from entprune.datasets import ArraySplit
from entprune.errors import ConfigError, DataError
from entprune.finetune import FinetuneConfig, distillation_loss, finetune


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
    ],
)
def test_settings_out_of_range_are_explained(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"training: expected {message}"):
        FinetuneConfig(**setting)
