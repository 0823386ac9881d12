"""The benchmark: the other methods choose what their definitions say, and uniform widths spend the budget."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entprune.allocation import AllocationProblem, CostModel, LayerCost, build_cost_model
from entprune.errors import ConfigError
from entprune.groups import ChannelGroups, find_groups
from entprune.models import build_model
from entprune.regression import ConsumerProblem, GroupProblem, build_problem
from entprune.stages import ImageSet
from tests.regression_problems import random_problem, refit_error

pytest.importorskip("torch_pruning", reason="the benchmark's peers are development dependencies")
pytest.importorskip("sklearn", reason="the benchmark's peers are development dependencies")

from infra.benchmark.block_obs import elimination_order
from infra.benchmark.importances import fpgm_order, l1_order, taylor_order
from infra.benchmark.lasso import LassoPath, contribution_matrix
from infra.benchmark.networks import NETWORKS
from infra.benchmark.records import Record, Subject, all_records
from infra.benchmark.selectors import Ranking, select_plan, uniform_widths
from infra.benchmark.swaps import swap
from tests.micro_networks import random_split


class TwoLayers(nn.Module):
    """Six channels between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 1, bias=False)
        self.conv2 = nn.Conv2d(6, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu(self.conv1(x))).mean((2, 3))


def analysed(model: nn.Module) -> ChannelGroups:
    return find_groups(model, torch.zeros(2, 2, 6, 6))


def with_filters(filters: list[tuple[float, float]]) -> TwoLayers:
    """Given filters in the first layer, readers of equal size in the second."""
    model = TwoLayers().eval()
    with torch.no_grad():
        model.conv1.weight.copy_(torch.tensor(filters).reshape(6, 2, 1, 1))
        model.conv2.weight.fill_(0.5)
    return model


def test_l1_keeps_the_largest_filters() -> None:
    model = with_filters([(1, 1), (5, -5), (0.1, 0), (-4, 3), (0, 0.5), (2, -2)])
    order = l1_order(model, analysed(model))["conv1"]
    assert order.tolist() == [1, 3, 5, 0, 4, 2]


def test_fpgm_drops_a_filter_that_others_can_stand_in_for() -> None:
    model = with_filters([(3, 0), (0, 3), (1, 1), (1, 1), (-3, 1), (2, -3)])
    order = fpgm_order(model, analysed(model))["conv1"]
    assert set(order[-2:].tolist()) == {2, 3}


def test_taylor_keeps_the_channels_that_the_loss_depends_on() -> None:
    torch.manual_seed(1)
    model = TwoLayers().eval()
    with torch.no_grad():
        model.conv1.weight.abs_()
        model.conv2.weight[:, [0, 4]] *= 1e-4
    images = ImageSet(split=random_split(32), indices=np.arange(32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    order = taylor_order(model, analysed(model), images)["conv1"]
    assert set(order[-2:].tolist()) == {0, 4}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def greedy_by_refitting(problem: GroupProblem) -> list[int]:
    """The same elimination, each step by solving every least-squares problem anew."""
    alive, removed = list(range(problem.num_channels)), []
    while len(alive) > 1:
        worst = min(alive, key=lambda channel: refit_error(problem, [c for c in alive if c != channel]))
        alive.remove(worst)
        removed.append(worst)
    return alive + removed[::-1]


@pytest.mark.parametrize("blocks", [(1,), (4,), (2, 3)])
def test_block_obs_equals_refitting_every_choice(blocks: tuple[int, ...]) -> None:
    problem = random_problem(9, blocks, seed=sum(blocks))
    assert elimination_order(problem).tolist() == greedy_by_refitting(problem)


def with_duplicate(problem: GroupProblem, first: int, second: int) -> GroupProblem:
    """The second channel reads what the first one reads."""
    consumers = []
    for consumer in problem.consumers:
        index = np.arange(problem.num_channels * consumer.block)
        start, source = second * consumer.block, first * consumer.block
        index[start : start + consumer.block] = np.arange(source, source + consumer.block)
        gram = consumer.gram[np.ix_(index, index)]
        consumers.append(ConsumerProblem(layer=consumer.layer, gram=gram, weight=consumer.weight, block=consumer.block))
    return GroupProblem(name=problem.name, num_channels=problem.num_channels, consumers=tuple(consumers))


def test_block_obs_drops_one_of_two_equal_channels_first() -> None:
    problem = with_duplicate(random_problem(7, (2,), seed=3), first=1, second=5)
    assert int(elimination_order(problem)[-1]) in {1, 5}


@pytest.mark.parametrize("blocks", [(1,), (4,), (2, 3)])
def test_swaps_end_where_no_exchange_helps(blocks: tuple[int, ...]) -> None:
    problem = random_problem(8, blocks, seed=3)
    start = (0, 1, 2)
    kept, count = swap(problem, start)
    assert len(kept) == 3
    assert (count > 0) == (kept != start)
    assert refit_error(problem, list(kept)) <= refit_error(problem, list(start)) + 1e-6
    others = [channel for channel in range(8) if channel not in kept]
    exchanged = [[channel for channel in kept if channel != gone] + [other] for gone in kept for other in others]
    assert min(refit_error(problem, other) for other in exchanged) >= refit_error(problem, list(kept)) - 1e-6
    assert swap(problem, kept) == (kept, 0)


def test_a_swap_finds_the_channel_that_stands_for_two() -> None:
    rows = np.random.default_rng(0).normal(size=(4000, 2)) @ np.array([[1.0, 0.0, 0.7], [0.0, 1.0, 0.7]])
    rows[:, 2] += 0.01 * np.random.default_rng(1).normal(size=4000)
    problem = build_problem("g", 3, {"a": (np.cov(rows.T), np.array([[1.0, 1.0, 0.1]]), np.arange(3)[:, None])})
    kept, count = swap(problem, (0,))
    assert (kept, count) == ((2,), 1)


def test_lasso_reads_the_contributions_of_all_consumers() -> None:
    problem = random_problem(5, (2, 3), seed=4)
    matrix = contribution_matrix(problem)
    kept = [1, 3]
    beta = np.isin(np.arange(5), kept).astype(float)
    expected = 0.0
    for consumer in problem.consumers:
        lost = consumer.weight * np.repeat(1 - beta, consumer.block)
        expected += np.trace(lost @ consumer.gram @ lost.T)
    assert (1 - beta) @ matrix @ (1 - beta) == pytest.approx(expected)


def test_lasso_keeps_as_many_as_wanted_and_the_large_contributions() -> None:
    path = LassoPath(np.diag([4.0, 0.1, 9.0, 0.5, 2.0, 0.0]))
    assert [path.kept(width) for width in range(1, 7)] == [
        (2,), (0, 2), (0, 2, 4), (0, 2, 3, 4), (0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5),
    ]  # fmt: skip


def test_lasso_fills_up_where_equal_channels_enter_together() -> None:
    path = LassoPath(np.eye(6))
    assert [len(path.kept(width)) for width in range(1, 7)] == [1, 2, 3, 4, 5, 6]


def chain_problem(widths: dict[str, int]) -> AllocationProblem:
    names = list(widths)
    layers = [
        LayerCost(
            name=f"layer{number}", taps=9, per_output=1, positions=16,
            fixed_inputs=0 if before else 3, fixed_outputs=0 if after else 10,
            input_blocks={before: 1} if before else {}, output_blocks={after: 1} if after else {},
        )
        for number, (before, after) in enumerate(itertools.pairwise([None, *names, None]))
    ]  # fmt: skip
    losses = {name: np.linspace(1.0, 0.0, count + 1) for name, count in widths.items()}
    cost = CostModel(layers=tuple(layers), untouched_parameters=0)
    return AllocationProblem(losses=losses, minimum=dict.fromkeys(widths, 1), cost=cost)


@pytest.mark.parametrize("kept", [0.1, 0.33, 0.5, 0.9, 1.0])
def test_uniform_widths_are_the_largest_ratio_and_evenly_spent_change(kept: float) -> None:
    problem = chain_problem({"a": 20, "b": 50, "c": 16})
    full = problem.full()
    target = kept * problem.cost.parameters(full)
    widths = uniform_widths(problem, kept)
    assert problem.cost.parameters(widths) <= target
    trials = [{name: max(1, k * count // 4000) for name, count in full.items()} for k in range(4001)]  # 1/4000 steps
    ratio = max((trial for trial in trials if problem.cost.parameters(trial) <= target), key=problem.cost.parameters)
    expected = spend_by_trying_all(problem, ratio, target)
    assert widths == expected
    for name in full:
        wider = {**widths, name: widths[name] + 1}
        assert widths[name] == full[name] or problem.cost.parameters(wider) > target


def spend_by_trying_all(problem: AllocationProblem, widths: dict[str, int], target: float) -> dict[str, int]:
    """Widen by one channel the narrowest group of all that still fit, as long as one does."""
    full, names = problem.full(), list(widths)
    while True:
        trials = [{**widths, name: widths[name] + 1} for name in names if widths[name] < full[name]]
        fitting = [trial for trial in trials if problem.cost.parameters(trial) <= target]
        if not fitting:
            return widths
        grown = {next(name for name in names if trial[name] > widths[name]): trial for trial in fitting}
        widths = grown[min(grown, key=lambda name: (widths[name] / full[name], names.index(name)))]


@pytest.mark.parametrize("name", ["lenet", "resnet56_cifar"])
def test_uniform_widths_remove_what_was_asked_within_a_third_of_a_point(name: str) -> None:
    entry, shape = NETWORKS[name], (1, 28, 28) if name == "lenet" else (3, 32, 32)
    model = build_model(name, num_classes=10, input_shape=shape).eval()
    groups = find_groups(model, torch.zeros(2, *shape))
    losses = {group.name: np.linspace(1.0, 0.0, group.num_channels + 1) for group in groups.groups}
    cost = build_cost_model(model, groups, shape)
    for budget in entry.budgets():
        objective = "parameters" if budget.kind == "parameters_removed" else "macs"
        problem = AllocationProblem(losses=losses, minimum=dict.fromkeys(losses, 1), cost=cost, objective=objective)
        removed = 1.0 - problem.fraction(uniform_widths(problem, 1.0 - budget.value))
        assert budget.value <= removed + 1e-12
        assert removed == pytest.approx(budget.value, abs=0.003)


def test_uniform_widths_refuse_what_cannot_be_met() -> None:
    with pytest.raises(ConfigError, match="least widths"):
        uniform_widths(chain_problem({"a": 20, "b": 50}), 0.001)


def test_a_ranking_makes_nested_plans() -> None:
    kept = Ranking({"a": np.array([3, 0, 2, 1]), "b": np.array([1, 0])})
    plan = select_plan(kept, {"a": 4, "b": 2}, {"a": 2, "b": 1})
    assert [group.kept_channels for group in plan.groups] == [(0, 3), (1,)]


SUBJECT = Subject(part="selection", network="lenet", seed=3, budget="macs_removed-0.5")
RUN = {"command": "make benchmark", "code_commit": "abc", "environment": {"threads": 1}}


def test_records_keep_every_cell_once_and_know_what_is_measured(tmp_path: Path) -> None:
    path = SUBJECT.path(tmp_path)
    record = Record(path, SUBJECT)
    record.require_facts({"data_sha256": "d"})
    record.put({"method": "l1"}, {"accuracy": 98.123456789, "widths": [1, 2]}, RUN)
    record.put({"method": "ours"}, {"accuracy": 99.0}, RUN)
    again = Record(path, SUBJECT)
    assert again.content == record.content
    assert again.has({"method": "l1"})
    assert not again.has({"method": "taylor"})
    again.put({"method": "l1"}, {"accuracy": 1.5}, RUN | {"code_commit": "def"})
    (content,) = all_records("selection", tmp_path)
    assert [(cell["key"]["method"], cell["values"]["accuracy"], cell["run"]) for cell in content["cells"]] == [
        ("l1", 1.5, 1), ("ours", 99.0, 0),
    ]  # fmt: skip
    assert [run["code_commit"] for run in content["runs"]] == ["abc", "def"]


def test_records_refuse_other_inputs_and_other_subjects(tmp_path: Path) -> None:
    path = SUBJECT.path(tmp_path)
    record = Record(path, SUBJECT)
    record.require_facts({"data_sha256": "d"})
    record.put({"method": "l1"}, {"accuracy": 98.0}, RUN)
    with pytest.raises(ConfigError, match="other inputs"):
        Record(path, SUBJECT).require_facts({"data_sha256": "e"})
    with pytest.raises(ConfigError, match="move the file away"):
        Record(path, Subject(part="selection", network="lenet", seed=4, budget="macs_removed-0.5"))
    again = Record(path, SUBJECT)
    again.require_facts({"data_sha256": "d"}, renew=True)
    assert again.has({"method": "l1"})
    again.require_facts({"data_sha256": "e"}, renew=True)
    assert not again.has({"method": "l1"})
    assert again.content["facts"] == {"data_sha256": "e"}
    path.write_text(json.dumps({"record_version": 0}), encoding="utf-8")
    with pytest.raises(ConfigError, match="record_version"):
        Record(path, SUBJECT)
