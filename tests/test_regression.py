"""The entropic regression against a naive solver: loops, explicit inverses and finite differences in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from entprune.errors import ConfigError
from entprune.regression import (
    ConsumerProblem,
    EntropicState,
    GroupProblem,
    alternate,
    build_problem,
    cholesky_with_ridge,
    initial_state,
    keep_channels,
    nested_errors,
    quadratic_probability_step,
    weight_step,
)
from entprune.ridge import factorise
from tests.regression_problems import random_covariance, random_problem, refit_error

BLOCKS = st.lists(st.integers(1, 3), min_size=1, max_size=3)
SIGNS = st.sampled_from([-1.0, -0.1, 0.0, 0.1, 1.0])


# --- the naive solver ------------------------------------------------------------------------------------------------


def spread(w: np.ndarray, block: int) -> np.ndarray:
    """D(w): (d, d)."""
    return np.diag([probability for probability in w for _ in range(block)])


def naive_layer_weight(consumer: ConsumerProblem, w: np.ndarray, l2_weight: float) -> np.ndarray:
    """Lambda (m, d) by an explicit inverse."""
    D = spread(w, consumer.block)
    system = D @ consumer.gram @ D + l2_weight * np.eye(len(D))
    return consumer.weight @ consumer.gram @ D @ np.linalg.inv(system)


def naive_objective(
    problem: GroupProblem, layer_weights: Sequence[np.ndarray], w: np.ndarray, l2_weight: float, entropy_weight: float
) -> float:
    value = 0.0
    for consumer, layer_weight in zip(problem.consumers, layer_weights, strict=True):
        difference = consumer.weight - layer_weight @ spread(w, consumer.block)
        for row in difference:
            value += row @ consumer.gram @ row
        value += l2_weight * float((layer_weight**2).sum())
    return value - entropy_weight * sum(p * np.log(p) for p in w if p > 0)


def reduced_objective(problem: GroupProblem, w: np.ndarray, l2_weight: float, entropy_weight: float) -> float:
    """J(w) with the best Lambda for this w."""
    layer_weights = [naive_layer_weight(consumer, w, l2_weight) for consumer in problem.consumers]
    return naive_objective(problem, layer_weights, w, l2_weight, entropy_weight)


def state_at(problem: GroupProblem, w: np.ndarray) -> EntropicState:
    state = initial_state(problem)
    state.probability = torch.from_numpy(w)
    return state


def some_point(size: int, seed: int) -> np.ndarray:
    w = np.random.default_rng(seed).dirichlet(np.ones(size)) + 0.01
    return w / w.sum()


def converged(problem: GroupProblem, l2_weight: float, entropy_weight: float) -> np.ndarray:
    w, _ = alternate(initial_state(problem), l2_weight=l2_weight, entropy_weight=entropy_weight, iterations=250)
    return w.numpy()


@functools.cache
def stationary_point(c: int, seed: int, entropy_weight: float) -> tuple[GroupProblem, float, np.ndarray]:
    """A problem, its eps_l2, and w after many alternations."""
    problem, l2_weight = random_problem(c, [1, 2], seed), 0.05 / c**2
    return problem, l2_weight, converged(problem, l2_weight, entropy_weight)


# --- the Lambda step -------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), BLOCKS, st.integers(0, 99), st.sampled_from([1e-3, 1e-1, 10.0]))
def test_weight_step_is_the_naive_ridge_regression(c: int, blocks: list[int], seed: int, l2_weight: float) -> None:
    problem, w = random_problem(c, blocks, seed), some_point(c, seed)
    norm_squared, loss = weight_step(state_at(problem, w), l2_weight)
    expected_norm, layer_weights = np.zeros(c), []
    for consumer in problem.consumers:
        layer_weights.append(naive_layer_weight(consumer, w, l2_weight))
        Q = layer_weights[-1] @ spread(w, consumer.block)
        expected_norm += [(Q[:, i * consumer.block : (i + 1) * consumer.block] ** 2).sum() for i in range(c)]
    np.testing.assert_allclose(norm_squared.numpy(), expected_norm, rtol=1e-2 * 1e-3 / l2_weight + 1e-4, atol=1e-6)
    assert loss == pytest.approx(naive_objective(problem, layer_weights, w, l2_weight, 0.0), abs=1e-4)


def test_weight_step_minimises_the_objective_over_lambda() -> None:
    problem, w = random_problem(2, [1], 0, num_outputs=1), np.array([0.3, 0.7])
    found = minimize(lambda row: naive_objective(problem, [row[None]], w, 0.05, 0.0), np.zeros(2), tol=1e-12)
    _, loss = weight_step(state_at(problem, w), 0.05)
    assert loss == pytest.approx(found.fun, abs=1e-5)


@given(st.integers(2, 5), st.integers(0, 99))
def test_vanishing_probability_is_the_same_as_a_removed_channel(c: int, seed: int) -> None:
    problem, w = random_problem(c, [2, 1], seed), some_point(c, seed)
    w[0] = 0.0
    w /= w.sum()
    norm_squared, loss = weight_step(state_at(problem, w), 0.1)
    smaller = state_at(problem, w)
    keep_channels(smaller, torch.arange(1, c))
    expected_norm, expected_loss = weight_step(smaller, 0.1)
    assert float(norm_squared[0]) == 0.0
    np.testing.assert_allclose(norm_squared[1:], expected_norm, rtol=1e-3)
    assert loss == pytest.approx(expected_loss, abs=1e-5)


# --- the alternation -------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), BLOCKS, SIGNS, st.integers(0, 99), st.sampled_from([1e-3, 1e-2, 0.3]))
def test_objective_never_rises_along_the_alternation(
    c: int, blocks: list[int], sign: float, seed: int, relative_l2: float
) -> None:
    problem, l2_weight = random_problem(c, blocks, seed), relative_l2 / c**2
    entropy_weight = sign * relative_l2
    state = state_at(problem, some_point(c, seed))
    _, history = alternate(state, l2_weight=l2_weight, entropy_weight=entropy_weight, iterations=25)
    assert len(history) == 25
    assert max(np.diff(history)) <= 1e-5 * max(1.0, abs(history[0]))


@given(st.integers(2, 5), BLOCKS, SIGNS, st.integers(0, 99))
def test_reported_objective_is_the_true_one(c: int, blocks: list[int], sign: float, seed: int) -> None:
    problem, w = random_problem(c, blocks, seed), some_point(c, seed)
    _, history = alternate(state_at(problem, w), l2_weight=0.05, entropy_weight=sign * 0.1, iterations=1)
    assert history[0] == pytest.approx(reduced_objective(problem, w, 0.05, sign * 0.1), abs=1e-5)


@pytest.mark.parametrize("relative_entropy", [-0.05, 0.0, 0.01])
@pytest.mark.parametrize(("c", "seed"), [(2, 0), (3, 1), (5, 2)])
def test_both_forms_of_the_probability_step_agree_at_a_stationary_point(
    c: int, relative_entropy: float, seed: int
) -> None:
    problem, l2_weight, w = stationary_point(c, seed, relative_entropy)
    layer_weights = [naive_layer_weight(consumer, w, l2_weight) for consumer in problem.consumers]
    moved = quadratic_probability_step(
        problem, [torch.from_numpy(x) for x in layer_weights],
        entropy_weight=relative_entropy, current=torch.from_numpy(w), iterations=200,
    ).numpy()  # fmt: skip
    before = naive_objective(problem, layer_weights, w, l2_weight, relative_entropy)
    after = naive_objective(problem, layer_weights, moved, l2_weight, relative_entropy)
    assert after <= before + 1e-12
    assert before - after < 1e-4
    np.testing.assert_allclose(moved, w, atol=0.02)


@pytest.mark.parametrize("relative_entropy", [-0.05, 0.0, 0.01])
@pytest.mark.parametrize(("c", "seed"), [(2, 0), (3, 1), (5, 2)])
def test_slopes_along_the_simplex_vanish_at_a_stationary_point(c: int, relative_entropy: float, seed: int) -> None:
    problem, l2_weight, w = stationary_point(c, seed, relative_entropy)
    size = 1e-5
    uniform = np.full(c, 1.0 / c)

    def slope(at: np.ndarray, i: int, j: int) -> float:
        shift = np.zeros(c)
        shift[i], shift[j] = size, -size
        values = [reduced_objective(problem, at + s * shift, l2_weight, relative_entropy) for s in (1, -1)]
        return (values[0] - values[1]) / (2 * size)

    alive = np.flatnonzero(w > 0.01)
    steepest_before = max(abs(slope(uniform, i, 0)) for i in range(1, c))
    for i in alive[1:]:
        assert abs(slope(w, i, alive[0])) < 1e-3 + 0.02 * steepest_before


@pytest.mark.parametrize("entropy_weight", [-0.05, 0.0])
def test_converged_point_is_the_one_that_a_numerical_minimiser_finds(entropy_weight: float) -> None:
    problem = random_problem(3, [2], 1)
    w = converged(problem, 0.05, entropy_weight)

    def at(logits: np.ndarray) -> float:
        candidate = np.exp(logits - logits.max())
        return reduced_objective(problem, candidate / candidate.sum(), 0.05, entropy_weight)

    found = minimize(at, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-14})
    assert reduced_objective(problem, w, 0.05, entropy_weight) == pytest.approx(found.fun, abs=1e-6)


@given(st.integers(2, 5), SIGNS, st.integers(0, 99))
def test_quadratic_step_stays_on_the_simplex_and_never_goes_uphill(c: int, entropy_weight: float, seed: int) -> None:
    problem, w = random_problem(c, [2, 1], seed), some_point(c, seed)
    generator = np.random.default_rng(seed)
    layer_weights = [generator.normal(size=consumer.weight.shape) for consumer in problem.consumers]
    moved = quadratic_probability_step(
        problem, [torch.from_numpy(x) for x in layer_weights],
        entropy_weight=entropy_weight, current=torch.from_numpy(w), iterations=60,
    ).numpy()  # fmt: skip
    assert moved.min() >= 0
    assert moved.sum() == pytest.approx(1.0)
    before, after = (naive_objective(problem, layer_weights, x, 0.0, entropy_weight) for x in (w, moved))
    assert after <= before + 1e-12
    assert not np.array_equal(moved, w) or before < 1e-9


def test_quadratic_step_reaches_the_minimum_of_a_convex_problem() -> None:
    problem = random_problem(3, [1], 0)
    layer_weights = [3.0 * problem.consumers[0].weight]  # the best w is one third each: Lambda D = W
    start = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64)
    moved = quadratic_probability_step(
        problem, [torch.from_numpy(layer_weights[0])], entropy_weight=0.0, current=start, iterations=2000
    )
    np.testing.assert_allclose(moved, np.full(3, 1 / 3), atol=1e-3)


# --- dropping channels -----------------------------------------------------------------------------------------------


@given(st.integers(2, 6), BLOCKS, st.integers(0, 99), st.data())
def test_keeping_channels_leaves_their_rows_and_columns(
    c: int, blocks: list[int], seed: int, data: st.DataObject
) -> None:
    problem = random_problem(c, blocks, seed)
    state = initial_state(problem)
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, c - 1), min_size=1))))
    before = copy.deepcopy(state)
    keep_channels(state, kept)
    assert state.alive.tolist() == kept.tolist()
    assert float(state.probability.sum()) == pytest.approx(1.0)
    for number, block in enumerate(blocks):
        columns = [int(channel) * block + tap for channel in kept for tap in range(block)]
        actual, whole = state.ridges[number], before.ridges[number]
        assert torch.equal(actual.gram, whole.gram[columns][:, columns])
        assert torch.equal(actual.target, whole.target[columns])


def test_channels_dropped_twice_keep_their_numbers() -> None:
    state = initial_state(random_problem(6, [2], 0))
    keep_channels(state, torch.tensor([0, 2, 3, 5]))
    keep_channels(state, torch.tensor([1, 3]))
    assert state.alive.tolist() == [2, 5]


# --- errors of nested sets -------------------------------------------------------------------------------------------


@given(st.integers(1, 6), BLOCKS, st.integers(0, 99))
def test_nested_errors_are_least_squares_for_every_width(c: int, blocks: list[int], seed: int) -> None:
    problem = random_problem(c, blocks, seed)
    order = np.random.default_rng(seed).permutation(c).tolist()
    errors = nested_errors(problem, order)
    expected = [refit_error(problem, order[:k]) for k in range(c + 1)]
    np.testing.assert_allclose(errors, expected, atol=1e-4)
    assert errors[-1] == pytest.approx(0.0, abs=1e-4)
    assert np.all(np.diff(errors) <= 0)


def test_nested_errors_survive_a_rank_deficient_gram_matrix() -> None:
    covariance = random_covariance(12, 0, rank=3)
    weight = np.random.default_rng(0).normal(size=(4, 12))
    problem = build_problem("g", 6, {"a": (covariance, weight, np.arange(12).reshape(6, 2))})
    errors = nested_errors(problem, range(6))
    assert errors[0] == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(errors, [refit_error(problem, range(k)) for k in range(7)], atol=2e-3)
    assert errors[2] < 2e-3  # four features already span the three directions


# --- scaling ---------------------------------------------------------------------------------------------------------


def build(covariance: np.ndarray, weight: np.ndarray, block: int) -> ConsumerProblem:
    features = np.arange(len(covariance)).reshape(-1, block)
    return build_problem("g", len(features), {"a": (covariance, weight, features)}).consumers[0]


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 99), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_units_of_inputs_and_outputs_do_not_matter(
    c: int, block: int, seed: int, per_input: float, per_output: float
) -> None:
    covariance = random_covariance(c * block, seed)
    weight = np.random.default_rng(seed).normal(size=(3, c * block))
    plain = build(covariance, weight, block)
    scaled = build(covariance * per_input**2, weight * per_output, block)
    np.testing.assert_allclose(scaled.gram, plain.gram, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled.weight, plain.weight, rtol=1e-4, atol=1e-5)


@given(st.integers(2, 5), st.integers(1, 3), st.integers(0, 99))
def test_units_of_single_channels_do_not_matter(c: int, block: int, seed: int) -> None:
    covariance = random_covariance(c * block, seed)
    weight = np.random.default_rng(seed).normal(size=(3, c * block))
    units = np.repeat(np.random.default_rng(seed + 1).uniform(0.3, 3.0, size=c), block)
    plain = build(covariance, weight, block)
    scaled = build(covariance * np.outer(units, units), weight / units, block)
    np.testing.assert_allclose(scaled.gram, plain.gram, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled.weight, plain.weight, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
def test_scaled_output_variance_is_one_and_channels_have_unit_scale(c: int, block: int, seed: int) -> None:
    consumer = build(random_covariance(c * block, seed), np.random.default_rng(seed).normal(size=(3, c * block)), block)
    assert np.trace(consumer.weight @ consumer.gram @ consumer.weight.T) == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(consumer.gram.diagonal().reshape(c, block).mean(1), 1.0, rtol=1e-4)


def test_almost_silent_channel_is_not_made_as_loud_as_the_others() -> None:
    consumer = build(np.diag([1.0, 1.0, 1e-10]), np.ones((2, 3)), 1)
    assert consumer.gram[2, 2] < 1e-3 * consumer.gram[0, 0]


def test_features_are_gathered_channel_by_channel() -> None:
    covariance = np.diag([1.0, 4.0, 9.0, 16.0])
    weight = np.array([[1.0, 2.0, 3.0, 4.0]])
    features = np.array([[3, 0], [1, 2]])
    consumer = build_problem("g", 2, {"a": (covariance, weight, features)}).consumers[0]
    expected = np.array([16 / 8.5, 1 / 8.5, 4 / 6.5, 9 / 6.5])
    np.testing.assert_allclose(consumer.gram.diagonal(), expected, rtol=1e-5)
    contribution = (consumer.weight**2)[0] * consumer.gram.diagonal()
    shares = np.array([16 * 16, 1, 4 * 4, 9 * 9]) / (256 + 1 + 16 + 81)
    np.testing.assert_allclose(contribution, shares, rtol=1e-5)


# --- what real layers bring ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy_weight", [-1.0, 0.0, 1.0])
def test_dead_channels_lose_their_probability(entropy_weight: float) -> None:
    covariance, dead = random_covariance(8, 0), [2, 3, 6, 7]
    covariance[dead] = covariance[:, dead] = 0.0
    weight = np.random.default_rng(0).normal(size=(3, 8))
    problem = build_problem("g", 4, {"a": (covariance, weight, np.arange(8).reshape(4, 2))})
    state = initial_state(problem)
    w, history = alternate(state, l2_weight=1e-2, entropy_weight=1e-3 * entropy_weight, iterations=20)
    assert np.isfinite(history).all()
    assert float(w[[1, 3]].max()) < 0.05 * float(w[[0, 2]].min())


def test_constant_layer_has_nothing_to_explain() -> None:
    problem = build_problem("g", 3, {"a": (np.zeros((3, 3)), np.ones((2, 3)), np.arange(3)[:, None])})
    state = initial_state(problem)
    w, history = alternate(state, l2_weight=1e-2, entropy_weight=0.0, iterations=3)
    assert history == pytest.approx([0.0, 0.0, 0.0])
    assert bool(torch.isfinite(w).all())
    np.testing.assert_allclose(nested_errors(problem, range(3)), 0.0, atol=1e-9)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_factor_of_a_singular_matrix_is_close_to_it(size: int, rank: int, seed: int) -> None:
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(rank, size))).float()
    matrix = rows.T @ rows
    factor: Tensor = cholesky_with_ridge(matrix)
    torch.testing.assert_close(factor @ factor.T, matrix, atol=1e-4 * float(matrix.diagonal().mean()) + 1e-6, rtol=0)


def test_ridge_grows_past_what_rounding_made_negative() -> None:
    matrix = torch.diag(torch.tensor([1.0, 1.0, -1e-5], dtype=torch.float64))
    factor = factorise(matrix.clone(), 1e-6)
    torch.testing.assert_close(factor @ factor.T, matrix + 1e-4 * torch.eye(3, dtype=torch.float64))


def test_nan_in_the_gram_matrix_is_explained() -> None:
    with pytest.raises(ConfigError, match="expected a finite positive semi-definite Gram matrix"):
        cholesky_with_ridge(torch.full((2, 2), torch.nan))
