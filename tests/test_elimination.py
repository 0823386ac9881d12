"""Backward elimination: the exact rise of the error, checked against brute force, and what follows from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entprune.elimination import _Elimination, can_eliminate, eliminate
from entprune.path import PathSetting, solve_setting
from entprune.regression import ConsumerProblem, GroupProblem, RowProblem, nested_errors
from tests.regression_problems import random_problem, refit_error

PROBLEMS = st.builds(
    random_problem, st.integers(2, 9), st.lists(st.integers(1, 3), min_size=1, max_size=2), st.integers(0, 99)
)


@settings(max_examples=15)
@given(PROBLEMS)
def test_each_channel_that_leaves_is_the_least_missed(problem: GroupProblem) -> None:
    """Up to 32 channels leave one by one: greedy by the refit error, up to the small ridge."""
    order, _ = eliminate(problem)
    for width in range(1, problem.num_channels):
        kept = order[: width + 1]
        errors = {channel: refit_error(problem, [other for other in kept if other != channel]) for channel in kept}
        assert errors[order[width]] <= min(errors.values()) + 2e-3


@settings(max_examples=15)
@given(PROBLEMS)
def test_order_is_a_permutation_and_probabilities_lie_on_the_simplex(problem: GroupProblem) -> None:
    order, snapshots = eliminate(problem)
    assert sorted(order) == list(range(problem.num_channels))
    np.testing.assert_allclose(snapshots.sum(1), 1.0, atol=1e-5)
    assert snapshots.min() >= 0.0
    support = (snapshots > 0).sum(1)
    assert support[0] == problem.num_channels
    assert support[-1] == 1
    assert np.all(np.diff(support) <= 0)
    assert set(np.flatnonzero(snapshots[-1])) == {order[0]}


def wide_problem(num_channels: int = 150, block: int = 4) -> GroupProblem:
    """Many channels, of which several leave at once and the matrices are inverted anew on the way."""
    generator = torch.Generator().manual_seed(3)
    d = num_channels * block
    rows = torch.randn(2 * d, d // 3, generator=generator) @ torch.randn(d // 3, d, generator=generator)
    rows = rows + 0.3 * torch.randn(2 * d, d, generator=generator)
    rows = rows / rows.std(0)
    gram = (rows.T @ rows / len(rows)).float()
    weight = torch.randn(24, d, generator=generator)
    weight = weight / float(((weight @ gram) * weight).sum()) ** 0.5
    consumer = ConsumerProblem(layer="next", gram=gram.numpy(), weight=weight.numpy(), block=block)
    return GroupProblem(name="wide", num_channels=num_channels, consumers=(consumer,))


def test_weights_after_many_updates_are_those_of_a_new_fit() -> None:
    problem = wide_problem()
    (consumer,) = problem.consumers
    assert isinstance(consumer, ConsumerProblem)
    fit, alive = _Elimination(consumer, "cpu"), torch.arange(problem.num_channels)
    for _ in range(12):
        kept = fit.increase().argsort(stable=True)[5:].sort().values
        fit.keep(kept)
        alive = alive[kept]
    features = (alive[:, None] * consumer.block + torch.arange(consumer.block)).flatten()
    gram, weight = torch.from_numpy(consumer.gram).double(), torch.from_numpy(consumer.weight).double()
    within = gram[features][:, features]
    within.diagonal().add_(1e-4 * within.diagonal().mean())
    expected = torch.linalg.solve(within, gram[features] @ weight.T)
    difference = (fit._weight.double() - expected).norm() / expected.norm()
    assert difference < 2e-2


def test_it_finds_smaller_errors_than_an_arbitrary_order() -> None:
    problem = wide_problem()
    order, _ = eliminate(problem)
    shuffled = np.random.default_rng(0).permutation(problem.num_channels).tolist()
    found, other = nested_errors(problem, order), nested_errors(problem, shuffled)
    assert np.all(found[30:120] < 0.9 * other[30:120])


def test_a_copied_channel_leaves_before_the_others() -> None:
    problem = random_problem(6, [1], 0)
    (consumer,) = problem.consumers
    assert isinstance(consumer, ConsumerProblem)
    copies = np.array([0, 1, 2, 3, 4, 5, 2])
    gram, weight = consumer.gram[np.ix_(copies, copies)], consumer.weight[:, copies].copy()
    weight[:, 6] = 0.0
    doubled = ConsumerProblem(layer="next", gram=gram, weight=weight, block=1)
    order, _ = eliminate(GroupProblem(name="g", num_channels=7, consumers=(doubled,)))
    assert order[-1] in {2, 6}


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_channels_without_any_information_of_their_own_are_survived(rank: int) -> None:
    """Late layers: dead channels, and far fewer directions than features."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(50, rank, generator=generator) @ torch.randn(rank, 240, generator=generator)
    gram, weight = rows.T @ rows / 50, torch.randn(4, 240, generator=generator)
    consumer = ConsumerProblem(layer="next", gram=gram.numpy(), weight=weight.numpy(), block=3)
    order, snapshots = eliminate(GroupProblem(name="g", num_channels=80, consumers=(consumer,)))
    assert sorted(order) == list(range(80))
    assert np.isfinite(snapshots).all()


def test_a_consumer_kept_in_rows_is_left_to_the_continuation() -> None:
    generator = np.random.default_rng(0)
    factor, weight = (
        generator.normal(size=(6, 12)).astype(np.float32),
        generator.normal(size=(3, 12)).astype(np.float32),
    )
    rows = RowProblem(layer="next", factor=factor / 6**0.5, weight=weight, block=2)
    problem = GroupProblem(name="g", num_channels=6, consumers=(rows,))
    assert not can_eliminate(problem)
    eliminated, continued = (solve_setting(problem, PathSetting(method=m)) for m in ("elimination", "entropy"))
    np.testing.assert_array_equal(eliminated.order, continued.order)


@pytest.mark.parametrize("method", ["entropy", "elimination"])
def test_both_methods_are_told_apart_by_their_labels(method: str) -> None:
    setting = PathSetting(method=method)  # type: ignore[arg-type]
    assert (setting.label() == "backward elimination") == (method == "elimination")
    assert PathSetting(**setting.to_dict()) == setting
