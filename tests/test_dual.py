"""Layers with more features than rows: the dual form is the primal one, in memory that does not know d x d."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from entprune import Budget, PathSetting, PruneConfig, prune
from entprune.calibration import LayerStatistics, SamplingPlan, collect_statistics, merge_statistics
from entprune.errors import ConfigError, DataError
from entprune.moments import (
    MomentAccumulator,
    Moments,
    RowAccumulator,
    RowMoments,
    feature_count,
    make_accumulator,
    merge,
)
from entprune.path import solve_setting
from entprune.refit import DualFit, PrimalFit, make_fit
from entprune.regression import (
    ConsumerProblem,
    GroupProblem,
    RowProblem,
    alternate,
    build_problem,
    initial_state,
    keep_channels,
    nested_errors,
    quadratic_probability_step,
    weight_step,
)
from entprune.ridge import GramRidge, RowRidge, compressed_answers, row_kernel
from entprune.stages import sampling_plan
from entprune.storage import load_statistics, save_statistics
from tests.micro_networks import IMAGE_SHAPE, Chain, random_split, warm_up

SIGNS = st.sampled_from([-1.0, -0.1, 0.0, 0.1, 1.0])


def correlated_rows(num_rows: int, num_features: int, seed: int, *, rank: int = 4, noise: float = 0.7) -> np.ndarray:
    generator = np.random.default_rng(seed)
    common = generator.normal(size=(num_rows, rank)) @ generator.normal(size=(rank, num_features))
    rows = common + noise * generator.normal(size=(num_rows, num_features)) + generator.normal(size=num_features)
    return rows.astype(np.float32)


def row_problem(num_channels: int, block: int, num_rows: int, seed: int, *, num_outputs: int = 3) -> GroupProblem:
    """One consumer with few rows."""
    size = num_channels * block
    rows = RowMoments(rows=correlated_rows(num_rows, size, seed))
    weight = np.random.default_rng(seed + 1).normal(size=(num_outputs, size)).astype(np.float32)
    return build_problem("g", num_channels, {"a": (rows, weight, np.arange(size).reshape(num_channels, block))})


def primal_of(problem: GroupProblem) -> GroupProblem:
    """The same regressions with their Gram matrices, in float64."""
    consumers = []
    for consumer in problem.consumers:
        assert isinstance(consumer, RowProblem)
        factor, weight = consumer.factor.astype(np.float64), consumer.weight.astype(np.float64)
        consumers.append(
            ConsumerProblem(layer=consumer.layer, gram=factor.T @ factor, weight=weight, block=consumer.block)
        )
    return replace(problem, consumers=tuple(consumers))


PROBLEMS = st.builds(
    row_problem, st.integers(4, 8), st.integers(2, 4), st.integers(2, 7), st.integers(0, 99),
    num_outputs=st.sampled_from([1, 3, 12]),
)  # fmt: skip


# --- rows instead of moments ------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(2, 6), st.lists(st.integers(0, 12), max_size=3), st.integers(0, 99))
def test_merged_rows_are_the_rows_of_one_pass(n: int, d: int, edges: list[int], seed: int) -> None:
    rows = correlated_rows(n, d, seed)
    parts = []
    for part in np.split(rows, sorted(edges)):
        accumulator = RowAccumulator(d)
        accumulator.update(torch.from_numpy(part))
        parts.append(accumulator.result())
    merged = parts[0]
    for part in parts[1:]:
        merged = merge(merged, part)
    assert isinstance(merged, RowMoments)
    np.testing.assert_array_equal(merged.rows, rows)
    assert merged.count == n


@given(st.integers(1, 12), st.integers(1, 6), st.sampled_from([0.0, 1e2, 1e4]), st.integers(0, 99))
def test_factor_is_that_of_the_covariance(n: int, d: int, offset: float, seed: int) -> None:
    rows = correlated_rows(n, d, seed) + np.float32(offset)
    factor = RowMoments(rows=rows).factor().astype(np.float64)
    assert factor.shape == (n, d)
    covariance = np.cov(rows.astype(np.float64), rowvar=False, bias=True).reshape(d, d)
    np.testing.assert_allclose(factor.T @ factor, covariance, atol=1e-4 + 1e-5 * offset**0.5)
    np.testing.assert_allclose(factor.mean(0), 0.0, atol=1e-5)


def test_form_depends_on_the_number_of_all_rows() -> None:
    assert isinstance(make_accumulator(10, 9), RowAccumulator)
    assert isinstance(make_accumulator(10, 10), MomentAccumulator)


def test_two_forms_do_not_merge() -> None:
    rows = RowMoments(rows=np.zeros((2, 3), np.float32))
    moments = Moments(count=1, mean=np.zeros(3), scatter=np.zeros((3, 3)))
    for first, second in ((rows, moments), (moments, rows)):
        with pytest.raises(DataError, match="expected moments of one form, got rows and a scatter matrix"):
            merge(first, second)
    with pytest.raises(DataError, match="equal size, got 3 and 4 features"):
        merge(rows, RowMoments(rows=np.zeros((2, 4), np.float32)))


def test_kept_rows_do_not_change_with_the_tensor_that_they_came_from() -> None:
    accumulator, rows = RowAccumulator(3), torch.ones(2, 3)
    accumulator.update(rows)
    rows.zero_()  # as an activation in place does
    np.testing.assert_array_equal(accumulator.result().rows, 1.0)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return warm_up(Chain())


def collect(model: nn.Module, start: int, stop: int) -> dict[str, LayerStatistics]:
    sampling = SamplingPlan(num_images=18, batch_size=4, min_rows=1, rows_per_feature=2.0)
    return collect_statistics(
        model, random_split(18), np.arange(start, stop), first_image=start,
        consumers=("conv2", "fc1", "fc2"), sampling=sampling,
    )  # fmt: skip


@settings(max_examples=8)
@given(st.lists(st.sampled_from(range(4, 18, 4)), max_size=4, unique=True))
def test_form_and_rows_do_not_depend_on_the_sharding(model: nn.Module, inner: list[int]) -> None:
    whole = collect(model, 0, 18)
    merged = merge_statistics([collect(model, a, b) for a, b in pairwise([0, *sorted(inner), 18])])
    forms = {name: type(entry.moments) for name, entry in whole.items()}
    assert forms == {"conv2": Moments, "fc1": RowMoments, "fc2": Moments}  # 18 images, 20 features
    assert forms == {name: type(entry.moments) for name, entry in merged.items()}
    np.testing.assert_array_equal(merged["fc1"].moments.rows, whole["fc1"].moments.rows)
    weight, bias = model.get_parameter("fc1.weight"), model.get_parameter("fc1.bias")
    answers = torch.from_numpy(whole["fc1"].moments.rows) @ weight.T + bias
    torch.testing.assert_close(torch.from_numpy(whole["fc1"].outputs), answers)


def test_statistics_with_rows_round_trip(tmp_path: Path) -> None:
    rows = correlated_rows(3, 5, 0)
    outputs = np.zeros((3, 2), np.float32)
    scatter = Moments(count=7, mean=np.ones(2), scatter=np.eye(2))
    original = {
        "a": LayerStatistics(moments=RowMoments(rows=rows), outputs=outputs),
        "b": LayerStatistics(moments=scatter, outputs=outputs),
        "c": LayerStatistics(moments=None, outputs=outputs),
    }
    save_statistics(original, tmp_path / "x")
    loaded = load_statistics(tmp_path / "x")
    assert [type(entry.moments) for entry in loaded.values()] == [RowMoments, Moments, type(None)]
    assert loaded["a"].moments.rows.dtype == np.float32
    np.testing.assert_array_equal(loaded["a"].moments.rows, rows)


# --- the scaled problem -----------------------------------------------------------------------------------------------


@given(st.integers(2, 5), st.integers(1, 3), st.integers(2, 30), st.integers(0, 99))
def test_rows_give_the_problem_of_their_covariance(c: int, block: int, num_rows: int, seed: int) -> None:
    rows = RowMoments(rows=correlated_rows(num_rows, c * block + 4, seed))  # four features of another group
    factor = rows.factor().astype(np.float64)
    weight = np.random.default_rng(seed).normal(size=(3, c * block + 4)).astype(np.float32)
    features = np.random.default_rng(seed).permutation(c * block + 4)[: c * block].reshape(c, block)
    actual = build_problem("g", c, {"a": (rows, weight, features)}).consumers[0]
    expected = build_problem("g", c, {"a": (factor.T @ factor, weight, features)}).consumers[0]
    assert isinstance(actual, RowProblem) == (c * block > num_rows)
    gram = actual.factor.T @ actual.factor if isinstance(actual, RowProblem) else actual.gram
    np.testing.assert_allclose(gram, expected.gram, atol=1e-4)
    np.testing.assert_allclose(actual.weight, expected.weight, rtol=1e-4, atol=1e-6)


def test_cost_grows_with_the_features_and_not_with_their_cube() -> None:
    costs = [row_problem(c, 4, 6, 0).solve_cost() for c in (10, 20)]
    assert 1 < costs[1] / costs[0] < 2.5


# --- the Lambda step --------------------------------------------------------------------------------------------------


@given(PROBLEMS, st.sampled_from([1e-3, 1e-1, 10.0]), st.integers(0, 99))
def test_dual_step_is_the_primal_one(problem: GroupProblem, l2_weight: float, seed: int) -> None:
    dual, primal = initial_state(problem), initial_state(primal_of(problem))
    assert isinstance(dual.ridges[0], RowRidge)
    assert isinstance(primal.ridges[0], GramRidge)
    assert dual.total == pytest.approx(primal.total, abs=1e-5)
    np.testing.assert_allclose(dual.probability, primal.probability, atol=1e-6)
    point = np.random.default_rng(seed).dirichlet(np.ones(problem.num_channels))
    dual.probability = primal.probability = torch.from_numpy(point)
    norms, loss = weight_step(dual, l2_weight)
    expected_norms, expected_loss = weight_step(primal, l2_weight)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-3, atol=1e-7)
    assert loss == pytest.approx(expected_loss, abs=1e-5)


@given(PROBLEMS, st.sampled_from([1e-3, 1e-1]))
def test_dual_step_is_the_naive_solution(problem: GroupProblem, l2_weight: float) -> None:
    state, consumer = initial_state(problem), problem.consumers[0]
    F, W = (torch.from_numpy(array).double() for array in (consumer.factor, consumer.weight))
    D = state.probability.repeat_interleave(consumer.block)
    A = F * D
    Lambda = W @ F.T @ A @ torch.linalg.inv(A.T @ A + l2_weight * torch.eye(len(D), dtype=torch.float64))
    norms, loss = weight_step(state, l2_weight)
    expected = (Lambda * D).square().sum(0).reshape(-1, consumer.block).sum(1)
    np.testing.assert_allclose(norms, expected, rtol=1e-3, atol=1e-7)
    residual = (F @ W.T - A @ Lambda.T).square().sum() + l2_weight * Lambda.square().sum()
    assert loss == pytest.approx(float(residual), abs=1e-5)


@given(PROBLEMS, SIGNS, st.sampled_from([1e-3, 1e-2, 0.3]))
def test_objective_never_rises_in_the_dual_form(problem: GroupProblem, sign: float, relative_l2: float) -> None:
    l2_weight = relative_l2 / problem.num_channels**2
    state = initial_state(problem)
    _, history = alternate(state, l2_weight=l2_weight, entropy_weight=sign * relative_l2, iterations=20)
    assert max(np.diff(history)) <= 1e-6 * max(1.0, abs(history[0]))


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_compressed_answers_keep_the_inner_products_of_the_rows(t: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor, weight = torch.randn(t, 6, generator=generator), torch.randn(m, 6, generator=generator)
    answers, compressed = (factor @ weight.T).double(), compressed_answers(factor, weight)
    assert compressed.shape == (t, min(t, m))
    torch.testing.assert_close(compressed @ compressed.T, answers @ answers.T)


def test_kernel_of_many_columns_is_the_product() -> None:
    rows = torch.randn(3, 10_000)
    torch.testing.assert_close(row_kernel(rows), rows.double() @ rows.double().T, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("entropy_weight", [-0.05, 0.0, 0.1])
def test_quadratic_step_is_the_same_in_both_forms(entropy_weight: float) -> None:
    problem = row_problem(5, 3, 6, 0)
    layer_weights = [torch.from_numpy(np.random.default_rng(1).normal(size=problem.consumers[0].weight.shape))]
    dual, primal = (
        quadratic_probability_step(
            each, layer_weights, entropy_weight=entropy_weight,
            current=torch.full((5,), 0.2, dtype=torch.float64), iterations=50,
        )
        for each in (problem, primal_of(problem))
    )  # fmt: skip
    np.testing.assert_allclose(dual, primal, atol=1e-4)


def test_nan_in_the_rows_is_explained() -> None:
    problem = row_problem(5, 3, 6, 0)
    problem.consumers[0].factor[2, 3] = np.nan
    with pytest.raises(ConfigError, match="expected a finite positive semi-definite Gram matrix"):
        weight_step(initial_state(problem), 0.1)


# --- dropping channels ------------------------------------------------------------------------------------------------


@given(PROBLEMS, st.data())
def test_form_changes_where_the_features_become_few(problem: GroupProblem, data: st.DataObject) -> None:
    consumer, c = problem.consumers[0], problem.num_channels
    dual, primal = initial_state(problem), initial_state(primal_of(problem))
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, c - 1), min_size=1))))
    for state in (dual, primal):
        keep_channels(state, kept)
    is_dual = len(kept) * consumer.block > len(consumer.factor)
    assert isinstance(dual.ridges[0], RowRidge if is_dual else GramRidge)
    assert dual.alive.tolist() == kept.tolist()
    norms, loss = weight_step(dual, 0.05)
    expected_norms, expected_loss = weight_step(primal, 0.05)
    np.testing.assert_allclose(norms, expected_norms, rtol=2e-3, atol=1e-6)
    assert loss == pytest.approx(expected_loss, abs=2e-5)


@settings(max_examples=10)
@given(PROBLEMS)
def test_paths_of_both_forms_have_the_same_probabilities(problem: GroupProblem) -> None:
    setting = PathSetting(drop_threshold=0.02, l2_start=0.5)
    dual, primal = (solve_setting(each, setting) for each in (problem, primal_of(problem)))
    np.testing.assert_allclose(dual.snapshots[0], primal.snapshots[0], atol=2e-3)
    assert sorted(dual.order.tolist()) == list(range(problem.num_channels))
    assert np.all(np.diff(dual.errors) <= 0)


# --- held-out errors --------------------------------------------------------------------------------------------------


@given(PROBLEMS, st.integers(0, 99))
def test_held_out_errors_fall_from_the_variance_to_nothing(problem: GroupProblem, seed: int) -> None:
    errors = nested_errors(problem, np.random.default_rng(seed).permutation(problem.num_channels).tolist())
    assert errors.shape == (problem.num_channels + 1,)
    assert errors[0] == pytest.approx(1.0, abs=1e-4)
    assert errors[-1] == 0.0
    assert np.all(np.diff(errors) <= 0)


def test_errors_of_both_forms_add_up_over_consumers() -> None:
    problem = row_problem(6, 3, 8, 0)
    gram = primal_of(row_problem(6, 2, 8, 1))
    both = replace(problem, consumers=problem.consumers + gram.consumers)
    order = [3, 1, 5, 0, 2, 4]
    expected = nested_errors(problem, order) + nested_errors(gram, order)
    np.testing.assert_allclose(nested_errors(both, order), expected)


def test_what_the_rows_cannot_tell_is_not_counted_as_explained() -> None:
    """Independent channels: no refit recovers the removed ones, though the kept features explain all rows."""
    c, block, num_rows = 40, 4, 60
    rows = np.random.default_rng(0).normal(size=(num_rows, c * block)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=(5, c * block)).astype(np.float32)
    features = np.arange(c * block).reshape(c, block)
    problem = build_problem("g", c, {"a": (RowMoments(rows=rows), weight, features)})
    errors, training = nested_errors(problem, range(c)), nested_errors(primal_of(problem), range(c))
    assert training[30] < 1e-3
    assert errors[30] > 0.15  # a quarter of the channels is missing


def test_what_few_channels_share_is_counted_as_explained() -> None:
    """Three directions behind all channels: a few of them tell everything, on rows never seen too."""
    rows = RowMoments(rows=correlated_rows(40, 80, 0, rank=3, noise=0.01))
    weight = np.random.default_rng(1).normal(size=(5, 80)).astype(np.float32)
    problem = build_problem("g", 20, {"a": (rows, weight, np.arange(80).reshape(20, 4))})
    errors = nested_errors(problem, range(20))
    assert errors[0] == pytest.approx(1.0, abs=1e-4)
    assert errors[4] < 0.02


def test_rows_in_the_order_of_their_classes_are_held_out_fairly() -> None:
    generator = np.random.default_rng(0)
    classes = np.repeat(generator.normal(size=(4, 80)), 16, axis=0)  # 64 rows, one class after the other
    rows = (classes + 0.05 * generator.normal(size=(64, 80))).astype(np.float32)
    problem = build_problem(
        "g", 20, {"a": (RowMoments(rows=rows), generator.normal(size=(5, 80)), np.arange(80).reshape(20, 4))}
    )
    assert nested_errors(problem, range(20))[5] < 0.05


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_very_few_rows_are_survived(num_rows: int) -> None:
    path = solve_setting(row_problem(6, 2, num_rows, 0), PathSetting())
    assert np.isfinite(path.errors).all()
    assert path.errors[-1] == 0.0


def test_silent_channels_have_a_path() -> None:
    rows = correlated_rows(6, 16, 0)
    rows[:, :8] = 1.0
    weight = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    problem = build_problem("g", 8, {"a": (RowMoments(rows=rows), weight, np.arange(16).reshape(8, 2))})
    path = solve_setting(problem, PathSetting())
    assert set(path.order[-4:].tolist()) == {0, 1, 2, 3}
    assert np.isfinite(nested_errors(problem, range(8))).all()


# --- refit ------------------------------------------------------------------------------------------------------------


@given(
    st.integers(2, 6), st.integers(8, 12), st.booleans(), st.sampled_from([1e-3, 1e-1, 10.0]),
    st.lists(st.integers(1, 5), max_size=2), st.integers(0, 99),
)  # fmt: skip
def test_dual_refit_is_the_primal_one(
    t: int, d: int, intercept: bool, ridge: float, edges: list[int], seed: int
) -> None:
    rows = torch.from_numpy(correlated_rows(t, d, seed))
    generator = torch.Generator().manual_seed(seed)
    answers, prior = torch.randn(t, 3, generator=generator), torch.randn(3, d, generator=generator)
    dual, primal = make_fit(t, d, 3, intercept, "cpu"), PrimalFit(d, 3, intercept, "cpu")
    assert isinstance(dual, DualFit)
    for fit in (dual, primal):
        for part in np.split(np.arange(t), sorted(edges)):
            if len(part):
                fit.update(rows[part].clone(), answers[part].clone())
    weight, bias = dual.solve(prior, ridge)
    expected_weight, expected_bias = primal.solve(prior, ridge)
    torch.testing.assert_close(weight, expected_weight, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(bias, expected_bias, rtol=1e-3, atol=5e-3)
    assert isinstance(make_fit(d, d, 3, intercept, "cpu"), PrimalFit)


# --- memory, and the whole job ----------------------------------------------------------------------------------------

_WIDE = """
import resource
import numpy as np, torch
from entprune.moments import RowMoments
from entprune.path import PathSetting, solve_setting
from entprune.regression import build_problem
from entprune.refit import make_fit

c, block, t, m = 512, 49, 64, 20
d = c * block
torch.set_num_threads(1)
(torch.ones(64, 64) @ torch.ones(64, 64)).double().cholesky_inverse()  # libraries take what they take
generator = np.random.default_rng(0)
rows = generator.standard_normal((t, d), dtype=np.float32)
weight = generator.standard_normal((m, d), dtype=np.float32)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + d * d * 4 // 4, -1))
problem = build_problem("g", c, {"fc": (RowMoments(rows=rows), weight, np.arange(d).reshape(c, block))})
path = solve_setting(problem, PathSetting(l2_growth=8.0, max_drop=0.5))
assert sorted(path.order.tolist()) == list(range(c)) and path.errors[-1] == 0.0
fit = make_fit(t, d, m, True, "cpu")
fit.update(torch.from_numpy(rows), torch.from_numpy(rows) @ torch.from_numpy(weight).T)
fit.solve(torch.from_numpy(weight), 1e-3)
try:
    torch.empty(d, d)
except RuntimeError:
    print("within the limit")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_layer_of_25088_features_needs_no_square_matrix() -> None:
    """A quarter of one d x d matrix in float32 is all that the process may take beside its inputs."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", _WIDE], cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "within the limit"


class WideHead(nn.Module):
    """A linear layer that reads 6 x 6 pixels of eight channels: 288 features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, padding=1)
        self.fc1 = nn.Linear(288, 12)
        self.fc2 = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(torch.relu(self.conv(x)), 1)
        return self.fc2(torch.relu(self.fc1(x)))


def test_network_with_fewer_images_than_features_is_pruned() -> None:
    torch.manual_seed(0)
    dense = WideHead().eval()
    config = PruneConfig(calibration_samples=40, batch_size=8, min_rows=1, rows_per_feature=2.0, max_rounds=2)
    assert sampling_plan(config, 40).num_rows(dense.fc1, 1) < feature_count(dense.fc1)
    images = np.random.default_rng(0).normal(size=(40, *IMAGE_SHAPE)).astype(np.float32)
    found = prune(dense, images, budget=Budget(parameters_removed=0.4), config=config)
    assert found.report["one_shot"]["parameters_removed"] >= 0.4
    assert found.certificate.passed
    assert all(bool(torch.isfinite(value).all()) for value in found.model.state_dict().values())


@pytest.mark.parametrize("seed", range(10))
def test_features_that_repeat_each_other_are_fit_whatever_the_rounding(seed: int) -> None:
    """Three directions for twelve features: the Gram matrix has eigenvalues of rounding's size and either sign."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(500, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    answers = rows @ torch.randn(12, 2, generator=generator)
    for fit in (PrimalFit(12, 2, True, "cpu"), DualFit(True)):
        fit.update(rows.clone(), answers.clone())
        weight, bias = fit.solve(torch.zeros(2, 12), 1e-12)
        torch.testing.assert_close(rows @ weight.T + bias, answers, atol=1e-2 * float(answers.std()), rtol=0)
