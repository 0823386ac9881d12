"""Widths for a budget: the cost model is the real network's size, the budget holds, the choice is close to the best."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from entprune.allocation import (
    AllocationProblem,
    CostModel,
    LayerCost,
    Objective,
    allocate,
    allocate_within,
    build_cost_model,
)
from entprune.assembly import slice_network
from entprune.errors import ConfigError
from entprune.evaluation import count_macs, count_parameters
from entprune.groups import find_groups
from entprune.models import build_model
from entprune.plan import GroupPlan, PruningPlan
from tests.micro_networks import IMAGE_SHAPE, Bottleneck, Chain, Concat, Depthwise, Residual

OBJECTIVES: tuple[Objective, ...] = ("parameters", "macs")


def check_cost(model: nn.Module, shape: tuple[int, int, int], seed: int) -> None:
    model.eval()
    groups = find_groups(model, torch.zeros(2, *shape))
    cost = build_cost_model(model, groups, shape)
    generator = np.random.default_rng(seed)
    widths = {group.name: int(generator.integers(1, group.num_channels + 1)) for group in groups.groups}
    plan = PruningPlan(
        groups=tuple(
            GroupPlan(name=g.name, num_channels=g.num_channels, kept_channels=tuple(range(widths[g.name])))
            for g in groups.groups
        )
    )
    smaller = slice_network(model, groups, plan)
    assert cost.parameters(widths) == count_parameters(smaller)
    assert cost.macs(widths) == count_macs(smaller, shape)


@settings(max_examples=8)
@given(st.integers(0, 999))
@pytest.mark.parametrize("build", [Chain, lambda: Chain(bias=True), Residual, Bottleneck, Concat, Depthwise])
def test_cost_model_is_the_size_of_the_sliced_network(build: Callable[[], nn.Module], seed: int) -> None:
    check_cost(build(), IMAGE_SHAPE, seed)


@pytest.mark.parametrize(
    ("name", "shape"), [("lenet", (1, 28, 28)), ("digits_cnn", (1, 8, 8)), ("resnet20_cifar", (3, 32, 32))]
)
def test_cost_model_of_built_in_networks(name: str, shape: tuple[int, int, int]) -> None:
    for seed in range(2):
        check_cost(build_model(name, num_classes=10, input_shape=shape), shape, seed)


def test_cost_along_one_group_is_the_difference_of_whole_costs() -> None:
    model = Residual().eval()
    groups = find_groups(model, torch.zeros(2, *IMAGE_SHAPE))
    cost = build_cost_model(model, groups, IMAGE_SHAPE)
    widths = {"stem": 4, "conv1": 3}
    for objective, name in itertools.product(OBJECTIVES, widths):
        dense = groups.named(name).num_channels
        along = cost.along(name, widths, dense, objective)
        whole = [cost.evaluate({**widths, name: width}, objective) for width in range(dense + 1)]
        np.testing.assert_allclose(np.diff(along), np.diff(whole))


@pytest.mark.parametrize("build", [Chain, Residual, Bottleneck, Concat, Depthwise])
def test_costs_of_groups_and_of_the_rest_are_the_whole(build: Callable[[], nn.Module]) -> None:
    model = build().eval()
    groups = find_groups(model, torch.zeros(2, *IMAGE_SHAPE))
    cost = build_cost_model(model, groups, IMAGE_SHAPE)
    widths = {group.name: group.num_channels for group in groups.groups}
    for objective in OBJECTIVES:
        parts, rest = cost.by_group(widths, objective)
        assert set(parts) == set(widths)
        assert min(parts.values()) > 0
        assert sum(parts.values()) + rest == cost.evaluate(widths, objective)


def test_cost_of_a_group_is_that_of_the_layers_that_write_it() -> None:
    model = build_model("lenet", num_classes=10, input_shape=(1, 28, 28))
    cost = build_cost_model(model, find_groups(model, torch.zeros(2, 1, 28, 28)), (1, 28, 28))
    parts, rest = cost.by_group({"conv1": 10, "conv2": 16, "fc1": 51}, "parameters")
    assert parts == {"conv1": 10 * 25 + 10, "conv2": 16 * 10 * 25 + 16, "fc1": 51 * 16 * 16 + 51}
    assert rest == 51 * 10 + 10


# --- the choice ------------------------------------------------------------------------------------------------------


def chain_cost(widths: list[int]) -> CostModel:
    """A chain of 3x3 convolutions from 3 channels to 10 outputs."""
    names = [f"g{number}" for number in range(len(widths))]
    layers = []
    for number in range(len(widths) + 1):
        reads = {names[number - 1]: 1} if number else {}
        writes = {names[number]: 1} if number < len(widths) else {}
        layers.append(
            LayerCost(
                name=f"layer{number}", taps=9, per_output=1, positions=16, input_blocks=reads, output_blocks=writes,
                fixed_inputs=0 if reads else 3, fixed_outputs=0 if writes else 10,
            )
        )  # fmt: skip
    return CostModel(layers=tuple(layers), untouched_parameters=7)


def random_losses(widths: list[int], seed: int) -> dict[str, np.ndarray]:
    """Falling curves of different steepness, not convex."""
    generator = np.random.default_rng(seed)
    losses = {}
    for number, width in enumerate(widths):
        drops = generator.exponential(size=width) * np.exp(-np.arange(width) * generator.uniform(0, 8) / width)
        losses[f"g{number}"] = np.concatenate([np.cumsum(drops[::-1])[::-1], [0.0]]) * generator.uniform(0.1, 1.0)
    return losses


def chain_problem(
    widths: list[int], seed: int, *, objective: Objective = "parameters", minimum: int = 1, round_to: int = 1
) -> AllocationProblem:
    losses = random_losses(widths, seed)
    return AllocationProblem(
        losses=losses,
        minimum=dict.fromkeys(losses, minimum),
        cost=chain_cost(widths),
        objective=objective,
        round_to=round_to,
    )


def share(problem: AllocationProblem, widths: Mapping[str, int]) -> float:
    dense = problem.cost.evaluate(problem.full(), problem.objective)
    return problem.cost.evaluate(widths, problem.objective) / dense


WIDTHS = st.lists(st.integers(2, 24), min_size=1, max_size=4)


@given(WIDTHS, st.integers(0, 999), st.floats(0.01, 1.0), st.sampled_from(OBJECTIVES), st.sampled_from([1, 4, 8]))
def test_budget_is_met_and_widths_are_allowed(
    dense: list[int], seed: int, fraction: float, objective: Objective, round_to: int
) -> None:
    problem = chain_problem(dense, seed, objective=objective, minimum=2, round_to=round_to)
    if share(problem, problem.smallest()) > fraction:
        with pytest.raises(ConfigError, match=f"at most .* of the {objective} can be removed from this network"):
            allocate(problem, fraction)
        return
    widths = allocate(problem, fraction)
    assert list(widths) == list(problem.losses)
    assert share(problem, widths) <= fraction * (1 + 1e-12)
    for number, width in enumerate(widths.values()):
        assert 2 <= width <= dense[number]
        assert width % round_to == 0 or width == dense[number]


@settings(max_examples=8)
@given(WIDTHS, st.integers(0, 999), st.floats(0.1, 0.9))
def test_no_group_can_be_widened_for_what_is_left_of_the_budget(dense: list[int], seed: int, fraction: float) -> None:
    problem = chain_problem(dense, seed)
    if share(problem, problem.smallest()) > fraction:
        return
    widths = allocate(problem, fraction)
    for name, width in widths.items():
        for wider in range(width + 1, len(problem.losses[name])):
            candidate = {**widths, name: wider}
            assert share(problem, candidate) > fraction or problem.loss(candidate) >= problem.loss(widths) - 1e-12


@given(st.lists(st.integers(2, 7), min_size=1, max_size=3), st.integers(0, 999), st.floats(0.2, 0.9))
def test_choice_is_close_to_the_best_of_all(dense: list[int], seed: int, fraction: float) -> None:
    problem = chain_problem(dense, seed)
    if share(problem, problem.smallest()) > fraction:
        return
    combinations = itertools.product(*(problem.allowed(name) for name in problem.losses))
    candidates = [dict(zip(problem.losses, map(int, widths), strict=True)) for widths in combinations]
    best = min(problem.loss(widths) for widths in candidates if share(problem, widths) <= fraction)
    reached = problem.loss(allocate(problem, fraction))
    assert best - 1e-12 <= reached <= 1.5 * best + 0.05 * problem.loss(problem.smallest())


@settings(max_examples=10)
@given(st.lists(st.integers(16, 32), min_size=3, max_size=4), st.integers(0, 999), st.integers(2, 7))
def test_choice_is_better_than_uniform_widths_of_the_same_size(dense: list[int], seed: int, eighths: int) -> None:
    problem = chain_problem(dense, seed)
    uniform = {f"g{number}": max(1, width * eighths // 8) for number, width in enumerate(dense)}
    widths = allocate(problem, share(problem, uniform))
    assert problem.loss(widths) < problem.loss(uniform)


def test_group_without_influence_is_cut_first() -> None:
    problem = chain_problem([20, 20, 20], 0)
    losses = {**problem.losses, "g1": np.zeros(21)}
    problem = AllocationProblem(losses=losses, minimum=problem.minimum, cost=problem.cost)
    assert allocate(problem, 0.9)["g1"] == 1
    assert allocate(problem, 0.9)["g0"] == 20


def test_whole_budget_keeps_every_channel_that_matters() -> None:
    problem = chain_problem([5, 9, 7], 1)
    assert allocate(problem, 1.0) == problem.full()


def test_smaller_budgets_never_predict_less_loss() -> None:
    problem = chain_problem([24, 24, 24], 3)
    losses = [problem.loss(allocate(problem, float(fraction))) for fraction in np.linspace(0.05, 1.0, 10)]
    assert max(np.diff(losses)) <= 0.02 * losses[0]


def test_least_widths_beyond_the_dense_ones_keep_the_group_whole() -> None:
    problem = chain_problem([3, 20], 0, minimum=8)
    assert problem.allowed("g0").tolist() == [3]
    assert allocate(problem, 0.8)["g0"] == 3


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01])
def test_fraction_out_of_range_is_explained(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"expected a kept fraction in \(0, 1\], got"):
        allocate(chain_problem([4], 0), fraction)


def early_and_late(seed: int) -> AllocationProblem:
    """Three groups: the first costs MACs, the last parameters."""
    generator = np.random.default_rng(seed)

    def layer(name: str, positions: int, inputs: str | None, outputs: str | None, ends: int) -> LayerCost:
        return LayerCost(
            name=name, taps=9, per_output=1, positions=positions,
            fixed_inputs=0 if inputs else ends, fixed_outputs=0 if outputs else ends,
            input_blocks={inputs: 1} if inputs else {}, output_blocks={outputs: 1} if outputs else {},
        )  # fmt: skip

    layers = (layer("a", 64, None, "x", 3), layer("b", 16, "x", "y", 0), layer("c", 4, "y", "z", 0))
    cost = CostModel(layers=(*layers, layer("d", 1, "z", None, 40)), untouched_parameters=0)
    widths = {"x": 8, "y": 9, "z": 12}
    losses = {n: np.sort(generator.uniform(0, 1, c + 1))[::-1] * (np.arange(c + 1) < c) for n, c in widths.items()}
    return AllocationProblem(losses=losses, minimum=dict.fromkeys(widths, 1), cost=cost)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limits", [(0.5, 0.5), (0.3, 0.9), (0.9, 0.3), (0.4, 0.25)])
def test_two_limits_hold_together_at_a_loss_near_the_least(seed: int, limits: tuple[float, float]) -> None:
    problem = early_and_late(seed)
    wanted: dict[Objective, float] = {"parameters": limits[0], "macs": limits[1]}
    dense = {name: problem.cost.evaluate(problem.full(), name) for name in OBJECTIVES}

    def is_kept(widths: Mapping[str, int]) -> bool:
        return all(problem.cost.evaluate(widths, name) <= wanted[name] * dense[name] + 1e-6 for name in OBJECTIVES)

    found = allocate_within(problem, wanted)
    assert is_kept(found)
    every = itertools.product(*(range(1, len(loss)) for loss in problem.losses.values()))
    losses = [problem.loss(w) for w in (dict(zip("xyz", entry, strict=True)) for entry in every) if is_kept(w)]
    assert problem.loss(found) <= 1.3 * min(losses)


def test_no_limit_keeps_everything_and_an_unreachable_one_is_explained() -> None:
    problem = early_and_late(0)
    assert allocate_within(problem, {}) == problem.full()
    with pytest.raises(ConfigError, match="of the macs can be removed"):
        allocate_within(problem, {"parameters": 0.5, "macs": 0.001})
