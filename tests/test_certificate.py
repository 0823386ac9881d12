"""The certificate passes what is right, and refuses each kind of wrong network that still runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from entprune.assembly import slice_network
from entprune.certificate import Certificate, certify, masked_network
from entprune.groups import ChannelGroup, ChannelGroups, LayerSlice, find_groups
from entprune.plan import GroupPlan, PruningPlan, full_plan
from tests.micro_networks import IMAGE_SHAPE, Bottleneck, Chain, Concat, Depthwise, Residual, random_split, warm_up

ALL = [Chain, Residual, Bottleneck, Concat, Depthwise]


@functools.cache
def groups_of(build: Callable[[], nn.Module]) -> ChannelGroups:
    return find_groups(build(), torch.zeros(2, *IMAGE_SHAPE))


def analysed(build: Callable[[], nn.Module], seed: int = 0) -> tuple[nn.Module, ChannelGroups]:
    torch.manual_seed(seed)
    return warm_up(build()), groups_of(build)


def half_plan(groups: ChannelGroups, seed: int = 0) -> PruningPlan:
    generator = np.random.default_rng(seed)
    return PruningPlan(
        groups=tuple(
            GroupPlan(
                name=g.name, num_channels=g.num_channels,
                kept_channels=tuple(sorted(generator.permutation(g.num_channels)[: -(-g.num_channels // 2)].tolist())),
            )
            for g in groups.groups
        )
    )  # fmt: skip


def images() -> Tensor:
    return random_split(8).batch(np.arange(8))


def shaken(model: nn.Module) -> nn.Module:
    """Other weights everywhere, as after a refit."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.mul_(torch.rand_like(value) + 0.5)
    return model


def judged(model: nn.Module, smaller: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> Certificate:
    return certify(model, smaller, groups, plan, images())


@settings(max_examples=10)
@given(st.integers(0, 999))
@pytest.mark.parametrize("build", ALL)
def test_right_networks_pass_whatever_their_weights(build: Callable[[], nn.Module], seed: int) -> None:
    model, groups = analysed(build, seed)
    plan = half_plan(groups, seed)
    smaller = shaken(slice_network(model, groups, plan))
    certificate = judged(model, smaller, groups, plan)
    assert certificate.passed
    assert certificate.max_abs_difference < 1e-10  # compared in float64
    assert certificate.num_images == 16


def test_unpruned_network_passes() -> None:
    model, groups = analysed(Residual)
    assert judged(model, slice_network(model, groups, full_plan(groups)), groups, full_plan(groups)).passed


def test_arguments_are_left_as_they_were() -> None:
    model, groups = analysed(Residual)
    plan = half_plan(groups)
    smaller = slice_network(model, groups, plan).train()
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(smaller.state_dict())
    batch = images()
    certify(model, smaller, groups, plan, batch)
    for network, state in zip((model, smaller), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert torch.equal(batch, images())
    assert smaller.training
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- wrong couplings -------------------------------------------------------------------------------------------------


def with_consumer(groups: ChannelGroups, name: str, change: Callable[[np.ndarray], np.ndarray]) -> ChannelGroups:
    """Groups in which one consumer of a group reads its channels elsewhere."""

    def changed(group: ChannelGroup) -> ChannelGroup:
        if group.name != name:
            return group
        first, *others = group.consumers
        wrong = LayerSlice(layer=first.layer, index=change(first.index))
        return replace(group, consumers=(wrong, *others))

    return replace(groups, groups=tuple(changed(group) for group in groups.groups))


@pytest.mark.parametrize(
    ("build", "name"),
    [(Chain, "conv1"), (Chain, "conv2"), (Residual, "stem"), (Residual, "conv1"), (Bottleneck, "conv3")],
)
def test_permuted_channels_of_one_consumer_fail(build: Callable[[], nn.Module], name: str) -> None:
    model, groups = analysed(build)
    plan = half_plan(groups)
    kept = plan.kept(name)
    assert not np.array_equal(
        kept, np.sort(groups.named(name).num_channels - 1 - kept)
    )  # the permutation moves the kept set
    wrong = with_consumer(groups, name, lambda index: index[::-1])
    smaller = slice_network(model, wrong, plan)
    assert torch.isfinite(smaller(images())).all()  # it runs without complaint
    certificate = judged(model, smaller, wrong, plan)
    assert not certificate.passed
    assert certificate.max_abs_difference > 1e-3


def test_flattened_positions_in_the_wrong_order_fail() -> None:
    model, groups = analysed(Chain)
    wrong = with_consumer(groups, "conv2", lambda index: np.arange(20).reshape(4, 5).T)  # position-major
    plan = half_plan(groups)
    assert not judged(model, slice_network(model, wrong, plan), wrong, plan).passed


def test_wrong_offset_in_a_concatenation_fails() -> None:
    model, groups = analysed(Concat)
    wrong = with_consumer(groups, "right", lambda index: index - 3)
    wrong = with_consumer(wrong, "left", lambda index: index + 5)
    plan = half_plan(groups)
    assert not judged(model, slice_network(model, wrong, plan), wrong, plan).passed


def test_forgotten_producer_of_a_stream_fails() -> None:
    model, groups = analysed(Bottleneck)
    stream = groups.named("conv3")
    kept = (0, 2, 5)
    others = tuple(entry for entry in full_plan(groups).groups if entry.name != "conv3")
    plan = PruningPlan(groups=(*others, GroupPlan(name="conv3", num_channels=8, kept_channels=kept)))
    # The projection keeps other channels than the last convolution: the sum adds strangers.
    shifted = tuple(
        LayerSlice(layer=p.layer, index=np.roll(p.index, 1, axis=0)) if p.layer == "downsample.0" else p
        for p in stream.producers
    )
    wrong = replace(
        groups, groups=tuple(replace(g, producers=shifted) if g.name == "conv3" else g for g in groups.groups)
    )
    assert not judged(model, slice_network(model, wrong, plan), wrong, plan).passed


# --- wrong networks --------------------------------------------------------------------------------------------------


def replaced(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    model.set_submodule(name, module)
    return model


def scaled_epsilon(model: nn.Module) -> nn.Module:
    model.get_submodule("bn1").eps = 0.1
    return model


WRONG: dict[str, Callable[[nn.Module], nn.Module]] = {
    "another activation": lambda model: replaced(model, "relu1", nn.GELU()),
    "another epsilon": scaled_epsilon,
    "a layer left out": lambda model: replaced(model, "bn1", nn.Identity()),
}


@pytest.mark.parametrize("name", WRONG)
def test_network_of_another_structure_fails(name: str) -> None:
    model, groups = analysed(Chain)
    plan = half_plan(groups)
    smaller = WRONG[name](slice_network(model, groups, plan))
    assert not judged(model, smaller, groups, plan).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", ["conv1", "fc2"])
def test_weights_that_are_not_finite_fail(value: float, layer: str) -> None:
    model, groups = analysed(Chain)
    plan = half_plan(groups)
    smaller = slice_network(model, groups, plan)
    smaller.get_parameter(f"{layer}.weight").data.flatten()[0] = value
    certificate = judged(model, smaller, groups, plan)
    assert not certificate.passed
    assert certificate.to_dict()["passed"] is False


def test_weight_that_differs_from_the_masked_network_is_seen() -> None:
    model, groups = analysed(Chain)
    plan = half_plan(groups)
    smaller = slice_network(model, groups, plan)
    masked = masked_network(model, smaller, groups, plan)
    with torch.inference_mode():
        torch.testing.assert_close(smaller(images()), masked(images()), atol=1e-5, rtol=0)
        smaller.get_parameter("fc2.weight")[0] += 0.5
        assert float((smaller(images()) - masked(images())).abs().max()) > 1e-3


def test_difference_is_relative_to_the_outputs() -> None:
    model, groups = analysed(Chain)
    plan = half_plan(groups)
    for factor in (1e-6, 1e6):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in scaled.get_submodule("fc2").parameters():
                parameter.mul_(factor)
        smaller = scaled_epsilon(slice_network(scaled, groups, plan))
        assert not judged(scaled, smaller, groups, plan).passed
        assert judged(scaled, slice_network(scaled, groups, plan), groups, plan).passed


def test_tolerance_decides() -> None:
    model, groups = analysed(Chain)
    plan = half_plan(groups)
    smaller = scaled_epsilon(slice_network(model, groups, plan))
    difference = judged(model, smaller, groups, plan).max_abs_difference
    for tolerance, passed in ((2 * difference, True), (0.5 * difference, False)):
        certificate = certify(model, smaller, groups, plan, images(), tolerance=tolerance)
        assert certificate == Certificate(
            max_abs_difference=difference, tolerance=tolerance, num_images=16, passed=passed
        )


def test_masked_network_keeps_every_width_and_silences_removed_channels() -> None:
    model, groups = analysed(Chain)
    plan = half_plan(groups)
    masked = masked_network(model, slice_network(model, groups, plan), groups, plan)
    assert {n: p.shape for n, p in masked.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    gone = np.setdiff1d(np.arange(6), plan.kept("conv1"))
    with torch.inference_mode():
        before = masked(images()).clone()
        masked.get_parameter("conv1.weight")[torch.from_numpy(gone)] += 7.0
        torch.testing.assert_close(masked(images()), before)
