"""Training: it learns, the seed decides the outcome, and nothing else is disturbed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from entprune.augmentation import augment
from entprune.datasets import ArraySplit, ImageData, load_data
from entprune.errors import ConfigError, DataError
from entprune.evaluation import has_native_bfloat16
from entprune.models import build_model
from entprune.training import TrainConfig, fit, one_cycle, train


def make_data(num_images: int = 40) -> ImageData:
    """Two classes that differ in brightness."""
    labels = np.arange(num_images, dtype=np.int64) % 2
    noise = np.random.default_rng(0).normal(size=(num_images, 1, 4, 4))
    images = (noise + 2 * labels.reshape(-1, 1, 1, 1)).astype(np.float32)
    split = ArraySplit(images=images, labels=labels, mean=(1.0,), std=(1.0,))
    return ImageData(
        name="made", train=split, test=split, num_classes=2, input_shape=(1, 4, 4),
        mean=(1.0,), std=(1.0,), class_names=("dark", "bright"), sha256="0" * 64,
    )  # fmt: skip


def make_model() -> nn.Sequential:
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 2))


def is_same(first: nn.Module, second: nn.Module) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


def test_digits_are_learnt_in_seconds() -> None:
    data = load_data("digits")
    model = build_model("digits_cnn", num_classes=10, input_shape=data.input_shape)
    result = train(model, data, TrainConfig(epochs=6))
    assert result.accuracy >= 95.0
    assert not result.model.training
    losses = [record.loss for record in result.history]
    assert losses[-1] < losses[0] / 4
    assert result.history[-1].accuracy >= 90.0


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_seed_decides_the_outcome(optimiser: str) -> None:
    model, data = make_model(), make_data()
    first, again, other = (
        train(
            model, data, TrainConfig(epochs=2, batch_size=8, learning_rate=0.01, optimiser=optimiser, seed=seed)
        ).model
        for seed in (0, 0, 1)
    )
    assert is_same(first, again)
    assert not is_same(first, other)


def test_training_disturbs_neither_the_network_nor_the_global_random_state() -> None:
    model = make_model().eval()
    before, random_state = copy.deepcopy(model), torch.get_rng_state()
    result = train(model, make_data(), TrainConfig(epochs=1, batch_size=8))
    assert is_same(model, before)
    assert not model.training
    assert not is_same(result.model, before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_global_random_state_does_not_matter() -> None:
    model, data, trained = make_model(), make_data(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trained.append(train(model, data, TrainConfig(epochs=1, batch_size=8)).model)
    assert is_same(*trained)


def test_progress_counts_steps() -> None:
    calls: list[tuple[int, int, str]] = []
    config = TrainConfig(epochs=2, batch_size=16)  # 40 images: two whole batches an epoch
    train(make_model(), make_data(), config, lambda *call: calls.append(call))
    assert [call[:2] for call in calls] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert calls[-1][2] == "training, epoch 2"


def test_fewer_images_than_a_batch_make_one_batch() -> None:
    assert len(train(make_model(), make_data(6), TrainConfig(epochs=1, batch_size=64)).history) == 1


def test_only_the_given_images_are_read() -> None:
    class Recorder(ArraySplit):
        def batch(self, indices: Any) -> torch.Tensor:
            seen.update(indices.tolist())
            return super().batch(indices)

    seen: set[int] = set()
    split = make_data().train
    recorder = Recorder(images=split.images, labels=split.labels, mean=split.mean, std=split.std)
    fit(make_model(), recorder, np.arange(8, 24), lambda logits, *_: logits.sum(), TrainConfig(epochs=1, batch_size=8))
    assert seen == set(range(8, 24))


def test_bfloat16_can_be_forced_and_changes_the_outcome() -> None:
    model, data = make_model(), make_data()
    exact, mixed = (train(model, data, TrainConfig(epochs=1, amp=amp)).model for amp in (False, True))
    assert all(parameter.dtype == torch.float32 for parameter in mixed.parameters())
    assert not is_same(exact, mixed)


class Viewing(nn.Module):
    """Counts on the ordinary order of an activation in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(64, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(images).view(len(images), -1))


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)), torch.channels_last),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), torch.contiguous_format),
        (Viewing(), torch.contiguous_format),
    ],
)
def test_images_come_in_the_memory_format_that_the_network_can_read(
    network: nn.Module, expected: torch.memory_format
) -> None:
    data = np.random.default_rng(0).normal(size=(16, 3, 4, 4)).astype(np.float32)
    split = ArraySplit(images=data, labels=np.arange(16, dtype=np.int64) % 2, mean=(0.0,) * 3, std=(1.0,) * 3)
    seen: list[bool] = []

    def loss(logits: torch.Tensor, images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        seen.append(images.is_contiguous(memory_format=expected))
        return logits.square().mean()

    fit(network, split, np.arange(16), loss, TrainConfig(epochs=1, batch_size=8))
    assert seen == [True, True]
    assert all(parameter.is_contiguous() for parameter in network.parameters())


def test_memory_format_hardly_changes_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, config = make_model(), make_data(), TrainConfig(epochs=1, batch_size=8, amp=False)
    del model[3]  # dropout draws in the order of memory
    fast = train(model, data, config).model
    monkeypatch.setattr("entprune.training.fastest_format", lambda *_: torch.contiguous_format)
    plain = train(model, data, config).model.state_dict()
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("capability", "is_native"), [("avx512_bf16", True), ("amx_bf16", True), ("avx2", False)])
def test_bfloat16_is_used_only_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, capability: str, is_native: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    assert has_native_bfloat16("cpu") is is_native
    assert not has_native_bfloat16("meta")


def test_divergence_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"training diverged in epoch 1: .*lower the learning rate"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), make_data(), TrainConfig(learning_rate=1e30, batch_size=4))


def test_one_image_is_not_enough() -> None:
    with pytest.raises(DataError, match="expected at least 2 images, got 1"):
        train(make_model(), make_data(1), TrainConfig())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs >= 1, got 0"),
        ({"batch_size": 1}, "batch_size >= 2, got 1"),
        ({"learning_rate": 0.0}, "learning_rate > 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate > 0, got nan"),
        ({"weight_decay": -1.0}, "weight_decay >= 0, got -1.0"),
        ({"optimiser": "lion"}, "optimiser 'sgd' or 'adamw', got 'lion'"),
        ({"label_smoothing": 1.0}, r"label_smoothing in \[0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range_are_explained(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"training: expected {message}"):
        TrainConfig(**setting)


@given(total_steps=st.integers(1, 400))
def test_one_cycle_rises_to_its_peak_and_falls(total_steps: int) -> None:
    factors = np.array([one_cycle(step, total_steps) for step in range(total_steps)])
    peak = int(factors.argmax())
    assert factors[peak] == 1.0
    assert (factors > 0).all()
    assert (np.diff(factors[: peak + 1]) > 0).all()
    assert (np.diff(factors[peak:]) < 0).all()


def test_greyscale_augmentation_shifts_by_at_most_two_of_28_pixels() -> None:
    images = torch.zeros(200, 1, 28, 28)
    images[:, :, 14, 14] = 1
    moved = augment(images, torch.Generator().manual_seed(0))
    positions = moved.flatten(1).argmax(dim=1)
    shifts = torch.stack((positions // 28 - 14, positions % 28 - 14))
    assert (int(shifts.min()), int(shifts.max())) == (-2, 2)
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(200))


def test_colour_augmentation_mirrors_half_and_shifts_by_at_most_four() -> None:
    images = torch.zeros(400, 3, 32, 32)
    images[:, :, 16, 8] = 1  # 8 from the left; mirrored, 23
    moved = augment(images, torch.Generator().manual_seed(0))
    columns = moved[:, 0].flatten(1).argmax(dim=1) % 32
    mirrored = columns > 15
    assert 150 < int(mirrored.sum()) < 250
    assert {int(value) for value in columns[~mirrored].unique()} == set(range(4, 13))
    assert {int(value) for value in columns[mirrored].unique()} == set(range(19, 28))
    assert torch.equal(moved[:, 0], moved[:, 2])


def test_augmentation_adds_no_new_values_and_follows_the_generator() -> None:
    images = torch.randn(6, 3, 8, 8)
    first, again = (augment(images, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, images)
    assert all(torch.isin(moved, image).all() for moved, image in zip(first, images, strict=True))


@pytest.mark.gpu
def test_training_on_a_gpu_returns_the_network_to_the_cpu() -> None:
    result = train(make_model(), make_data(), TrainConfig(epochs=1, batch_size=8, device="cuda"))
    assert next(result.model.parameters()).device.type == "cpu"
