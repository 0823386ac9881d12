"""Residual additions: found, made known before the layer runs, and used to make up for the stream's error."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entprune.assembly import RefitConfig, RefitData, assemble
from entprune.candidates import answers_only
from entprune.config import PruneConfig
from entprune.models import build_model
from entprune.plan import GroupPlan, PruningPlan
from entprune.pruning import as_split, whole_split
from entprune.residuals import find_residuals, inverse_gain
from entprune.runner import InProcessRunner
from entprune.stages import analyse, calibrate, group_problem, sampling_plan
from entprune.tracing import trace
from tests.micro_networks import IMAGE_SHAPE, Bottleneck, Concat, Residual, random_split, warm_up

NUM_IMAGES = 128
CONFIG = PruneConfig(min_rows=20_000, calibration_shards=2, relative_ridge=1e-6)


def residuals_of(model: nn.Module) -> list[tuple[str, str | None, str]]:
    graph = copy.deepcopy(trace(model).graph)
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    found = find_residuals(graph, model, layers)
    graph.lint()
    return [(entry.layer, entry.norm, entry.other) for entry in found]


def test_last_layer_of_a_branch_corrects_the_stream() -> None:
    assert residuals_of(Residual().eval()) == [("conv2", "bn2", "relu")]


def test_projection_corrects_the_branch_that_ran_before_it() -> None:
    assert residuals_of(Bottleneck().eval()) == [("downsample.0", "downsample.1", "bn3")]


def test_network_without_additions_has_none() -> None:
    assert residuals_of(Concat().eval()) == []


def test_padded_shortcuts_and_identities_are_had_before_the_branch_ends() -> None:
    found = residuals_of(build_model("resnet20_cifar", num_classes=10, input_shape=(3, 32, 32)).eval())
    assert [layer for layer, _, _ in found] == [f"layer{s}.{b}.conv2" for s in (1, 2, 3) for b in (0, 1, 2)]
    others = {layer: other for layer, _, other in found}
    assert others["layer1.1.conv2"] == "layer1_0_relu2"
    assert others["layer2.0.conv2"] == "layer2_0_shortcut"


def test_summand_behind_an_identity_that_ran_before_is_still_held() -> None:
    """ResNet-18 for small images has an identity in the place of its pooling; what lies behind it is gone by then."""
    found = residuals_of(build_model("resnet18_cifar", num_classes=10, input_shape=(3, 32, 32)).eval())
    assert found[0] == ("layer1.0.conv2", "layer1.0.bn2", "maxpool")
    assert found[2] == ("layer2.0.downsample.0", "layer2.0.downsample.1", "layer2_0_bn2")
    model = build_model("resnet18_cifar", num_classes=10, input_shape=(3, 32, 32)).eval()
    network = analyse(model, (3, 32, 32), CONFIG)
    chosen = whole_split(as_split(torch.randn(8, 3, 32, 32)), None)
    assert set(calibrate(network, chosen, CONFIG, InProcessRunner())) >= {entry.layer for entry in network.residuals}


def test_protected_normalisation_is_not_touched() -> None:
    model = Residual().eval()
    assert find_residuals(copy.deepcopy(trace(model).graph), model, ["conv2"], protected=["bn2"]) == ()


def test_gain_of_a_closed_channel_is_zero() -> None:
    model: Any = warm_up(Residual())
    with torch.no_grad():
        model.bn2.weight[1] = 1e-6
    (entry,) = find_residuals(copy.deepcopy(trace(model).graph), model, ["conv2"])
    gain = inverse_gain(model, entry)
    assert gain[1] == 0.0
    expected = (model.bn2.running_var[0] + model.bn2.eps).sqrt() / model.bn2.weight[0]
    torch.testing.assert_close(gain[0], expected)


class Stream(nn.Module):
    """A stem whose error the block can see and undo: both read the same image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 1)
        self.inner = nn.Conv2d(6, 12, 1)
        self.mid = nn.Conv2d(12, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.tanh(self.stem(x))
        s = s + self.norm(self.mid(torch.relu(self.inner(s))))
        return self.fc(torch.tanh(s).mean((2, 3)))


@pytest.mark.parametrize("seed", range(3))
def test_correction_brings_the_sum_nearer_to_the_dense_one(seed: int) -> None:
    """The first convolution is pruned: what the stream lost, the branch makes up for as far as it can see it."""
    torch.manual_seed(seed)
    model = warm_up(nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 2, 1), Stream()))
    images = torch.from_numpy(np.asarray(random_split(NUM_IMAGES, seed=7).images))
    chosen = whole_split(as_split(images), None)
    errors = {}
    for is_corrected in (False, True):
        config = PruneConfig(**{**_plain(CONFIG), "correct_residuals": is_corrected})
        network = analyse(model, IMAGE_SHAPE, config)
        statistics = calibrate(network, chosen, config, InProcessRunner())
        data = RefitData(
            split=chosen.split, indices=chosen.indices, statistics=answers_only(statistics, network),
            sampling=sampling_plan(config, len(chosen)), residuals=network.residuals,
        )  # fmt: skip
        plan = PruningPlan(
            groups=tuple(
                GroupPlan(
                    name=g.name,
                    num_channels=g.num_channels,
                    kept_channels=tuple(range(3 if g.name == "0" else g.num_channels)),
                )
                for g in network.groups.groups
            )
        )
        smaller = assemble(network.model, network.groups, plan, data=data, config=RefitConfig(relative_ridge=1e-6))
        with torch.inference_mode():
            errors[is_corrected] = float((_sum(smaller, images) - _sum(model, images)).square().mean())
    assert errors[True] < errors[False]


def _plain(config: PruneConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _sum(model: nn.Module, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule("3.fc").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    handle.remove()
    return seen[0]


def test_answers_of_an_unpruned_network_stay_its_own() -> None:
    """Nothing was removed: the corrected targets minus the present stream are the layer's own answers."""
    model = warm_up(Residual())
    network = analyse(model, IMAGE_SHAPE, CONFIG)
    assert [entry.layer for entry in network.residuals] == ["conv2"]
    chosen = whole_split(random_split(NUM_IMAGES), None)
    statistics = calibrate(network, chosen, CONFIG, InProcessRunner())
    inputs: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, i, o, name=name: inputs.update({name: o, f"<{name}": i[0]})
        )
        for name in ("conv1", "conv2")
    ]
    with torch.inference_mode():
        model(chosen.split.batch(chosen.indices))
    for handle in handles:
        handle.remove()
    stream = inputs["<conv1"] * inverse_gain(model, network.residuals[0]).reshape(-1, 1, 1)
    expected = (inputs["conv2"] + stream).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(torch.from_numpy(statistics["conv2"].outputs), expected, atol=1e-5, rtol=1e-5)


def solved_inputs(model: nn.Module, name: str) -> tuple[Any, Any, Any]:
    network = analyse(model, IMAGE_SHAPE, CONFIG)
    chosen = whole_split(random_split(NUM_IMAGES), None)
    statistics = calibrate(network, chosen, CONFIG, InProcessRunner())
    return network, statistics, group_problem(network, network.groups.named(name), statistics)


def explained(consumer: Any) -> float:
    return float(np.trace(consumer.weight @ consumer.gram @ consumer.weight.T))


def test_errors_of_a_branch_are_measured_against_the_sum() -> None:
    model: Any = warm_up(Residual())
    with torch.no_grad():
        model.bn2.weight.mul_(0.1)  # a branch that hardly changes its stream
    _, _, problem = solved_inputs(model, "conv1")
    (consumer,) = problem.consumers
    gain = model.bn2.weight.detach() * (model.bn2.running_var + model.bn2.eps).rsqrt()
    with torch.inference_mode():
        images = random_split(NUM_IMAGES).batch(np.arange(NUM_IMAGES))
        stream = torch.relu(model.bn0(model.stem(images)))
        branch = model.conv2(torch.relu(model.bn1(model.conv1(stream)))) * gain.reshape(-1, 1, 1)
    share = branch.var((0, 2, 3), correction=0).sum() / (branch + stream).var((0, 2, 3), correction=0).sum()
    assert share < 0.1
    assert explained(consumer) == pytest.approx(float(share), rel=0.02)


def test_outputs_count_as_much_as_their_normalisation_lets_through() -> None:
    model: Any = warm_up(Residual())
    with torch.no_grad():
        model.bn1.weight.copy_(torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    _, _, problem = solved_inputs(model, "stem")
    consumer = next(entry for entry in problem.consumers if entry.layer == "conv1")
    assert np.abs(consumer.weight[2]).max() == 0.0
    assert np.abs(consumer.weight[1]).max() > 0.0
    assert explained(consumer) == pytest.approx(1.0, abs=1e-3)
