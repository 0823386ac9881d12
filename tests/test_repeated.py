"""Layers that run twice or share a weight: re-estimated from the moments of all their inputs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entprune.assembly import RefitConfig, RefitData, assemble, slice_network
from entprune.candidates import answers_only
from entprune.config import PruneConfig
from entprune.plan import GroupPlan, PruningPlan
from entprune.pruning import as_split, whole_split
from entprune.runner import InProcessRunner
from entprune.stages import Network, analyse, calibrate, sampling_plan
from tests.trap_networks import TRAPS

SHAPE = (2, 6, 6)
CONFIG = PruneConfig(min_rows=4000, calibration_shards=2, relative_ridge=1e-7)


def with_a_twin(name: str) -> nn.Module:
    """A network whose channels 2 and 3 are equal everywhere in the stream that the repeated layer reads and writes."""
    model: Any = TRAPS[name].build().eval()
    layers = [model.again] if name == "module called twice" else [model.one, model.two]
    with torch.no_grad():
        for layer in (model.first, *layers):
            layer.weight[3] = layer.weight[2]
            layer.bias.uniform_(-0.5, 0.5)
            layer.bias[3] = layer.bias[2]
    return model


def prepared(model: nn.Module) -> tuple[Network, RefitData, Tensor]:
    images = torch.randn(96, *SHAPE, generator=torch.Generator().manual_seed(3))
    network = analyse(model, SHAPE, CONFIG)
    chosen = whole_split(as_split(images), None)
    statistics = calibrate(network, chosen, CONFIG, InProcessRunner())
    data = RefitData(
        split=chosen.split, indices=chosen.indices, statistics=answers_only(statistics, network),
        sampling=sampling_plan(CONFIG, len(chosen)),
    )  # fmt: skip
    return network, data, images


def without_channel_3(network: Network) -> PruningPlan:
    (group,) = network.groups.groups
    return PruningPlan(groups=(GroupPlan(name=group.name, num_channels=4, kept_channels=(0, 1, 2)),))


@pytest.mark.parametrize("name", ["module called twice", "tied weights"])
def test_what_a_removed_twin_said_is_taken_over_by_the_other(name: str) -> None:
    model = with_a_twin(name)
    network, data, images = prepared(model)
    plan = without_channel_3(network)
    refit = assemble(network.model, network.groups, plan, data=data, config=RefitConfig(relative_ridge=1e-7))
    plain = slice_network(network.model, network.groups, plan)
    with torch.inference_mode():
        dense = model(images)
        assert torch.allclose(refit(images), dense, atol=2e-4)
        assert (plain(images) - dense).abs().max() > 0.005


def test_moments_of_both_calls_are_summed() -> None:
    network, data, images = prepared(with_a_twin("module called twice"))
    moments = data.statistics["again"].moments
    assert moments is not None
    assert moments.count == 2 * 96 * 36
    model: Any = network.model
    with torch.inference_mode():
        once = torch.relu(model.first(images))
        inputs = torch.cat([once, torch.relu(model.again(once))])
    rows = inputs.permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
    np.testing.assert_allclose(moments.covariance(), np.cov(rows.T, bias=True), rtol=1e-4, atol=1e-6)


def test_tied_weights_stay_tied_and_the_given_network_as_it_was() -> None:
    model = with_a_twin("tied weights")
    before = copy.deepcopy(model.state_dict())
    network, data, _ = prepared(model)
    smaller: Any = assemble(
        network.model, network.groups, without_channel_3(network), data=data, config=RefitConfig(relative_ridge=1e-7)
    )
    assert smaller.one.weight is smaller.two.weight
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(value, before[key]) for key, value in network.model.state_dict().items())
