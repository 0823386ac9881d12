"""Accuracy, size and speed: known answers, and a network that stays as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entprune.datasets import ArraySplit
from entprune.errors import ConfigError, DataError, ModelError
from entprune.evaluation import (
    accuracy,
    count_macs,
    count_parameters,
    measure,
    measure_latency,
    predict_correct,
    resolve_device,
)
from entprune.models import build_model


class Indicator(nn.Module):
    """Logits are the first pixels of the image: a split can be made to be right or wrong at will."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : self.num_classes]


def make_split(logits: list[list[float]], labels: list[int]) -> ArraySplit:
    images = np.array(logits, dtype=np.float32)[:, np.newaxis, np.newaxis, :]  # (n, 3) -> (n, 1, 1, 3)
    return ArraySplit(images=images, labels=np.array(labels, dtype=np.int64), mean=(0.0,), std=(1.0,))


@pytest.fixture
def split() -> ArraySplit:
    nan = float("nan")
    return make_split([[3, 1, 2], [0, 5, 1], [0, 5, 1], [1, 2, 9], [nan, 0, 0]], [0, 1, 2, 2, 0])


@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_correct_images_are_found_whatever_the_batch(split: ArraySplit, batch_size: int) -> None:
    correct = predict_correct(Indicator(), split, batch_size=batch_size)
    assert correct.tolist() == [True, True, False, True, False], "NaN logits count as wrong"


def test_order_follows_the_indices(split: ArraySplit) -> None:
    assert predict_correct(Indicator(), split, np.array([2, 0])).tolist() == [False, True]


def test_accuracy_is_in_percent(split: ArraySplit) -> None:
    assert accuracy(Indicator(), split) == pytest.approx(60.0)
    assert accuracy(Indicator(), split, indices=np.array([0, 1, 3])) == 100.0


def test_progress_counts_images(split: ArraySplit) -> None:
    calls: list[tuple[int, int]] = []
    predict_correct(Indicator(), split, batch_size=2, progress=lambda done, total, text: calls.append((done, total)))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_unusable_requests_are_explained(split: ArraySplit) -> None:
    with pytest.raises(DataError, match="expected at least one image, got none"):
        accuracy(Indicator(), split, indices=np.array([], dtype=int))
    with pytest.raises(ConfigError, match="expected batch_size >= 1, got 0"):
        accuracy(Indicator(), split, batch_size=0)
    with pytest.raises(ModelError, match=r"expected logits of shape \(5, classes\) .* got \(5, 1, 1, 3\)"):
        accuracy(nn.Identity(), split)
    with pytest.raises(ConfigError, match="expected repeats and batch sizes >= 1"):
        measure_latency(Indicator(), (1, 1, 3), repeats=0)
    with pytest.raises(ConfigError, match="device 'toaster': expected a name such as cpu or cuda"):
        resolve_device("toaster")


def test_absent_gpu_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device 'cuda': this machine has no such GPU; use cpu"):
        resolve_device("cuda")


def test_lenet_counts() -> None:
    model = build_model("lenet", num_classes=10, input_shape=(1, 28, 28))
    convolutions = 24 * 24 * 20 * 25 + 8 * 8 * 50 * 20 * 25
    assert count_parameters(model) == 431_080
    assert count_macs(model, (1, 28, 28)) == convolutions + 800 * 500 + 500 * 10


def test_shared_parameters_count_once_and_buffers_not() -> None:
    linear = nn.Linear(4, 4, bias=False)
    assert count_parameters(nn.Sequential(linear, nn.ReLU(), linear, nn.BatchNorm1d(4, affine=False))) == 16


def test_grouped_and_strided_convolutions_are_counted() -> None:
    assert count_macs(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (4, 8, 8)) == 4 * 4 * 8 * 2 * 9


def test_latency_has_one_entry_for_each_batch_size() -> None:
    latency_ms = measure_latency(Indicator(), (1, 1, 3), (1, 4), repeats=2)
    assert list(latency_ms) == ["1", "4"]
    assert all(0 < value < 1000 for value in latency_ms.values())


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_network_as_it_was(training: bool) -> None:
    model = build_model("digits_cnn", num_classes=3, input_shape=(1, 4, 4)).train(training)
    model.bn1.eval()  # a layer frozen on purpose
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    images = np.zeros((4, 1, 4, 4), np.float32)
    split = ArraySplit(images=images, labels=np.zeros(4, np.int64), mean=(0.0,), std=(1.0,))
    measured = measure(model, split, (1, 4, 4), latency_batch_sizes=(1,), repeats=1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert (measured.parameters, list(measured.latency_ms)) == (count_parameters(model), ["1"])


def test_modes_are_restored_after_an_error(split: ArraySplit) -> None:
    model = nn.Identity().train()
    with pytest.raises(ModelError, match="expected logits"):
        accuracy(model, split)
    assert model.training


@pytest.mark.slow
def test_lenet_checkpoint_reaches_its_accuracy_on_mnist(tmp_path: Path) -> None:
    import gzip

    from entprune.checkpoints import load_checkpoint
    from entprune.datasets import load_data

    shared = Path(__file__).resolve().parents[1].parent / "shared"
    if not (shared / "data" / "mnist").is_dir():
        pytest.skip("the benchmark data in ../shared are not here")
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for path in (shared / "data" / "mnist" / "MNIST" / "raw").glob("*.gz"):
        (tmp_path / "MNIST" / "raw" / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    data = load_data("mnist", root=tmp_path, download=False)
    model = build_model("lenet", num_classes=10, input_shape=data.input_shape)
    load_checkpoint(model, shared / "checkpoints" / "lenet_mnist.pt")
    assert accuracy(model, data.test) == pytest.approx(99.39, abs=0.02)


@pytest.mark.gpu
def test_measuring_on_a_gpu_copies_the_network() -> None:
    model = build_model("digits_cnn", num_classes=3, input_shape=(1, 4, 4))
    split = ArraySplit(images=np.zeros((4, 1, 4, 4), np.float32), labels=np.zeros(4, np.int64), mean=(0.0,), std=(1.0,))
    measure(model, split, (1, 4, 4), latency_batch_sizes=(1,), repeats=1, device="cuda")
    assert model.conv1.weight.device.type == "cpu"
