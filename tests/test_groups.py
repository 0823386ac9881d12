"""Channel groups: the expected ones, true to what the network computes, and a reason wherever there is none."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entprune.certificate import confirm_groups
from entprune.errors import ModelError
from entprune.groups import ChannelGroup, ChannelGroups, find_groups
from entprune.layers import input_width, output_width
from entprune.models import build_model
from tests.micro_networks import IMAGE_SHAPE, Bottleneck, Chain, Concat, Depthwise, Residual, random_split, warm_up

Shape = tuple[int, int, int]


def groups_of(model: nn.Module, shape: Shape = IMAGE_SHAPE, **options: Any) -> ChannelGroups:
    return find_groups(model.eval(), torch.zeros(2, *shape), **options)


def builtin(name: str, shape: Shape) -> nn.Module:
    return build_model(name, num_classes=10, input_shape=shape).eval()


def roles(group: ChannelGroup) -> tuple[set[str], set[str], set[str]]:
    return tuple({piece.layer for piece in part} for part in (group.producers, group.followers, group.consumers))  # type: ignore[return-value]


def reasons(groups: ChannelGroups) -> dict[str, str]:
    return {entry.layer: entry.reason for entry in groups.unprunable}


# --- built-in networks -----------------------------------------------------------------------------------------------


def test_lenet() -> None:
    groups = groups_of(builtin("lenet", (1, 28, 28)), (1, 28, 28))
    assert [(group.name, group.num_channels) for group in groups.groups] == [("conv1", 20), ("conv2", 50), ("fc1", 500)]
    assert [roles(group) for group in groups.groups] == [
        ({"conv1"}, set(), {"conv2"}),
        ({"conv2"}, set(), {"fc1"}),
        ({"fc1"}, set(), {"fc2"}),
    ]
    np.testing.assert_array_equal(groups.named("conv2").consumers[0].index, np.arange(800).reshape(50, 16))
    assert reasons(groups) == {"fc2": "its outputs are the network's outputs"}


def test_vgg16() -> None:
    groups = groups_of(builtin("vgg16_cifar", (3, 32, 32)), (3, 32, 32))
    widths = [64, 64, 128, 128, *[256] * 3, *[512] * 6]
    assert [group.num_channels for group in groups.groups] == widths
    for group in groups.groups:
        position = int(group.name.removeprefix("features."))
        producers, followers, consumers = roles(group)
        assert (producers, followers, len(consumers)) == ({group.name}, {f"features.{position + 1}"}, 1)
    assert roles(groups.groups[-1])[2] == {"classifier"}
    assert set(reasons(groups)) == {"classifier"}


def test_resnet18_has_one_group_for_each_stream_and_one_for_each_block() -> None:
    groups = groups_of(builtin("resnet18_cifar", (3, 32, 32)), (3, 32, 32))
    blocks = [f"layer{stage}.{number}" for stage in (1, 2, 3, 4) for number in (0, 1)]
    inner = {f"{block}.conv1" for block in blocks}
    assert {group.name for group in groups.groups} == inner | {
        "conv1",
        "layer2.0.conv2",
        "layer3.0.conv2",
        "layer4.0.conv2",
    }
    for block in blocks:
        group = groups.named(f"{block}.conv1")
        assert roles(group) == ({f"{block}.conv1"}, {f"{block}.bn1"}, {f"{block}.conv2"})
    stream = groups.named("conv1")
    assert stream.num_channels == 64
    assert roles(stream) == (
        {"conv1", "layer1.0.conv2", "layer1.1.conv2"},
        {"bn1", "layer1.0.bn2", "layer1.1.bn2"},
        {"layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"},
    )
    last = groups.named("layer4.0.conv2")
    assert roles(last)[0] == {"layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv2"}
    assert roles(last)[2] == {"layer4.1.conv1", "fc"}


def test_resnet20_streams_are_three_groups_that_pass_through_the_padded_shortcuts() -> None:
    groups = groups_of(builtin("resnet20_cifar", (3, 32, 32)), (3, 32, 32))
    blocks = [f"layer{stage}.{number}" for stage in (1, 2, 3) for number in (0, 1, 2)]
    streams = {"conv1": 16, "layer2.0.conv2": 16, "layer3.0.conv2": 32}
    assert {group.name for group in groups.groups} == {f"{block}.conv1" for block in blocks} | set(streams)
    for name, width in streams.items():
        assert groups.named(name).num_channels == width
    inner = groups.named("conv1")
    starts = {piece.layer: int(piece.index[0, 0]) for piece in (*inner.producers, *inner.followers)}
    assert (starts["conv1"], starts["layer2.1.bn2"], starts["layer3.2.conv2"]) == (0, 8, 24)
    assert {piece.layer for piece in inner.readers} == {"layer2.0.shortcut", "layer3.0.shortcut"}
    assert set(reasons(groups)) == {"linear"}


# --- micro networks --------------------------------------------------------------------------------------------------


def test_bottleneck_couples_projection_and_last_convolution() -> None:
    groups = groups_of(Bottleneck())
    assert [roles(group) for group in groups.groups] == [
        ({"conv1"}, set(), {"conv2"}),
        ({"conv2"}, set(), {"conv3"}),
        ({"conv3", "downsample.0"}, {"bn3", "downsample.1"}, {"fc"}),
    ]


def test_concatenation_gives_each_branch_its_offset_in_what_reads_both() -> None:
    groups = groups_of(Concat())
    assert [group.name for group in groups.groups] == ["left", "right", "join"]
    for name, channels in (("left", range(3)), ("right", range(3, 8))):
        group = groups.named(name)
        assert roles(group) == ({name}, {"bn"}, {"join"})
        for piece in (*group.followers, *group.consumers):
            assert piece.index.ravel().tolist() == list(channels)


def test_depthwise_convolution_follows_its_channels() -> None:
    groups = groups_of(Depthwise())
    assert [roles(group) for group in groups.groups] == [
        ({"conv1"}, {"depthwise"}, {"conv2"}),
        ({"conv2"}, set(), {"fc"}),
    ]


def test_every_dense_layer_is_a_producer_or_has_a_reason() -> None:
    for model in (Chain(), Residual(), Bottleneck(), Concat(), Depthwise()):
        groups = groups_of(model)
        written = {piece.layer for group in groups.groups for piece in (*group.producers, *group.followers)}
        written = {name for name in written if isinstance(model.get_submodule(name), (nn.Conv2d, nn.Linear))}
        dense = {name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
        assert written | set(reasons(groups)) == dense
        assert not written & set(reasons(groups))


@pytest.mark.parametrize("build", [Chain, Residual, Bottleneck, Concat, Depthwise])
def test_silencing_a_channel_silences_what_the_group_says_and_nothing_else(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(1)
    model = warm_up(build())
    images = random_split(16).batch(np.arange(16))
    for group in groups_of(model).groups:
        before = consumer_inputs(model, images, group)
        for channel in (0, group.num_channels - 1):
            after = consumer_inputs(silenced(model, group, channel), images, group)
            for piece in group.consumers:
                hit = set(piece.index[channel].tolist())
                for position in range(input_width(model.get_submodule(piece.layer))):
                    was_heard, is_heard = (bool(seen[piece.layer][:, position].any()) for seen in (before, after))
                    assert is_heard == (was_heard and position not in hit)


def silenced(model: nn.Module, group: ChannelGroup, channel: int) -> nn.Module:
    """Copy whose producers and followers write zero on one channel."""
    quiet = copy.deepcopy(model)
    for piece in (*group.producers, *group.followers):
        layer = quiet.get_submodule(piece.layer)
        for parameter in layer.parameters():
            parameter.data[piece.index[channel]] = 0.0
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean[piece.index[channel]] = 0.0  # type: ignore[index]
    return quiet


def consumer_inputs(model: nn.Module, images: Tensor, group: ChannelGroup) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(piece.layer).register_forward_pre_hook(
            lambda _, values, name=piece.layer: found.__setitem__(name, values[0].clone())
        )
        for piece in group.consumers
    ]
    with torch.inference_mode():
        model(images)
    for handle in handles:
        handle.remove()
    return found


# --- protection ------------------------------------------------------------------------------------------------------


def test_keep_protects_outputs_and_inputs_of_a_layer() -> None:
    groups = groups_of(Chain(), keep=["conv2"])
    assert [group.name for group in groups.groups] == ["fc1"]
    assert reasons(groups)["conv1"] == "conv2 is protected by --keep"
    assert reasons(groups)["conv2"] == "conv2 is protected by --keep"


def test_keep_takes_shell_patterns() -> None:
    groups = groups_of(Chain(), keep=["fc*", "conv[12]"])
    assert groups.groups == ()
    assert len(groups.unprunable) == 4


def test_keeping_a_batchnorm_protects_its_stream() -> None:
    assert [group.name for group in groups_of(Residual(), keep=["bn2"]).groups] == ["conv1"]


def test_keep_pattern_without_a_layer_is_explained() -> None:
    with pytest.raises(ModelError, match="keep pattern 'con1' matches no layer; expected one of conv1, bn1"):
        groups_of(Chain(), keep=["conv1", "con1"])


def test_unknown_group_is_explained() -> None:
    with pytest.raises(ModelError, match="expected a channel group of this network, got 'nothing'"):
        groups_of(Chain()).named("nothing")


# --- couplings that cannot be pruned ---------------------------------------------------------------------------------


class Variant(nn.Module):
    """Two convolutions and a linear layer, with something between them."""

    def __init__(self, between: Callable[[Variant, Tensor], Tensor], reads: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 1)
        self.second = nn.Conv2d(reads, 4, 1)
        self.fc = nn.Linear(4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.second(self.between(self, x))).mean((2, 3)))


class OutputStream(nn.Module):
    """The stream itself is the network's output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return (self.second(torch.relu(y)) + y).mean((2, 3))


REFUSED = {
    "mean over channels": (lambda: Variant(lambda m, x: m.first(x).mean(1, keepdim=True), reads=1), {"first"}),
    "softmax over channels": (lambda: Variant(lambda m, x: m.first(x).softmax(1)), {"first"}),
    "stream is the output": (OutputStream, {"first", "second"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_couplings_that_slicing_would_break_are_refused(name: str) -> None:
    build, refused = REFUSED[name]
    model = build().eval()
    groups = confirm_groups(model, groups_of(model), IMAGE_SHAPE)
    written = {piece.layer for group in groups.groups for piece in group.producers}
    assert not refused & written
    assert refused <= set(reasons(groups))
    assert all(reasons(groups)[layer] for layer in refused)
    if isinstance(model, Variant):
        assert "second" in written  # what is sound stays prunable


def test_trial_confirms_sound_groups() -> None:
    for build in (Chain, Residual, Bottleneck, Concat, Depthwise):
        model = warm_up(build())
        groups = groups_of(model)
        assert confirm_groups(model, groups, IMAGE_SHAPE) is groups


class Undecided(nn.Module):
    """Python control flow on data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.sum() > 0:
            x = -x
        return self.fc(x.mean((2, 3)))


def test_untraceable_network_is_explained_in_one_sentence() -> None:
    with pytest.raises(
        ModelError,
        match=r"torch.fx can trace, got Undecided: .* \(line \d+ of test_groups.py: `if x.sum\(\) > 0:`\)\. Replace .*",
    ) as caught:
        groups_of(Undecided())
    assert "\n" not in str(caught.value)


def test_wrong_image_shape_is_explained() -> None:
    with pytest.raises(
        ModelError, match=r"images of shape \(2, 5, 6, 6\), got Chain: .* check the model and the input shape"
    ):
        groups_of(Chain(), (5, 6, 6))


# --- the network itself ----------------------------------------------------------------------------------------------


def test_analysis_leaves_the_network_as_it_was() -> None:
    model = warm_up(Residual())
    model.train()
    model.bn1.eval()  # a frozen BatchNorm in a network that is being trained
    model.conv1.weight.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    find_groups(model, torch.randn(2, *IMAGE_SHAPE))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_failed_analysis_leaves_the_network_as_it_was() -> None:
    model = Chain().train()
    model.conv1.weight.requires_grad_(False)
    with pytest.raises(ModelError, match="expected a network that takes images"):
        find_groups(model, torch.zeros(2, 5, 6, 6))
    assert model.training
    assert not model.conv1.weight.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("layer", "widths"),
    [
        (nn.Conv2d(4, 6, 1), (4, 6)),
        (nn.Conv2d(4, 6, 1, groups=2), (4, 6)),
        (nn.Linear(3, 7), (3, 7)),
        (nn.BatchNorm2d(5), (5, 5)),
    ],
)
def test_widths_of_layers(layer: nn.Module, widths: tuple[int, int]) -> None:
    assert (input_width(layer), output_width(layer)) == widths
