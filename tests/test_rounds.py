"""Rounds: steps lead to the budget, plans compose, and the smallest tuned network within the budget is the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from entprune.assembly import slice_network
from entprune.certificate import certify
from entprune.config import Budget, PruneConfig
from entprune.errors import ConfigError
from entprune.groups import ChannelGroups
from entprune.models import build_model
from entprune.plan import GroupPlan, PruningPlan, compose_plans, full_plan
from entprune.planning import least_widths
from entprune.rounds import (
    RoundRecord,
    check_reachable,
    choose_round,
    is_exhausted,
    judge_round,
    round_budget,
    round_start,
)
from entprune.selection import DenseReference
from entprune.stages import analyse
from tests.micro_networks import IMAGE_SHAPE, Bottleneck, Chain, Concat, Residual

PLAN = PruningPlan(groups=(GroupPlan(name="a", num_channels=6, kept_channels=(1, 3, 4)),))


def random_plan(groups: ChannelGroups, seed: int) -> PruningPlan:
    generator = np.random.default_rng(seed)
    entries = []
    for group in groups.groups:
        kept = np.sort(generator.permutation(group.num_channels)[: max(1, 2 * group.num_channels // 3)])
        entries.append(
            GroupPlan(name=group.name, num_channels=group.num_channels, kept_channels=tuple(int(k) for k in kept))
        )
    return PruningPlan(groups=tuple(entries))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (Chain, IMAGE_SHAPE),
        (Residual, IMAGE_SHAPE),
        (Bottleneck, IMAGE_SHAPE),
        (Concat, IMAGE_SHAPE),
        (lambda: build_model("lenet", num_classes=10, input_shape=(1, 28, 28)), (1, 28, 28)),
        (lambda: build_model("resnet20_cifar", num_classes=10, input_shape=(3, 32, 32)), (3, 32, 32)),
    ],
)
def test_two_cuts_equal_the_one_of_the_composed_plan(
    build: Callable[[], nn.Module], shape: tuple[int, int, int]
) -> None:
    dense = analyse(build(), shape, PruneConfig())
    first = random_plan(dense.groups, 0)
    middle = analyse(slice_network(dense.model, dense.groups, first), shape, PruneConfig())
    second = random_plan(middle.groups, 1)
    composed = compose_plans(first, second)
    twice = slice_network(middle.model, middle.groups, second).eval()
    once = slice_network(dense.model, dense.groups, composed).eval()
    images = torch.randn(2, *shape)
    with torch.inference_mode():
        assert torch.equal(twice(images), once(images))
    assert certify(dense.model, twice, dense.groups, composed, images).passed


def test_plans_of_different_networks_do_not_compose() -> None:
    assert compose_plans(PLAN, PruningPlan(groups=())) == PLAN
    with pytest.raises(ConfigError, match="expected a second plan for 3 channels, got one for 6"):
        compose_plans(PLAN, PLAN)
    with pytest.raises(ConfigError, match=r"groups \['b'\] that the first lacks"):
        compose_plans(PLAN, PruningPlan(groups=(GroupPlan(name="b", num_channels=2, kept_channels=(0,)),)))


def test_geometric_steps_lead_to_the_size_budget() -> None:
    budget, kept = Budget(parameters_removed=0.96, latency_removed=0.75, latency_batch=8), 1.0
    for number in (1, 2):
        asked = round_budget(budget, number, 2, {"parameters": kept, "macs": 1.0}, 0.5 ** (number - 1))
        assert asked.parameters_removed is not None
        kept *= 1.0 - asked.parameters_removed
        assert kept == pytest.approx(0.2**number)
        assert (asked.latency_removed, asked.latency_batch) == (pytest.approx(0.5), 8)
    ahead = round_budget(budget, 2, 2, {"parameters": 0.03, "macs": 1.0})  # more was removed than asked
    assert ahead.parameters_removed == 0.0
    behind = round_budget(budget, 2, 2, {"parameters": 1.0, "macs": 1.0}, 0.8)  # less latency was removed than asked
    assert (behind.parameters_removed, behind.latency_removed) == (pytest.approx(0.96), pytest.approx(1 - 0.25 / 0.8))


def test_round_starts_from_whole_layers_and_is_judged_with_its_ranks() -> None:
    network = analyse(build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8)), (1, 8, 8), PruneConfig())
    plan = replace(full_plan(network.groups), ranks=(("fc1", 3),))
    start, kept = round_start(network, plan)
    assert start == full_plan(network.groups)
    assert kept == {"parameters": 1.0, "macs": 1.0}
    judged = judge_round(
        1, plan, compared=None, network=network, budget=Budget(parameters_removed=0.1), config=PruneConfig(),
        latency_kept=None, networks_tried=1,
    )  # fmt: skip
    weight = network.model.get_parameter("fc1.weight")
    saved = weight.numel() - 3 * sum(weight.shape)
    assert judged.parameters == sum(value.numel() for value in network.model.parameters()) - saved
    assert judged.missed == ()
    assert judged.to_dict()["ranks"] == {"fc1": 3}


def test_later_rounds_may_lose_more_before_they_are_tuned() -> None:
    allowed = [
        round_budget(Budget(max_accuracy_drop=0.5), number, 3, {"parameters": 1.0, "macs": 1.0}).max_accuracy_drop
        for number in (1, 2, 3)
    ]
    assert allowed == [0.5, 1.5, 1.5]


def record(number: int, parameters: int, *missed: Any) -> RoundRecord:
    return RoundRecord(
        number=number, plan=PLAN, parameters=parameters, macs=parameters, accuracy=90.0, accuracy_drop=0.1,
        upper_bound=0.2, latency_kept=None, networks_tried=1, missed=missed,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("records", "chosen"),
    [
        ([record(1, 50), record(2, 20), record(3, 10, "max_accuracy_drop")], 1),
        ([record(1, 50, "parameters_removed"), record(2, 20)], 1),
        ([record(1, 50, "parameters_removed"), record(2, 20, "max_accuracy_drop")], 0),
        ([record(1, 50, "max_accuracy_drop")], 0),
        ([record(1, 50), record(2, 50)], 1),
    ],
)
def test_result_is_the_smallest_tuned_network_within_the_budget(records: list[RoundRecord], chosen: int) -> None:
    assert choose_round(records, "parameters") == chosen


@pytest.mark.parametrize(
    ("budget", "wrong", "latency_kept", "missed"),
    [
        (Budget(max_accuracy_drop=2.0), 0, None, ()),
        (Budget(max_accuracy_drop=2.0), 8, None, ("max_accuracy_drop",)),
        (Budget(parameters_removed=0.1), 50, None, ()),
        (Budget(parameters_removed=0.999), 0, None, ("parameters_removed",)),
        (Budget(latency_removed=0.5), 0, 0.51, ()),
        (Budget(latency_removed=0.5), 0, 0.6, ("latency_removed",)),
    ],
)
def test_round_is_judged_after_tuning_against_the_whole_budget(
    budget: Budget, wrong: int, latency_kept: float | None, missed: tuple[str, ...]
) -> None:
    network = analyse(Chain(), IMAGE_SHAPE, PruneConfig())
    certain = np.tile(np.array([1.0, 0.0], dtype=np.float32), (200, 1))
    reference = DenseReference(labels=np.zeros(200, np.int64), probabilities=certain, estimate="labels")
    logits = certain.copy()
    logits[:wrong] = [0.0, 1.0]
    logits[199] = [np.nan, 0.0] if wrong else logits[199]
    judged = judge_round(
        1, random_plan(network.groups, 0), compared=(logits, reference), network=network, budget=budget,
        config=PruneConfig(), latency_kept=latency_kept, networks_tried=1,
    )  # fmt: skip
    assert judged.missed == missed
    assert judged.accuracy_drop == pytest.approx((wrong + (wrong > 0)) / 2)
    assert judged.parameters == network.cost.parameters(judged.plan.widths())


@pytest.mark.parametrize(
    ("budget", "missed"),
    [
        (Budget(parameters_removed=0.1), ()),
        (Budget(parameters_removed=0.999), ("parameters_removed",)),
        (Budget(max_accuracy_drop=99.0), ("max_accuracy_drop",)),  # what nobody looked at is not met
    ],
)
def test_round_that_learnt_from_the_validation_images_has_no_accuracy_there(
    budget: Budget, missed: tuple[str, ...]
) -> None:
    network = analyse(Chain(), IMAGE_SHAPE, PruneConfig())
    judged = judge_round(
        1, random_plan(network.groups, 0), compared=None, network=network, budget=budget, config=PruneConfig(),
        latency_kept=None, networks_tried=1,
    )  # fmt: skip
    assert (judged.accuracy, judged.accuracy_drop, judged.upper_bound) == (None, None, None)
    assert judged.missed == missed
    assert judged.to_dict()["validation_accuracy"] is None


def test_unreachable_size_is_refused_before_the_first_round() -> None:
    network = analyse(Chain(), IMAGE_SHAPE, PruneConfig())
    check_reachable(network, Budget(parameters_removed=0.1), PruneConfig())
    with pytest.raises(ConfigError, match=r"of the macs can be removed from this network, 99\.900% was asked"):
        check_reachable(network, Budget(macs_removed=0.999), PruneConfig(minimum_fraction=0.5))


def test_floors_refer_to_the_dense_network() -> None:
    config = PruneConfig(minimum_channels=2, minimum_fraction=0.5)
    assert least_widths({"a": 8}, config) == {"a": 4}
    assert least_widths({"a": 6}, config, {"a": 8}) == {"a": 4}
    assert least_widths({"a": 3}, config, {"a": 8}) == {"a": 3}
    network = analyse(Chain(), IMAGE_SHAPE, config)
    assert is_exhausted(network, full_plan(network.groups), PruneConfig(minimum_fraction=1.0))
    assert not is_exhausted(network, full_plan(network.groups), config)
