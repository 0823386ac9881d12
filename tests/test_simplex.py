"""The probability step: always on the simplex, never uphill, and the minimiser that a numerical search finds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from entprune.simplex import (
    _log_wright_omega,
    closed_form_probability,
    effective_channels,
    entropy,
    probability_step,
)

ORDINARY = st.floats(1e-4, 1e2)
EXTREME = st.one_of(st.sampled_from([0.0, 1e-30, 1e-12, 1.0, 1e12, 1e30]), ORDINARY)
SIGNED = st.sampled_from([-100.0, -1.0, -1e-6, 0.0, 1e-6, 1.0, 100.0])


def vectors(elements: st.SearchStrategy[float], most: int = 8) -> st.SearchStrategy[Tensor]:
    return st.lists(elements, min_size=1, max_size=most).map(lambda values: torch.tensor(values, dtype=torch.float64))


def point_on_simplex(size: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(size)))


def objective(w: Tensor, norm_squared: Tensor, l2_weight: float, entropy_weight: float) -> float:
    return float(l2_weight * (norm_squared / w.square()).sum()) + entropy_weight * float(entropy(w))


def step(norm_squared: Tensor, l2_weight: float, entropy_weight: float, current: Tensor) -> Tensor:
    return probability_step(norm_squared, l2_weight=l2_weight, entropy_weight=entropy_weight, current=current)


def assert_on_simplex(w: Tensor) -> None:
    assert w.dtype == torch.float64
    assert bool(torch.isfinite(w).all())
    assert bool((w >= 0).all())
    assert float(w.sum()) == pytest.approx(1.0, abs=1e-9)


@settings(max_examples=60)
@given(vectors(EXTREME), SIGNED, st.sampled_from([1e-12, 1e-4, 1.0, 1e6]), st.integers(0, 99))
def test_result_is_on_the_simplex_whatever_the_norms_and_the_sign(
    norm_squared: Tensor, entropy_weight: float, l2_weight: float, seed: int
) -> None:
    current = point_on_simplex(len(norm_squared), seed)
    assert_on_simplex(step(norm_squared, l2_weight, entropy_weight, current))


@given(SIGNED)
def test_current_point_on_the_border_is_survived(entropy_weight: float) -> None:
    current = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert_on_simplex(step(torch.tensor([0.0, 0.0, 1.0]), 0.1, entropy_weight, current))


@given(vectors(ORDINARY), st.floats(-50, 50), st.floats(1e-3, 10), st.integers(0, 99))
def test_objective_never_rises(norm_squared: Tensor, entropy_weight: float, l2_weight: float, seed: int) -> None:
    current = point_on_simplex(len(norm_squared), seed).clamp_min(1e-6)
    current = current / current.sum()
    before = objective(current, norm_squared, l2_weight, entropy_weight)
    after = objective(step(norm_squared, l2_weight, entropy_weight, current), norm_squared, l2_weight, entropy_weight)
    assert after <= before + 1e-9 * max(1.0, abs(before))


@given(st.integers(2, 8), st.integers(0, 999), st.sampled_from([1e-30, 1e-16, 1e-8, 1.0, 1e8, 1e16]))
def test_objective_never_rises_when_norms_and_entropy_differ_by_many_orders(size: int, seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    norm_squared = torch.from_numpy(scale * 10.0 ** generator.uniform(-3, 3, size))
    current = point_on_simplex(size, seed + 1).clamp_min(1e-6)
    current = current / current.sum()
    for entropy_weight in (-1.0, 1.0):
        before = objective(current, norm_squared, 1.0, entropy_weight)
        after = objective(step(norm_squared, 1.0, entropy_weight, current), norm_squared, 1.0, entropy_weight)
        assert after <= before + 1e-9 * max(1.0, abs(before))


@given(vectors(ORDINARY), st.floats(0.01, 50), st.floats(1e-3, 10), st.integers(0, 99))
def test_convex_step_beats_random_points(norm_squared: Tensor, strength: float, l2_weight: float, seed: int) -> None:
    current = point_on_simplex(len(norm_squared), seed)
    best = step(norm_squared, l2_weight, -strength, current)
    reached = objective(best, norm_squared, l2_weight, -strength)
    for number in range(5):
        nearby = 0.9 * best + 0.1 * point_on_simplex(len(best), 1000 * seed + number)
        assert reached <= objective(nearby, norm_squared, l2_weight, -strength) + 1e-9 * max(1.0, abs(reached))


@given(vectors(ORDINARY), st.floats(0.01, 50), st.integers(0, 99))
def test_concave_step_minimises_the_majorant(norm_squared: Tensor, entropy_weight: float, seed: int) -> None:
    current = point_on_simplex(len(norm_squared), seed).clamp_min(1e-6)
    current = current / current.sum()
    best = step(norm_squared, 1.0, entropy_weight, current)

    def majorant(w: Tensor) -> float:
        tangent = entropy(current) - ((current.log() + 1) * (w - current)).sum()
        return float((norm_squared / w.square()).sum() + entropy_weight * tangent)

    for number in range(5):
        nearby = 0.9 * best + 0.1 * point_on_simplex(len(best), 1000 * seed + number)
        assert majorant(best) <= majorant(nearby) + 1e-9 * max(1.0, abs(majorant(best)))


@pytest.mark.parametrize("entropy_weight", [-3.0, -0.1, 0.0])
def test_convex_problems_agree_with_a_numerical_minimiser(entropy_weight: float) -> None:
    norm_squared = torch.tensor([0.5, 0.1, 0.02, 2.0], dtype=torch.float64)

    def at(logits: np.ndarray) -> float:
        w = torch.softmax(torch.from_numpy(logits), 0)
        return objective(w, norm_squared, 0.3, entropy_weight)

    found = minimize(at, np.zeros(4), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 20_000})
    expected = torch.softmax(torch.from_numpy(found.x), 0)
    actual = step(norm_squared, 0.3, entropy_weight, torch.full((4,), 0.25))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@given(vectors(EXTREME), st.integers(0, 99))
def test_weak_entropy_of_either_sign_approaches_the_closed_form(norm_squared: Tensor, seed: int) -> None:
    assume(float(norm_squared.min()) > 0)
    norm_squared = norm_squared / norm_squared.max()
    expected = closed_form_probability(norm_squared)
    current = point_on_simplex(len(norm_squared), seed).clamp_min(1e-6)
    for sign in (-1.0, 1.0):
        actual = step(norm_squared, 1.0, sign * 1e-9, current / current.sum())
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_strong_negative_entropy_spreads_and_strong_positive_entropy_gathers() -> None:
    norm_squared = torch.tensor([1.0, 1.1, 0.9], dtype=torch.float64)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(step(norm_squared, 1e-6, -1e3, uniform), uniform, atol=1e-6, rtol=0)
    w = closed_form_probability(norm_squared)
    for _ in range(200):
        w = step(norm_squared, 1e-3, 1.0, w)
    assert effective_channels(w) < 1.9
    assert int(w.argmax()) == 1


def test_closed_form_is_the_cube_root() -> None:
    actual = closed_form_probability(torch.tensor([8.0, 1.0, 27.0]))
    torch.testing.assert_close(actual, torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64) / 6)


@given(st.integers(1, 1000))
def test_entropy_is_zero_at_a_vertex_and_log_c_at_the_centre(count: int) -> None:
    vertex = torch.zeros(count)
    vertex[count // 2] = 1.0
    assert float(entropy(vertex)) == 0.0
    centre = torch.full((count,), 1.0 / count, dtype=torch.float64)
    assert float(entropy(centre)) == pytest.approx(math.log(count), abs=1e-9)
    assert effective_channels(centre) == pytest.approx(count)


@given(st.floats(-700, 1e30))
def test_wright_omega_solves_its_equation(z: float) -> None:
    log_t = float(_log_wright_omega(torch.tensor(z, dtype=torch.float64)))
    assert math.exp(log_t) + log_t == pytest.approx(z, rel=1e-12, abs=1e-12)
