"""Estimates of the accuracy drop, and when enough images have been seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entprune.errors import ConfigError
from entprune.selection import NO_CLASS, DenseReference, DropEstimate, StopRule, fit_temperature, paired_interval


def make_reference(size: int, seed: int, estimate: DropEstimate = "posterior") -> DenseReference:
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.ones(4), size).astype(np.float32)
    return DenseReference(labels=generator.integers(0, 4, size), probabilities=probabilities, estimate=estimate)


@given(st.integers(1, 50), st.integers(0, 2**16))
def test_a_candidate_that_agrees_with_the_dense_network_loses_nothing(size: int, seed: int) -> None:
    for estimate in ("labels", "posterior", "blend"):
        reference = make_reference(size, seed, estimate)  # type: ignore[arg-type]
        assert not reference.drops(reference.probabilities.argmax(1)).any()


@given(st.integers(1, 50), st.integers(0, 2**16))
def test_label_estimate_is_the_difference_of_accuracies(size: int, seed: int) -> None:
    reference = make_reference(size, seed, "labels")
    predicted = np.random.default_rng(seed + 1).integers(0, 4, size)
    candidate = 100.0 * float((predicted == reference.labels).mean())
    assert reference.drops(predicted).mean() == pytest.approx(reference.accuracy() - candidate)


def test_posterior_estimate_is_the_label_estimate_with_labels_drawn_from_the_posterior() -> None:
    generator = np.random.default_rng(0)
    probabilities = np.repeat(generator.dirichlet(np.ones(3), 20), 4000, axis=0)
    predicted = np.repeat(generator.integers(0, 3, 20), 4000)
    labels = (probabilities.cumsum(1) < generator.random(len(probabilities))[:, None]).sum(1)
    reference = DenseReference(labels=labels, probabilities=probabilities.astype(np.float32), estimate="posterior")
    by_posterior, by_labels = reference.drops(predicted), reference.drops(predicted, "labels")
    assert by_posterior.mean() == pytest.approx(by_labels.mean(), abs=1.0)
    assert by_posterior.std() < by_labels.std()


@given(st.integers(1, 30), st.integers(0, 2**16))
def test_posterior_estimate_never_credits_a_disagreement(size: int, seed: int) -> None:
    reference = make_reference(size, seed)
    drops = reference.drops(np.random.default_rng(seed + 1).integers(0, 4, size))
    assert (drops >= 0).all()
    assert (drops <= 100).all()


def test_an_image_without_finite_logits_costs_the_whole_dense_probability() -> None:
    reference = make_reference(5, 3)
    expected = 100.0 * reference.probabilities.max(1).astype(np.float64)
    np.testing.assert_allclose(reference.drops(np.full(5, NO_CLASS)), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_temperature_is_found_from_labels_drawn_from_the_posterior(temperature: float) -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.full(5, 0.5), 20_000)
    labels = (probabilities.cumsum(1) < generator.random(len(probabilities))[:, None]).sum(1)
    logits = (temperature * np.log(probabilities + 1e-30) + 100.0).astype(np.float32)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize(("right", "expected"), [(True, 0.25), (False, 4.0)])
def test_temperature_stays_within_bounds_where_all_labels_are_right_or_wrong(right: bool, expected: float) -> None:
    logits = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    labels = logits.argmax(1) if right else logits.argmin(1)
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-5)


def test_unknown_estimate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"one of labels, posterior, blend, got 'guess'"):
        make_reference(3, 0, "guess")  # type: ignore[arg-type]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=40), st.floats(0.0, 3.0))
def test_bounds_enclose_the_mean_and_widen_with_the_quantile(values: list[float], quantile: float) -> None:
    drops = np.array(values)
    mean, low, high = StopRule(max_drop=1.0, quantile=quantile).bounds(drops)
    assert low <= mean <= high
    normal = quantile * drops.std(ddof=1) / len(drops) ** 0.5
    assert mean - low == pytest.approx(normal)
    assert high - mean >= normal - 1e-9


@pytest.mark.parametrize("count", [1024, 4000, 16_000])
@pytest.mark.parametrize("rate", [0.0002, 0.001, 0.005])
def test_upper_bound_holds_where_few_images_differ(count: int, rate: float) -> None:
    """Nineteen times in twenty, even where most samples of that size hold no or one lost image."""
    rule = StopRule(max_drop=None, quantile=1.645)
    lost = np.random.default_rng(0).binomial(count, rate, size=400)
    bounds = {int(k): rule.bounds(np.repeat([100.0, 0.0], [k, count - k]))[2] for k in np.unique(lost)}
    assert np.mean([bounds[int(k)] >= 100.0 * rate for k in lost]) >= 0.93


@pytest.mark.parametrize(
    ("count", "drop", "max_drop", "decided"),
    [
        (1000, 0.0, 0.5, True),
        (100, 0.0, 0.5, False),  # none lost of few says little
        (100, 100.0, 0.5, True),
        (1000, 0.5, 0.5, False),
        (10_000, 0.2, 0.5, True),
        (10_000, 0.3, 0.5, False),  # within the budget, but not within half of it
        (1000, 0.0, None, False),
    ],
)
def test_scoring_stops_when_the_verdict_is_clear(
    count: int, drop: float, max_drop: float | None, decided: bool
) -> None:
    rule = StopRule(max_drop=max_drop, quantile=1.0, chunk=100)
    assert rule.is_decided(np.full(count, drop)) is decided
    assert not rule.is_decided(np.full(99, drop)), "less than a chunk decides nothing"


@pytest.mark.parametrize(("lost", "won"), [(0.03, 0.025), (0.004, 0.001), (0.0005, 0.0)])
def test_the_interval_of_a_drop_holds_on_new_images(lost: float, won: float) -> None:
    generator, holds = np.random.default_rng(0), 0
    for _ in range(1000):
        kind = generator.choice(4, 2000, p=[lost, won, 0.9, 0.1 - lost - won])
        low, high = paired_interval(np.isin(kind, (0, 2)), np.isin(kind, (1, 2)))
        holds += low <= 100 * (lost - won) <= high
    assert holds >= 930  # 950 are meant, less three standard errors of 1,000 draws


def test_the_interval_of_a_drop_is_that_of_the_images_that_differ() -> None:
    dense, smaller = np.ones(1000, dtype=bool), np.ones(1000, dtype=bool)
    low, high = paired_interval(dense, smaller)
    assert low == -high
    assert 0.1 < high < 0.3  # no image differs, and still 1,000 of them do not show that none ever will
    smaller[:30], dense[30:50] = False, False
    low, high = paired_interval(dense, smaller)
    middle, reach = 10 / 1002, 1.959964 * (51 / 1002 - (10 / 1002) ** 2) ** 0.5 / 1002**0.5
    assert (low, high) == pytest.approx((100 * (middle - reach), 100 * (middle + reach)))
    assert paired_interval(smaller, dense) == pytest.approx((-high, -low))
