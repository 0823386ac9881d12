"""Channel sets of networks with one trap each, by hand; that they can be cut; and a peer's opinion."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from entprune.artifact import ModelCard, load_model, save_model
from entprune.assembly import slice_network
from entprune.certificate import certify, confirm_groups
from entprune.groups import ChannelGroup, ChannelGroups, find_groups
from entprune.models import build_model
from entprune.plan import GroupPlan, PruningPlan
from tests import conformance
from tests.trap_networks import TRAPS, Net, TwoInputs, conv, head

IMAGE_SHAPE = (2, 6, 6)


def groups_of(model: nn.Module) -> ChannelGroups:
    return find_groups(model.eval(), torch.zeros(2, *IMAGE_SHAPE))


def rows(group: ChannelGroup) -> dict[str, list[list[int]]]:
    """Positions by layer; an input axis gets a `<` if the group has the layer's outputs, too."""
    outputs = {piece.layer: piece.index.tolist() for piece in (*group.producers, *group.followers)}
    inputs = {
        piece.layer + "<" * (piece.layer in outputs): piece.index.tolist()
        for piece in (*group.consumers, *group.readers)
    }
    return outputs | inputs


def half(groups: ChannelGroups) -> PruningPlan:
    return PruningPlan(
        groups=tuple(
            GroupPlan(name=g.name, num_channels=g.num_channels, kept_channels=tuple(range(1, g.num_channels, 2)))
            for g in groups.groups
        )
    )


def randomised(model: nn.Module) -> nn.Module:
    """No two channels alike, no scale near zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.3, 1.0).mul_(torch.where(torch.rand_like(parameter) < 0.5, -1.0, 1.0))
    return model.eval()


@pytest.mark.parametrize("name", TRAPS)
def test_sets_are_those_written_down_by_hand(name: str) -> None:
    trap = TRAPS[name]
    groups = groups_of(trap.build())
    assert {group.name: rows(group) for group in groups.groups} == trap.expected
    reasons = {entry.layer: entry.reason for entry in groups.unprunable}
    assert reasons.keys() == trap.refused.keys()
    assert all(part in reasons[layer] for layer, part in trap.refused.items())


@pytest.mark.parametrize("name", TRAPS)
def test_cut_network_equals_the_masked_one_trains_and_reloads(name: str, tmp_path: Path) -> None:
    model = randomised(TRAPS[name].build())
    groups = groups_of(model)
    assert confirm_groups(model, groups, IMAGE_SHAPE) is groups
    plan = half(groups)
    smaller = slice_network(model, groups, plan)
    assert certify(model, smaller, groups, plan, torch.randn(3, *IMAGE_SHAPE), tolerance=1e-10).passed
    outputs = list(tree_leaves(smaller.train()(torch.randn(2, *IMAGE_SHAPE))))
    sum(value.square().sum() for value in outputs).backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())
    card = ModelCard(model_spec=None, num_classes=3, input_shape=IMAGE_SHAPE, mean=(), std=(), class_names=())
    save_model(smaller, plan, card, tmp_path / "model")
    reloaded = load_model(tmp_path / "model", model=TRAPS[name].build())
    images = torch.randn(4, *IMAGE_SHAPE)
    with torch.inference_mode():
        answers = zip(tree_leaves(smaller.eval()(images)), tree_leaves(reloaded(images)), strict=True)
    assert all(torch.equal(one, other) for one, other in answers)


def test_tied_weights_stay_tied() -> None:
    model = TRAPS["tied weights"].build()
    groups = groups_of(model)
    smaller: Any = slice_network(model, groups, half(groups))
    assert smaller.one.weight is smaller.two.weight
    assert smaller.one.weight.shape == (2, 2, 1, 1)
    assert smaller.one.bias is not smaller.two.bias


@pytest.mark.parametrize(
    ("between", "reads", "part"),
    [
        (lambda x: x.mean(1, keepdim=True), 1, "mean in the network's forward reduces over channels"),
        (lambda x: x.softmax(1), 6, "softmax in the network's forward mixes channels"),
        (lambda x: x.cumsum(1), 6, "cumsum in the network's forward mixes channels"),
        (lambda x: x * torch.linspace(0, 1, 6).view(6, 1, 1), 6, "a constant of fixed size acts on its channels"),
        (lambda x: x[:, :4], 4, "slice in the network's forward takes some channels at fixed positions"),
        (lambda x: x[:, 2:3], 1, "takes some channels at fixed positions"),
        (lambda x: x[:, [4, 0, 2]], 3, "index in the network's forward mixes channels in a way that cannot be sliced"),
        (lambda x: torch.einsum("nchw,cd->ndhw", x, torch.eye(6)), 6, "bmm"),
        (lambda x: torch.stack(x.unbind(1), 1), 6, "unbind"),
        (lambda x: torch.cat([x, torch.zeros(2, 1, 6, 6)], 1)[:, :6], 6, "takes some channels"),
    ],
)
def test_operators_that_mix_channels_are_refused_by_name(between: Any, reads: int, part: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return head(m, m.second(between(m.first(x))))

    groups = groups_of(Net(forward, first=conv(2, 6), second=conv(reads, 4), fc=nn.Linear(4, 3)))
    assert [group.name for group in groups.groups] == ["second"]
    (reason,) = [entry.reason for entry in groups.unprunable if entry.layer == "first"]
    assert part in reason


@pytest.mark.parametrize("kind", [nn.ConvTranspose2d, nn.Bilinear])
def test_layer_types_without_a_rule_pin_what_they_read(kind: type[nn.Module]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x)
        return head(m, m.odd(x)) if kind is nn.ConvTranspose2d else m.odd(x.mean((2, 3)), x.mean((2, 3)))

    odd = nn.ConvTranspose2d(4, 5, 1) if kind is nn.ConvTranspose2d else nn.Bilinear(4, 4, 3)
    groups = groups_of(Net(forward, first=conv(2, 4), odd=odd, fc=nn.Linear(5, 3)))
    assert groups.groups == ()
    assert {"first", "odd"} <= {entry.layer for entry in groups.unprunable}


def test_code_that_counts_on_its_channels_is_found_by_the_trial() -> None:
    """An equal split with the number written into the code looks like a chunk, until it is cut."""

    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = torch.split(m.first(x), 3, dim=1)
        return head(m, m.second(left * right))

    model = randomised(Net(forward, first=conv(2, 6), second=conv(3, 4), fc=nn.Linear(4, 3)))
    groups = confirm_groups(model, groups_of(model), IMAGE_SHAPE)
    assert [group.name for group in groups.groups] == ["second"]
    assert any(entry.layer == "first" and "a trial showed" in entry.reason for entry in groups.unprunable)


def test_two_inputs() -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return head(m, m.left(x) + m.right(y))

    model = TwoInputs(forward, left=conv(2, 4), right=conv(3, 4), fc=nn.Linear(4, 3)).eval()
    groups = find_groups(model, (torch.zeros(2, 2, 6, 6), torch.zeros(2, 3, 6, 6)))
    assert [sorted(rows(group)) for group in groups.groups] == [["fc", "left", "right"]]


def test_wrong_coupling_deep_inside_is_found_though_the_output_hardly_moves() -> None:
    """The branch is scaled to almost nothing, as in a fresh ConvNeXt."""
    model: Any = randomised(TRAPS["layer scale"].build())
    with torch.no_grad():
        model.scale.fill_(1e-6)
    groups = groups_of(model)
    (stem,) = groups.groups
    shifted = tuple(replace(p, index=(p.index + (p.layer == "inner")) % 5) for p in stem.producers)
    wrong = replace(groups, groups=(replace(stem, producers=shifted),))
    assert confirm_groups(model, groups, IMAGE_SHAPE) is groups
    assert confirm_groups(model, wrong, IMAGE_SHAPE).groups == ()


def test_kept_layer_keeps_both_axes_and_its_bits() -> None:
    model = build_model("resnet20_cifar", num_classes=10, input_shape=(3, 32, 32)).eval()
    groups = find_groups(model, torch.zeros(2, 3, 32, 32), keep=["layer2.1.conv2", "layer3.0*"])
    assert {"layer2.1.conv2", "layer3.0", "layer3.0.conv1", "layer3.0.bn2"} <= groups.protected
    touched = {piece.layer for g in groups.groups for piece in (*g.producers, *g.followers, *g.consumers, *g.readers)}
    assert not touched & groups.protected
    assert touched


# --- a peer -----------------------------------------------------------------------------------------------------------

PEER_NETWORKS = [
    "alexnet", "vgg11_bn", "resnet18", "resnet50", "densenet121", "mobilenet_v2", "mnasnet0_5", "squeezenet1_1",
    "mobilenet_v3_small", "googlenet",
]  # fmt: skip


def peer_sets(model: nn.Module, size: int) -> set[frozenset[tuple[str, str]]]:
    """Layers coupled by torch-pruning, as (axis, layer) of dense layers; every channel of a group alike."""
    tp = pytest.importorskip("torch_pruning")
    logging.getLogger("torch_pruning").setLevel(logging.ERROR)
    names = {module: name for name, module in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=torch.zeros(2, 3, size, size))
    found = set()
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        layers = set()
        for item in group:
            module = item.dep.target.module
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                writes = item.dep.handler.__name__ == "prune_out_channels"
                layers.add(("out" if writes else "in", names[module]))
        found.add(frozenset(layers))
    return found


def our_sets(model: nn.Module, size: int) -> set[frozenset[tuple[str, str]]]:
    groups = find_groups(model.eval(), torch.zeros(2, 3, size, size))
    return {
        frozenset(
            [
                ("out", piece.layer)
                for piece in (*group.producers, *group.followers)
                if is_dense_layer(model, piece.layer)
            ]
            + [("in", piece.layer) for piece in group.consumers]
        )
        for group in groups.groups
    }


def is_dense_layer(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), (nn.Conv2d, nn.Linear))


@pytest.mark.parametrize("name", PEER_NETWORKS)
def test_coupled_layers_agree_with_torch_pruning(name: str) -> None:
    model = conformance._build(name, (3, 64, 64))
    if name == "googlenet":
        model.aux1 = model.aux2 = None
    ours = our_sets(copy.deepcopy(model), 64)
    theirs = {without_depthwise_inputs(model, entry) for entry in peer_sets(copy.deepcopy(model), 64)}
    assert ours
    assert ours <= theirs
    assert all(("out", last_layer(model)) in entry for entry in theirs - ours)


def without_depthwise_inputs(model: nn.Module, entry: frozenset[tuple[str, str]]) -> frozenset[tuple[str, str]]:
    """They list the input axis of a depthwise convolution, which for us follows from its outputs."""
    return frozenset(
        (axis, layer) for axis, layer in entry if axis == "out" or getattr(model.get_submodule(layer), "groups", 1) == 1
    )


def last_layer(model: nn.Module) -> str:
    """The layer that writes the logits, which they leave to the user to protect."""
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))][-1]


# --- real networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "regnet_x_400mf", "googlenet"])
def test_torchvision_network_conforms(name: str, tmp_path: Path) -> None:
    assert conformance.check_network(name, tmp_path)["passed"]


def test_all_torchvision_cnns_are_on_the_list() -> None:
    names = conformance.network_names()
    assert len(names) >= 68
    assert not [name for name in names if name.startswith(("vit", "swin", "maxvit"))]


def test_option_a_streams_become_narrower() -> None:
    model = build_model("resnet20_cifar", num_classes=10, input_shape=(3, 32, 32)).eval()
    groups = find_groups(model, torch.zeros(2, 3, 32, 32))
    plan = conformance.half_plan(groups)
    smaller: Any = slice_network(model, groups, plan)
    assert certify(model, smaller, groups, plan, torch.randn(2, 3, 32, 32)).passed
    assert (smaller.conv1.out_channels, smaller.layer2[2].conv2.out_channels, smaller.linear.in_features) == (8, 16, 32)
    shortcut = smaller.layer2[0].shortcut
    assert (shortcut.in_channels, shortcut.out_channels) == (8, 16)
    kept16, kept32 = list(range(0, 16, 2)), sorted([*range(0, 8, 2), *range(8, 24, 2), *range(24, 32, 2)])
    expected = tuple(kept16.index(c - 8) if c - 8 in kept16 else -1 for c in kept32)
    assert shortcut.source == expected
    assert np.count_nonzero(np.array(shortcut.source) >= 0) == 8
