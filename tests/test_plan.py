"""The pruning plan: it survives JSON, refuses nonsense, and selects the same channels on both sides of a group."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from entprune.errors import ConfigError
from entprune.groups import ChannelGroups, find_groups
from entprune.plan import (
    GroupPlan,
    PruningPlan,
    consumer_features,
    full_plan,
    group_consumers,
    select_layers,
)
from tests.micro_networks import IMAGE_SHAPE, Bottleneck, Chain, Concat, Residual


@st.composite
def group_plans(draw: st.DrawFn, name: str) -> GroupPlan:
    num_channels = draw(st.integers(1, 40))
    kept = draw(st.sets(st.integers(0, num_channels - 1), min_size=1))
    return GroupPlan(name=name, num_channels=num_channels, kept_channels=tuple(sorted(kept)))


PLANS = st.lists(st.text(min_size=1), unique=True, max_size=4).flatmap(
    lambda names: st.tuples(*(group_plans(name) for name in names)).map(lambda groups: PruningPlan(groups=groups))
)


@functools.cache
def analysed(build: type[nn.Module]) -> tuple[nn.Module, ChannelGroups]:
    model = build().eval()
    return model, find_groups(model, torch.zeros(2, *IMAGE_SHAPE))


def random_plan(groups: ChannelGroups, seed: int) -> PruningPlan:
    generator = np.random.default_rng(seed)
    entries = []
    for group in groups.groups:
        kept = generator.permutation(group.num_channels)[: generator.integers(1, group.num_channels + 1)]
        entries.append(
            GroupPlan(
                name=group.name, num_channels=group.num_channels, kept_channels=tuple(sorted(int(k) for k in kept))
            )
        )
    return PruningPlan(groups=tuple(entries))


@given(PLANS)
def test_plan_survives_json(plan: PruningPlan) -> None:
    again = PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.digest() == plan.digest()


@given(PLANS, PLANS)
def test_digests_agree_exactly_if_plans_do(first: PruningPlan, second: PruningPlan) -> None:
    assert (first.digest() == second.digest()) == (first == second)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((), "expected at least one kept channel, got none"),
        ((0, 4), r"lie in \[0, 4\), got 0..4"),
        ((-1, 2), r"lie in \[0, 4\), got -1..2"),
        ((2, 1), "must be sorted, unique"),
        ((1, 1), "must be sorted, unique"),
    ],
)
def test_impossible_kept_channels_are_explained(kept: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"group 'conv1': .*{message}.*rebuild the plan"):
        GroupPlan(name="conv1", num_channels=4, kept_channels=kept)


@pytest.mark.parametrize("version", [None, 0, 3, "1"])
def test_unknown_version_is_explained(version: Any) -> None:
    with pytest.raises(ConfigError, match="expected plan_version 1 or 2, got"):
        PruningPlan.from_dict({"plan_version": version, "groups": []})


def test_plan_of_another_network_is_explained() -> None:
    plan = PruningPlan(groups=(GroupPlan(name="other", num_channels=4, kept_channels=(0,)),))
    with pytest.raises(ConfigError, match="the plan has no group 'conv1'; it was made for another network"):
        select_layers(*analysed(Chain), plan)


def test_full_plan_selects_everything() -> None:
    for build in (Chain, Residual, Bottleneck, Concat):
        model, groups = analysed(build)
        assert full_plan(groups).widths() == {group.name: group.num_channels for group in groups.groups}
        for layer, selection in select_layers(model, groups, full_plan(groups)).items():
            weight = model.get_submodule(layer).weight
            assert isinstance(weight, torch.Tensor)
            if selection.outputs is not None:
                assert selection.outputs.tolist() == list(range(weight.shape[0]))
            if selection.inputs is not None:
                assert selection.inputs.tolist() == list(range(weight.shape[1]))


@given(st.integers(0, 999))
def test_producers_followers_and_consumers_keep_the_same_channels(seed: int) -> None:
    for build in (Chain, Residual, Bottleneck):
        model, groups = analysed(build)
        plan = random_plan(groups, seed)
        selection = select_layers(model, groups, plan)
        for group in groups.groups:
            kept = plan.kept(group.name)
            assert plan.widths()[group.name] == len(kept)
            for piece in (*group.producers, *group.followers):
                np.testing.assert_array_equal(selection[piece.layer].outputs, kept)
            for piece in group.consumers:
                np.testing.assert_array_equal(selection[piece.layer].inputs, piece.index[kept].ravel())


def test_reader_of_a_concatenation_keeps_what_both_branches_keep() -> None:
    model, groups = analysed(Concat)
    kept = {"left": (0, 2), "right": (1, 4), "join": (3,)}
    plan = PruningPlan(
        groups=tuple(
            GroupPlan(name=g.name, num_channels=g.num_channels, kept_channels=kept[g.name]) for g in groups.groups
        )
    )
    selection = select_layers(model, groups, plan)
    assert selection["join"].inputs is not None
    assert selection["bn"].outputs is not None
    assert selection["join"].inputs.tolist() == [0, 2, 4, 7]
    assert selection["bn"].outputs.tolist() == [0, 2, 4, 7]


def test_features_of_a_convolution_are_its_taps_channel_by_channel() -> None:
    model, groups = analysed(Chain)
    layer = model.get_submodule("conv2")
    features = consumer_features(layer, groups.named("conv1").consumers[0])
    marked = torch.zeros(5, 6, 3, 3)
    marked[:, 2] = 1.0
    assert features.shape == (6, 9)
    assert features[2].tolist() == marked.flatten(1)[0].nonzero().ravel().tolist()


def test_features_of_a_linear_layer_are_the_flattened_positions() -> None:
    group = analysed(Chain)[1].named("conv2")
    assert group_consumers(group) == ("fc1",)
    assert consumer_features(Chain().fc1, group.consumers[0]).tolist() == np.arange(20).reshape(5, 4).tolist()
