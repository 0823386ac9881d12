"""The sparsity path: an order of all channels, errors that fall with the width, and a planted answer that is found."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entprune.config import PruneConfig
from entprune.errors import ConfigError
from entprune.path import PathSetting, SettingPath, lower_envelope, solve_setting
from entprune.regression import ConsumerProblem, GroupProblem, build_problem
from tests.regression_problems import random_covariance, random_problem, refit_error

SETTINGS = (
    PathSetting(),
    *PruneConfig().settings,
    PathSetting(entropy_weight=0.0, drop_threshold=0.02, l2_start=1e-3),
    PathSetting(entropy_weight=-0.5, drop_threshold=0.1),
    PathSetting(entropy_weight=0.3, l2_growth=8.0, max_drop=0.1, iterations=1),
)
PROBLEMS = st.builds(
    random_problem,
    st.integers(1, 8),
    st.lists(st.integers(1, 2), min_size=1, max_size=2),
    st.integers(0, 99),
)


# --- what holds for every problem ------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=PathSetting.label)
@settings(max_examples=8)
@given(problem=PROBLEMS)
def test_order_is_a_permutation_with_falling_errors(problem: GroupProblem, setting: PathSetting) -> None:
    path = solve_setting(problem, setting)
    c = problem.num_channels
    assert sorted(path.order.tolist()) == list(range(c))
    assert path.errors.shape == (c + 1,)
    assert np.all(np.diff(path.errors) <= 0)
    assert path.errors[0] == pytest.approx(len(problem.consumers), abs=1e-3)
    assert path.errors[-1] == pytest.approx(0.0, abs=1e-3)
    assert path.status in {"complete", "level limit"}


@settings(max_examples=10)
@given(PROBLEMS)
def test_errors_are_those_of_least_squares_on_the_kept_channels(problem: GroupProblem) -> None:
    path = solve_setting(problem, PathSetting())
    expected = [refit_error(problem, path.order[:k].tolist()) for k in range(problem.num_channels + 1)]
    np.testing.assert_allclose(path.errors, expected, atol=1e-3)


@settings(max_examples=10)
@given(PROBLEMS, st.sampled_from(SETTINGS))
def test_snapshots_are_points_of_the_simplex_with_shrinking_support(
    problem: GroupProblem, setting: PathSetting
) -> None:
    path = solve_setting(problem, setting)
    np.testing.assert_allclose(path.snapshots.sum(1), 1.0, atol=1e-5)
    assert path.snapshots.min() >= 0
    support = path.snapshots > 0
    assert np.all(np.diff(support.astype(int), axis=0) <= 0)  # a dropped channel does not come back
    dropped_last_to_first = path.order[support.all(0).sum() :]
    lives = support.sum(0)[dropped_last_to_first]
    assert np.all(np.diff(lives) <= 0)  # the order is the one in which channels left


def test_same_problem_gives_the_same_bits() -> None:
    problem = random_problem(8, [2, 1], 0)
    first, again = (solve_setting(problem, PathSetting()) for _ in range(2))
    np.testing.assert_array_equal(first.order, again.order)
    np.testing.assert_array_equal(first.errors, again.errors)
    np.testing.assert_array_equal(first.snapshots, again.snapshots)


@pytest.mark.parametrize("setting", SETTINGS, ids=PathSetting.label)
def test_numbering_of_the_channels_does_not_matter(setting: PathSetting) -> None:
    problem = random_problem(7, [2], 3)
    consumer = problem.consumers[0]
    renumbered = np.random.default_rng(0).permutation(7)
    features = (renumbered[:, None] * 2 + np.arange(2)).ravel()
    shuffled = ConsumerProblem(
        layer="a", gram=consumer.gram[np.ix_(features, features)], weight=consumer.weight[:, features], block=2
    )
    plain = solve_setting(problem, setting)
    other = solve_setting(replace(problem, consumers=(shuffled,)), setting)
    np.testing.assert_array_equal(renumbered[other.order], plain.order)


def test_units_of_inputs_and_outputs_do_not_change_the_order() -> None:
    covariance, weight = random_covariance(12, 1), np.random.default_rng(1).normal(size=(4, 12))
    features = np.arange(12).reshape(6, 2)
    orders = []
    for inputs, outputs in ((1.0, 1.0), (2.0**10, 1.0), (1.0, 2.0**-10), (2.0**-7, 2.0**7)):
        problem = build_problem("g", 6, {"a": (covariance * inputs**2, weight * outputs, features)})
        orders.append(solve_setting(problem, PathSetting()).order.tolist())
    assert all(order == orders[0] for order in orders)


def test_loud_consumer_does_not_outvote_a_quiet_one() -> None:
    covariance, features = random_covariance(12, 1), np.arange(12).reshape(6, 2)
    first, second = np.random.default_rng(1).normal(size=(2, 4, 12))
    plain = build_problem("g", 6, {"a": (covariance, first, features), "b": (covariance, second, features)})
    loud = build_problem("g", 6, {"a": (covariance, 1024.0 * first, features), "b": (covariance, second, features)})
    np.testing.assert_array_equal(solve_setting(plain, PathSetting()).order, solve_setting(loud, PathSetting()).order)


# --- problems with a known answer ------------------------------------------------------------------------------------


def planted(c: int, carriers: list[int], seed: int, *, decoy_weight: float) -> GroupProblem:
    """Only the carriers matter; every other channel is a noisy copy of one of them, read weakly or not at all."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(2000, c, 2))
    for channel in range(c):
        if channel not in carriers:
            source = carriers[channel % len(carriers)]
            rows[:, channel] = 0.9 * rows[:, source] + 0.45 * rows[:, channel]
    weight = generator.normal(size=(6, c, 2))
    others = [channel for channel in range(c) if channel not in carriers]
    weight[:, others] *= decoy_weight
    flat = rows.reshape(2000, -1)
    covariance = np.cov(flat, rowvar=False)
    return build_problem("g", c, {"a": (covariance, weight.reshape(6, -1), np.arange(2 * c).reshape(c, 2))})


@pytest.mark.parametrize("setting", SETTINGS, ids=PathSetting.label)
@pytest.mark.parametrize("decoy_weight", [0.0, 0.05])
@pytest.mark.parametrize("carriers", [[1, 4, 7], [0, 9], [2, 3, 5, 6, 8]])
def test_planted_channels_are_found_among_correlated_decoys(
    setting: PathSetting, decoy_weight: float, carriers: list[int]
) -> None:
    path = solve_setting(planted(10, carriers, 0, decoy_weight=decoy_weight), setting)
    assert set(path.order[: len(carriers)].tolist()) == set(carriers)
    assert path.errors[len(carriers)] < 0.01
    assert path.errors[len(carriers) - 1] > 5 * path.errors[len(carriers)]


def test_one_of_two_equal_channels_is_enough() -> None:
    rows = np.random.default_rng(0).normal(size=(500, 5))
    rows[:, 4] = rows[:, 1]
    weight = np.random.default_rng(1).normal(size=(3, 5))
    problem = build_problem("g", 5, {"a": (np.cov(rows, rowvar=False), weight, np.arange(5)[:, None])})
    path = lower_envelope("g", 1, [solve_setting(problem, setting) for setting in SETTINGS])
    assert path.errors[4] < 1e-3
    assert not {1, 4} <= set(path.kept(4))


def test_dead_channels_leave_first() -> None:
    covariance, weight = random_covariance(6, 0), np.random.default_rng(0).normal(size=(3, 6))
    covariance[[1, 4]] = covariance[:, [1, 4]] = 0.0
    problem = build_problem("g", 6, {"a": (covariance, weight, np.arange(6)[:, None])})
    for setting in SETTINGS:
        path = solve_setting(problem, setting)
        assert set(path.order[-2:].tolist()) == {1, 4}
        assert path.errors[4] < 1e-4


def test_envelope_of_the_default_settings_is_close_to_the_best_sets() -> None:
    excess = []
    for seed in range(6):
        problem = random_problem(6, [1, 2], seed)
        path = lower_envelope("g", 2, [solve_setting(problem, setting) for setting in PruneConfig().settings])
        for width in range(1, 6):
            best = min(refit_error(problem, kept) for kept in itertools.combinations(range(6), width))
            assert path.errors[width] >= best - 1e-3
            excess.append(path.errors[width] - best)
    assert np.mean(excess) < 0.1  # of two consumers, each with unit variance
    assert max(excess) < 0.5


def test_single_channel_has_a_path() -> None:
    path = solve_setting(random_problem(1, [2], 0), PathSetting())
    assert path.order.tolist() == [0]
    assert path.status == "complete"


# --- the envelope ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_envelope_is_the_least_error_at_each_width(c: int, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    paths = [
        SettingPath(
            setting=PathSetting(), order=generator.permutation(c), errors=np.sort(generator.uniform(size=c + 1))[::-1],
            snapshots=np.full((1, c), 1.0 / c, dtype=np.float32), status="complete",
        )
        for _ in range(count)
    ]  # fmt: skip
    envelope = lower_envelope("g", 1, paths)
    assert envelope.num_channels == c
    for width in range(c + 1):
        assert all(envelope.errors[width] <= path.errors[width] for path in paths)
        chosen = paths[envelope.choice[width]]
        assert envelope.errors[width] == chosen.errors[width]
        assert envelope.kept(width) == tuple(sorted(chosen.order[:width].tolist()))
        assert len(set(envelope.kept(width))) == width


def test_first_setting_wins_a_tie() -> None:
    path = solve_setting(random_problem(4, [1], 0), PathSetting())
    assert lower_envelope("g", 1, [path, path]).choice.tolist() == [0] * 5


@pytest.mark.parametrize("width", [-1, 5])
def test_width_out_of_range_is_explained(width: int) -> None:
    path = lower_envelope("g", 1, [solve_setting(random_problem(4, [1], 0), PathSetting())])
    with pytest.raises(ConfigError, match=rf"group 'g': width must lie in \[0, 4\], got {width}"):
        path.kept(width)


def test_probabilities_of_a_width_are_those_of_the_nearest_support() -> None:
    path = solve_setting(random_problem(6, [1], 0), PathSetting(drop_threshold=0.05, max_drop=0.2))
    envelope = lower_envelope("g", 1, [path])
    for width in range(1, 7):
        support = int((envelope.probability(width) > 0).sum())
        assert abs(support - width) == np.abs((path.snapshots > 0).sum(1) - width).min()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("entropy_weight", 11.0),
        ("drop_threshold", 0.0),
        ("l2_start", 2.0),
        ("l2_growth", 1.0),
        ("iterations", 0),
        ("max_drop", 1.5),
    ],
)
def test_setting_out_of_range_is_explained(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"path setting {name} is out of range, got {value}"):
        PathSetting(**{name: value})
