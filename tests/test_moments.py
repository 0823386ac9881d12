"""Moments: however the rows are split they are numpy's covariance, and the rows are what the layer multiplies."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from entprune.errors import DataError
from entprune.moments import (
    MomentAccumulator,
    Moments,
    ProductSum,
    count_positions,
    draw_positions,
    feature_count,
    merge,
    read_outputs,
    read_rows,
)

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": (2, 3), "padding": (0, 1), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 2},
    {"kernel_size": (3, 4), "padding": "same"},
    {"kernel_size": 4, "padding": "same", "dilation": (1, 2), "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "circular", "bias": False},
]


def moments_of(rows: np.ndarray, *edges: int) -> Moments:
    accumulator = MomentAccumulator(rows.shape[1])
    for part in np.split(rows, sorted(edges)):
        accumulator.update(torch.from_numpy(part.astype(np.float32)))
    return accumulator.result()


def assert_equal_to_numpy(actual: Moments, rows: np.ndarray, tolerance: float = 1e-5) -> None:
    exact = rows.astype(np.float32).astype(np.float64)
    covariance = np.cov(exact, rowvar=False, bias=True).reshape(rows.shape[1], rows.shape[1])
    scale = np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal())) + 1e-12
    assert actual.count == len(rows)
    np.testing.assert_allclose(actual.mean, exact.mean(0), rtol=1e-6, atol=1e-6)
    assert np.abs((actual.covariance() - covariance) / scale).max() < tolerance


def random_rows(num_rows: int, num_features: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(num_features, num_features))
    return generator.normal(size=(num_rows, num_features)) @ mixing + generator.normal(size=num_features)


@given(st.integers(2, 60), st.integers(1, 5), st.lists(st.integers(0, 60), max_size=4), st.integers(0, 99))
def test_any_split_into_batches_gives_numpys_covariance(n: int, d: int, edges: list[int], seed: int) -> None:
    rows = random_rows(n, d, seed)
    assert_equal_to_numpy(moments_of(rows, *edges), rows)


@given(st.integers(2, 60), st.integers(0, 60), st.integers(0, 99))
def test_merge_equals_one_pass(n: int, edge: int, seed: int) -> None:
    rows = random_rows(n, 3, seed)
    rows[edge:] += 5.0  # shards of different distributions
    merged = merge(moments_of(rows[:edge]), moments_of(rows[edge:]))
    assert_equal_to_numpy(merged, rows)


def test_merge_is_associative_and_commutative_to_rounding() -> None:
    a, b, c = (moments_of(random_rows(20, 4, seed) + 10 * seed) for seed in range(3))
    left, right, swapped = merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(b, a))
    for other in (right, swapped):
        np.testing.assert_allclose(left.scatter, other.scatter, rtol=1e-12, atol=1e-9)
        np.testing.assert_allclose(left.mean, other.mean, rtol=1e-12)


def test_merging_leaves_both_parts_as_they_were() -> None:
    first, second = moments_of(random_rows(9, 3, 0)), moments_of(random_rows(7, 3, 1))
    before = copy.deepcopy(first.scatter), copy.deepcopy(second.scatter)
    merge(first, second)
    np.testing.assert_array_equal(first.scatter, before[0])
    np.testing.assert_array_equal(second.scatter, before[1])


def test_moments_of_different_layers_do_not_merge() -> None:
    with pytest.raises(DataError, match="equal size, got 3 and 4 features"):
        merge(moments_of(random_rows(5, 3, 0)), moments_of(random_rows(5, 4, 0)))


def test_nothing_gives_zero_moments() -> None:
    empty = MomentAccumulator(3).result()
    assert empty.count == 0
    assert not empty.covariance().any()
    assert merge(empty, empty).count == 0


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_large_offset_does_not_cost_accuracy(offset: float) -> None:
    rows = random_rows(20_000, 3, 0) / 3.0 + offset
    assert_equal_to_numpy(moments_of(rows, 64, 5000, 12_000), rows, tolerance=1e-4)


def test_drifting_mean_across_merged_shards_does_not_cost_accuracy() -> None:
    rows = random_rows(4000, 3, 0) + np.repeat([0.0, 1e4], 2000)[:, None]
    assert_equal_to_numpy(merge(moments_of(rows[:2000]), moments_of(rows[2000:])), rows)


def test_many_rows_do_not_lose_accuracy_in_float32() -> None:
    rows = np.random.default_rng(0).uniform(0, 1, size=(300_000, 2))
    assert_equal_to_numpy(moments_of(rows, *range(0, 300_000, 5000)), rows, tolerance=1e-6)


def test_product_sum_is_the_product() -> None:
    left, right = torch.randn(20_000, 3), torch.randn(20_000, 4)
    products = ProductSum(3, 4)
    for start in range(0, 20_000, 3000):
        products.update(left[start : start + 3000], right[start : start + 3000])
    torch.testing.assert_close(products.total(), left.double().T @ right.double(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(products.total(), left.double().T @ right.double(), rtol=1e-5, atol=1e-3)


def held_numbers(value: Any) -> int:
    """Numbers that an object holds, directly or in what it holds."""
    if isinstance(value, Tensor):
        return value.untyped_storage().size() // value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(held_numbers(entry) for entry in value)
    return sum(held_numbers(entry) for entry in vars(value).values()) if hasattr(value, "__dict__") else 0


def test_memory_does_not_depend_on_the_number_of_rows() -> None:
    accumulator = MomentAccumulator(4)
    accumulator.update(torch.randn(10, 4))
    after_ten = held_numbers(accumulator)
    for _ in range(20):
        accumulator.update(torch.randn(1000, 4))
    assert after_ten >= 4 + 4 * 4
    assert held_numbers(accumulator) == after_ten


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("per_image", [1, 4, 10_000])
def test_rows_times_weight_are_the_outputs_of_a_convolution(settings: dict[str, Any], per_image: int) -> None:
    layer = nn.Conv2d(3, 5, **settings)
    images = torch.randn(2, 3, 9, 8)
    output, num_positions = layer(images), count_positions(layer, images)
    assert num_positions == output.shape[2] * output.shape[3]
    positions = draw_positions(2, num_positions, per_image=per_image, seed=1, name="layer", batch=0)
    rows, answers = read_rows(layer, images, positions), read_outputs(layer, output, positions)
    taken = min(per_image, output.shape[2] * output.shape[3])
    assert rows.shape == (2 * taken, feature_count(layer))
    bias = 0 if layer.bias is None else layer.bias
    torch.testing.assert_close(rows @ layer.weight.flatten(1).T + bias, answers, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (4, 3, 6), (2, 3, 2, 6)])
def test_rows_times_weight_are_the_outputs_of_a_linear_layer(shape: tuple[int, ...]) -> None:
    layer, inputs = nn.Linear(6, 5), torch.randn(*shape)
    output = layer(inputs)
    num_positions = count_positions(layer, inputs)
    assert shape[0] * num_positions == inputs.numel() // 6
    positions = draw_positions(shape[0], num_positions, per_image=num_positions, seed=0, name="layer", batch=0)
    assert positions is None
    rows = read_rows(layer, inputs, positions)
    assert rows.shape == (inputs.numel() // 6, feature_count(layer))
    torch.testing.assert_close(rows @ layer.weight.T + layer.bias, read_outputs(layer, output, positions))


def test_positions_depend_on_seed_layer_and_batch_and_on_nothing_else() -> None:
    def drawn(**change: Any) -> np.ndarray:
        arguments: dict[str, Any] = {"per_image": 7, "seed": 0, "name": "a", "batch": 0} | change
        positions = draw_positions(6, 144, **arguments)
        assert positions is not None
        return positions.numpy()

    first = drawn()
    torch.manual_seed(5)
    np.testing.assert_array_equal(drawn(), first)
    for change in ({"seed": 1}, {"name": "b"}, {"batch": 1}):
        assert (drawn() != drawn(**change)).any()


def test_positions_are_distinct_within_an_image_and_reach_every_place() -> None:
    positions = draw_positions(400, 12, per_image=5, seed=0, name="a", batch=0)
    assert positions is not None
    assert positions.shape == (400, 5)
    assert all(len(set(row)) == 5 for row in positions.tolist())
    counts = np.bincount(positions.numpy().ravel(), minlength=12)
    assert len(counts) == 12
    assert counts.min() > 0.7 * 400 * 5 / 12


def test_wide_layers_whose_gram_matrix_is_summed_in_strips() -> None:
    rows = random_rows(40, 600, 0)
    actual = moments_of(rows, 13, 30)
    assert_equal_to_numpy(actual, rows, tolerance=1e-4)
    np.testing.assert_allclose(actual.scatter, actual.scatter.T, atol=1e-5 * np.abs(actual.scatter).max())
