"""One pass over the calibration images: however it is sharded, the same answers and the same moments."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from entprune.calibration import LayerStatistics, SamplingPlan, ShardSum, collect_statistics, merge_statistics
from entprune.errors import DataError
from entprune.moments import feature_count
from tests.micro_networks import Chain, random_split, warm_up

CONSUMERS, OTHERS = ("conv2", "fc1", "fc2"), ("conv1",)
SAMPLING = SamplingPlan(num_images=60, batch_size=8, min_rows=120, rows_per_feature=1.0, seed=0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return warm_up(Chain())


def collect(model: nn.Module, start: int, stop: int, **change: Any) -> dict[str, LayerStatistics]:
    options: dict[str, Any] = {"consumers": CONSUMERS, "others": OTHERS, "sampling": SAMPLING} | change
    return collect_statistics(model, random_split(60), np.arange(start, stop), first_image=start, **options)


@settings(max_examples=10)
@given(st.lists(st.sampled_from(range(8, 60, 8)), max_size=4, unique=True))
def test_sharded_equals_whole(model: nn.Module, inner: list[int]) -> None:
    edges = [0, *sorted(inner), 60]
    whole = collect(model, 0, 60)
    merged = merge_statistics([collect(model, a, b) for a, b in pairwise(edges)])
    assert list(merged) == list(whole)
    for layer, entry in whole.items():
        np.testing.assert_array_equal(merged[layer].outputs, entry.outputs)
        if entry.moments is not None:
            other = merged[layer].moments
            assert other is not None
            assert other.count == entry.moments.count
            np.testing.assert_allclose(other.mean, entry.moments.mean, rtol=1e-6, atol=1e-7)
            largest = np.abs(entry.moments.scatter).max()
            np.testing.assert_allclose(other.scatter, entry.moments.scatter, rtol=1e-6, atol=1e-6 * largest)


@given(st.permutations(range(3)))
@settings(max_examples=6)
def test_shards_in_any_order_sum_to_the_same_bits(model: nn.Module, order: list[int]) -> None:
    shards = [collect(model, start, stop) for start, stop in ((0, 16), (16, 40), (40, 60))]
    expected = merge_statistics(shards)
    total = ShardSum()
    for number in order:
        total.add(number, shards[number])
    assert list(total.total()) == list(expected)
    for layer, entry in expected.items():
        np.testing.assert_array_equal(total.total()[layer].outputs, entry.outputs)
        if entry.moments is not None:
            np.testing.assert_array_equal(total.total()[layer].moments.scatter, entry.moments.scatter)


def test_moments_are_those_of_what_the_layer_reads(model: nn.Module) -> None:
    inputs: list[torch.Tensor] = []
    layer = model.get_submodule("fc1")
    handle = layer.register_forward_pre_hook(lambda _, values: inputs.append(values[0]))
    with torch.inference_mode():
        model(random_split(60).batch(np.arange(60)))
    handle.remove()
    statistics = collect(model, 0, 60)["fc1"]
    assert statistics.moments is not None
    rows = inputs[0].numpy().astype(np.float64)
    np.testing.assert_allclose(statistics.moments.mean, rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(statistics.moments.covariance(), np.cov(rows, rowvar=False, bias=True), atol=1e-5)


def test_answers_are_explained_by_the_moments(model: nn.Module) -> None:
    for name in CONSUMERS:
        entry, layer = collect(model, 0, 60)[name], model.get_submodule(name)
        assert entry.moments is not None
        weight = layer.weight.detach().flatten(1).double().numpy()
        mean = weight @ entry.moments.mean + layer.bias.detach().numpy()
        covariance = weight @ entry.moments.covariance() @ weight.T
        np.testing.assert_allclose(entry.outputs.mean(0), mean, atol=1e-4)
        np.testing.assert_allclose(np.cov(entry.outputs, rowvar=False, bias=True), covariance, atol=1e-4)


def test_answers_of_in_place_activations_are_those_before_the_activation(model: nn.Module) -> None:
    statistics = collect(model, 0, 60)
    assert statistics["conv2"].outputs.min() < 0
    assert statistics["fc1"].outputs.min() < 0
    assert statistics["conv1"].moments is None


def test_rows_per_layer_are_as_planned(model: nn.Module) -> None:
    statistics = collect(model, 0, 60, sampling=replace(SAMPLING, min_rows=1, rows_per_feature=2.0))
    features = feature_count(model.get_submodule("conv2"))
    wanted = -(-2 * features // 60) * 60  # a whole number for each image
    assert len(statistics["conv2"].outputs) == min(wanted, 60 * 4)
    assert len(statistics["fc1"].outputs) == 60


def test_seed_decides_which_rows_are_taken(model: nn.Module) -> None:
    few = replace(SAMPLING, min_rows=60, rows_per_feature=0.1)
    first, again, other = (
        collect(model, 0, 60, sampling=replace(few, seed=seed))["conv2"].outputs for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_network_is_left_as_it_was(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect(model, 0, 60)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_go_even_when_the_pass_fails(model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        collect_statistics(
            model, replace(random_split(8), images=np.zeros((8, 3, 6, 6), np.float32), mean=(0.0,) * 3, std=(1.0,) * 3),
            np.arange(8), consumers=CONSUMERS, sampling=SAMPLING,
        )  # fmt: skip
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_that_are_not_finite_are_refused(model: nn.Module, value: float) -> None:
    split = random_split(16)
    split.images[11, 0, 3, 3] = value
    with pytest.raises(DataError, match="expected finite network outputs on the calibration images, got NaN"):
        collect_statistics(model, split, np.arange(16), consumers=CONSUMERS, sampling=SAMPLING)


def test_shard_inside_a_batch_is_refused(model: nn.Module) -> None:
    with pytest.raises(DataError, match="starts at a multiple of 8, got 5"):
        collect(model, 5, 20)


def test_progress_ends_at_the_number_of_images(model: nn.Module) -> None:
    calls: list[tuple[int, int]] = []
    collect(model, 0, 60, progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (8, 60)
    assert calls[-1] == (60, 60)
    assert len(calls) == 8
