"""Assembly: nothing changes where nothing was lost, and elsewhere refitting recovers what can be recovered."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from entprune import spill
from entprune.assembly import RefitConfig, RefitData, assemble, dense_layers, slice_network
from entprune.calibration import SamplingPlan, collect_statistics
from entprune.errors import ConfigError, ModelError
from entprune.groups import ChannelGroups, find_groups
from entprune.layers import LayerSelection, narrow_layer
from entprune.plan import GroupPlan, PruningPlan, full_plan
from entprune.tracing import trace
from tests.micro_networks import IMAGE_SHAPE, Bottleneck, Chain, Concat, Depthwise, Residual, random_split, warm_up

NUM_IMAGES = 96
EVERY_ROW = SamplingPlan(num_images=NUM_IMAGES, batch_size=32, min_rows=10**6)
SOME_ROWS = replace(EVERY_ROW, min_rows=400, rows_per_feature=1.0)
FAITHFUL = RefitConfig(relative_ridge=1e-9, reestimate_batchnorm=False, rectified_steps=0, output_temperature=0.0)
SETTINGS = [
    RefitConfig(),
    FAITHFUL,
    RefitConfig(relative_ridge=1e-9),
    RefitConfig(reestimate_batchnorm=False),
]


@functools.cache
def architecture_groups(build: type[nn.Module]) -> ChannelGroups:
    return find_groups(build(), torch.zeros(2, *IMAGE_SHAPE))


def groups_of(model: nn.Module) -> ChannelGroups:
    """The groups depend on the kind of network alone."""
    return architecture_groups(type(model))


def images_of(seed: int = 0) -> Tensor:
    return random_split(NUM_IMAGES, seed).batch(np.arange(NUM_IMAGES))


def prepared(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network whose BatchNorm statistics are those of the calibration images."""
    torch.manual_seed(seed)
    return settled(warm_up(build()))


def settled(model: nn.Module) -> nn.Module:
    """Take BatchNorm statistics (with the biased variance) from one batch of all calibration images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    counts: dict[nn.Module, int] = {}
    handles = [
        norm.register_forward_pre_hook(lambda layer, values: counts.__setitem__(layer, values[0][:, 0].numel()))
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = None  # the average over all batches seen since the reset
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        model(images_of())
    for norm, handle in zip(norms, handles, strict=True):
        handle.remove()
        assert norm.running_var is not None
        norm.running_var *= (counts[norm] - 1) / counts[norm]
    return model.eval()


def refit_data(model: nn.Module, sampling: SamplingPlan = EVERY_ROW) -> RefitData:
    split, indices = random_split(NUM_IMAGES), np.arange(NUM_IMAGES)
    statistics = collect_statistics(model, split, indices, consumers=(), others=dense_layers(model), sampling=sampling)
    return RefitData(split=split, indices=indices, statistics=statistics, sampling=sampling)


def plan_without(model: nn.Module, removed: Mapping[str, Sequence[int]]) -> PruningPlan:
    groups = groups_of(model)
    assert set(removed) <= {group.name for group in groups.groups}
    return PruningPlan(
        groups=tuple(
            replace(entry, kept_channels=tuple(k for k in entry.kept_channels if k not in removed.get(entry.name, ())))
            for entry in full_plan(groups).groups
        )
    )


def half_plan(model: nn.Module, seed: int = 0) -> PruningPlan:
    generator = np.random.default_rng(seed)
    groups = groups_of(model).groups
    return plan_without(
        model, {g.name: generator.permutation(g.num_channels)[: g.num_channels // 2].tolist() for g in groups}
    )


def assembled(
    model: nn.Module,
    plan: PruningPlan,
    config: RefitConfig = FAITHFUL,
    sampling: SamplingPlan = EVERY_ROW,
    **options: Any,
) -> nn.Module:
    groups = groups_of(model)
    return assemble(model, groups, plan, data=refit_data(model, sampling), config=config, **options)


def logits(model: nn.Module, seed: int = 0) -> Tensor:
    with torch.inference_mode():
        return model(images_of(seed)).clone()


def distance(model: nn.Module, dense: nn.Module, seed: int = 0) -> float:
    return float((logits(model, seed) - logits(dense, seed)).square().mean())


ALL = [Chain, Residual, Bottleneck, Concat, Depthwise]


# --- nothing is lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ALL)
@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_keeping_everything_leaves_the_outputs_equal(build: Callable[[], nn.Module], config: RefitConfig) -> None:
    torch.manual_seed(0)
    model = warm_up(build())  # its BatchNorm statistics are not those of the calibration images
    groups = groups_of(model)
    same = assembled(model, full_plan(groups), config)
    torch.testing.assert_close(logits(same), logits(model), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(same, seed=9), logits(model, seed=9), atol=1e-5, rtol=0)


def kill(model: nn.Module, layers: Sequence[str], channel: int) -> None:
    """Let layers write zero on one channel, through a ReLU if need be."""
    for name in layers:
        layer = model.get_submodule(name)
        for parameter in layer.parameters():
            parameter.data[channel] = 0.0
        if isinstance(layer, nn.BatchNorm2d):
            layer.bias.data[channel] = -1.0


DEAD = {
    "convolution and BatchNorm": (Chain, ["conv1", "bn1"], "conv1"),
    "convolution before flatten": (Chain, ["conv2"], "conv2"),
    "linear layer": (Chain, ["fc1"], "fc1"),
    "residual stream": (Residual, ["stem", "bn0", "conv2", "bn2"], "stem"),
    "inside a block": (Residual, ["conv1", "bn1"], "conv1"),
    "projection": (Bottleneck, ["conv3", "bn3", "downsample.0", "downsample.1"], "conv3"),
    "without bias and BatchNorm": (Bottleneck, ["conv1"], "conv1"),
}


@pytest.mark.parametrize("name", DEAD)
@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_removing_a_dead_channel_leaves_the_outputs_equal(name: str, config: RefitConfig) -> None:
    sampling = SOME_ROWS if config.reestimate_batchnorm else EVERY_ROW
    build, layers, group = DEAD[name]
    model = prepared(build)
    kill(model, layers, 2)
    settled(model)
    smaller = assembled(model, plan_without(model, {group: [2]}), config, sampling)
    torch.testing.assert_close(logits(smaller), logits(model), atol=2e-4, rtol=0)
    torch.testing.assert_close(logits(smaller, seed=9), logits(model, seed=9), atol=2e-4, rtol=0)


def copy_channel(model: nn.Module, layers: Sequence[str], source: int, target: int) -> None:
    for name in layers:
        for value in model.get_submodule(name).state_dict().values():
            if value.ndim:
                value[target] = value[source]


@pytest.mark.parametrize("name", DEAD)
@pytest.mark.parametrize("reestimate", [False, True])
def test_removing_one_of_two_equal_channels_is_lossless(name: str, reestimate: bool) -> None:
    build, layers, group = DEAD[name]
    model = prepared(build)
    copy_channel(model, layers, 0, 3)
    settled(model)
    plan, groups = plan_without(model, {group: [3]}), groups_of(model)
    smaller = assembled(model, plan, replace(FAITHFUL, reestimate_batchnorm=reestimate))
    sliced = slice_network(model, groups, plan)
    assert distance(sliced, model) > 1e-6  # slicing alone loses something
    torch.testing.assert_close(logits(smaller), logits(model), atol=1e-3, rtol=0)
    torch.testing.assert_close(logits(smaller, seed=9), logits(model, seed=9), atol=1e-3, rtol=0)


# --- something is lost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ALL)
@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_refit_is_closer_to_the_dense_network_than_slicing(build: Callable[[], nn.Module], config: RefitConfig) -> None:
    model = prepared(build, seed=3)
    plan, groups = half_plan(model), groups_of(model)
    smaller, sliced = assembled(model, plan, config), slice_network(model, groups, plan)
    assert distance(smaller, model) < 0.7 * distance(sliced, model)
    assert distance(smaller, model, seed=9) < distance(sliced, model, seed=9)  # 96 images leave some noise


def layer_rows(model: nn.Module, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Unfolded inputs and outputs of a convolution at every position, in the order of images and positions."""
    found: list[tuple[Tensor, Tensor]] = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda _, values, output: found.append((values[0].clone(), output.clone())))
    logits(model)
    handle.remove()
    value, output = found[0]
    if isinstance(layer, nn.Linear):
        return value.double().numpy(), output.double().numpy()
    unfolded = nn.functional.unfold(
        value,
        layer.kernel_size,
        padding=layer.padding,
        stride=layer.stride,  # type: ignore[arg-type]
    )
    rows = unfolded.transpose(1, 2).flatten(0, 1)
    return rows.double().numpy(), output.flatten(2).transpose(1, 2).flatten(0, 1).double().numpy()


def least_squares(rows: np.ndarray, answers: np.ndarray, *, intercept: bool) -> np.ndarray:
    """Fitted answers (t, m) of an ordinary regression."""
    design = np.hstack([rows, np.ones((len(rows), 1))]) if intercept else rows
    return design @ np.linalg.lstsq(design, answers, rcond=None)[0]


@pytest.mark.parametrize(
    ("build", "group", "consumer", "intercept"),
    [(Chain, "conv1", "conv2", True), (Chain, "conv2", "fc1", True), (Bottleneck, "conv1", "conv2", False)],
)
def test_refit_layer_is_ordinary_least_squares(
    build: Callable[[], nn.Module], group: str, consumer: str, intercept: bool
) -> None:
    model = prepared(build)
    smaller = assembled(model, plan_without(model, {group: [0, 3]}))
    rows, fitted = layer_rows(smaller, consumer)
    _, answers = layer_rows(model, consumer)
    expected = least_squares(rows, answers, intercept=intercept)
    np.testing.assert_allclose(fitted, expected, atol=2e-4)


def test_bias_free_convolution_before_batchnorm_is_fitted_with_an_intercept() -> None:
    model = prepared(Residual)
    smaller = assembled(model, plan_without(model, {"conv1": [0, 2]}), replace(FAITHFUL, reestimate_batchnorm=True))
    rows, fitted = layer_rows(smaller, "conv2")
    _, answers = layer_rows(model, "conv2")
    expected = least_squares(rows, answers, intercept=True)
    np.testing.assert_allclose(fitted - fitted.mean(0), expected - expected.mean(0), atol=2e-4)
    norm = smaller.get_submodule("bn2")
    np.testing.assert_allclose(norm.running_mean, fitted.mean(0), atol=1e-4)
    np.testing.assert_allclose(norm.running_var, fitted.var(0), rtol=1e-3)


def test_later_layers_are_fitted_to_what_they_really_read() -> None:
    model = prepared(Chain)
    smaller = assembled(model, half_plan(model))
    rows, fitted = layer_rows(smaller, "fc2")
    _, answers = layer_rows(model, "fc2")
    np.testing.assert_allclose(fitted, least_squares(rows, answers, intercept=True), atol=2e-4)


def test_strong_ridge_keeps_the_sliced_weights() -> None:
    model = prepared(Chain)
    plan, groups = half_plan(model), groups_of(model)
    smaller = assembled(model, plan, replace(FAITHFUL, relative_ridge=1e9))
    sliced = slice_network(model, groups, plan)
    for name in ("conv1", "conv2", "fc1", "fc2"):
        torch.testing.assert_close(smaller.get_parameter(f"{name}.weight"), sliced.get_parameter(f"{name}.weight"))


def test_fewer_rows_than_features_are_survived() -> None:
    model = prepared(Chain)
    few = replace(EVERY_ROW, num_images=8)
    split, indices = random_split(8), np.arange(8)
    statistics = collect_statistics(model, split, indices, consumers=(), others=dense_layers(model), sampling=few)
    smaller = assemble(
        model, groups_of(model), half_plan(model),
        data=RefitData(split=split, indices=indices, statistics=statistics, sampling=few), config=RefitConfig(),
    )  # fmt: skip
    assert bool(torch.isfinite(logits(smaller)).all())


class ChangedInPlace(nn.Module):
    """The ReLU changes what the addition reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(IMAGE_SHAPE[0], 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.conv1(images)
        shortened = torch.relu_(stream.flatten(2)).unflatten(2, images.shape[2:])
        return self.head((self.conv2(shortened) + stream).mean((2, 3)))


class Scaled(nn.Module):
    """Operations read a parameter of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(IMAGE_SHAPE[0], 8, 3), nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head((torch.relu(self.conv(images)) * self.scale).mean((2, 3)))


@pytest.mark.parametrize("build", [*ALL, ChangedInPlace, Scaled])
def test_activations_in_files_give_the_same_weights_to_the_bit(build: Callable[[], nn.Module]) -> None:
    model = prepared(build)
    plan, groups, data = half_plan(model), groups_of(model), refit_data(model)
    least = 2 * images_of().nbytes  # some of the activations are held
    held, some, none = (
        assemble(model, groups, plan, data=replace(data, held_bytes=size), config=RefitConfig()).state_dict()
        for size in (2**40, least, 0)
    )
    for name, value in held.items():
        assert torch.equal(value, none[name]), name
        assert torch.equal(value, some[name]), name


@pytest.mark.parametrize("build", ALL)
def test_few_batches_are_read_at_once(build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, alive = prepared(build), spill.Entry.read, []
    most = 0

    def count(entry: spill.Entry) -> Tensor:
        nonlocal most
        tensor = read(entry)
        alive.append(weakref.ref(tensor.untyped_storage()))
        most = max(most, sum(reference() is not None for reference in alive))
        return tensor

    monkeypatch.setattr(spill.Entry, "read", count)
    data = refit_data(model, replace(EVERY_ROW, batch_size=8))
    data = replace(data, held_bytes=0, held_numbers=0)
    assemble(model, groups_of(model), half_plan(model), data=data, config=RefitConfig(output_temperature=0.0))
    assert len(alive) > NUM_IMAGES // 8  # batches
    assert most <= 4


# --- the network that comes out --------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(st.integers(0, 999))
@pytest.mark.parametrize("build", ALL)
def test_sliced_layers_describe_themselves_correctly(build: Callable[[], nn.Module], seed: int) -> None:
    model = build().eval()
    groups = groups_of(model)
    plan = half_plan(model, seed)
    smaller = slice_network(model, groups, plan)
    for name, layer in smaller.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels // layer.groups), name
        elif isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features), name
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.running_var is not None
            assert layer.weight.shape == layer.bias.shape == layer.running_var.shape == (layer.num_features,), name
    for group in groups.groups:
        for piece in group.producers:
            assert len(smaller.get_parameter(f"{piece.layer}.weight")) == plan.widths()[group.name]
    with torch.inference_mode():
        assert smaller(torch.zeros(2, *IMAGE_SHAPE)).shape == (2, 3)


def test_sliced_weights_are_the_dense_ones() -> None:
    model = Chain().eval()
    plan = PruningPlan(
        groups=(
            GroupPlan(name="conv1", num_channels=6, kept_channels=(1, 4)),
            GroupPlan(name="conv2", num_channels=5, kept_channels=(0, 3, 4)),
            GroupPlan(name="fc1", num_channels=7, kept_channels=(6,)),
        )
    )
    smaller = slice_network(model, groups_of(model), plan)
    assert torch.equal(smaller.conv2.weight, model.conv2.weight[[0, 3, 4]][:, [1, 4]])
    assert torch.equal(smaller.bn1.running_var, model.bn1.running_var[[1, 4]])
    flat = [*range(4), *range(12, 20)]
    assert torch.equal(smaller.fc1.weight, model.fc1.weight[[6]][:, flat])
    assert torch.equal(smaller.fc1.bias, model.fc1.bias[[6]])


@pytest.mark.parametrize("build", [Chain, Residual])
def test_arguments_are_left_as_they_were(build: Callable[[], nn.Module]) -> None:
    model = prepared(build)
    groups, data = groups_of(model), refit_data(model, SOME_ROWS)
    state = copy.deepcopy(model.state_dict())
    outputs = {name: entry.outputs.copy() for name, entry in data.statistics.items()}
    images = images_of()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    smaller = assemble(model, groups, half_plan(model), data=data, config=RefitConfig())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(np.array_equal(entry.outputs, outputs[name]) for name, entry in data.statistics.items())
    assert torch.equal(data.split.batch(data.indices), images)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in smaller.parameters()}


def test_result_can_be_trained_and_is_in_eval_mode() -> None:
    smaller = assembled(prepared(Chain), half_plan(prepared(Chain)), RefitConfig())
    assert not any(module.training for module in smaller.modules())
    smaller.train()
    smaller(images_of()).square().mean().backward()
    assert all(parameter.grad is not None for parameter in smaller.parameters())


def test_frozen_parameters_stay_frozen() -> None:
    model = prepared(Chain)
    model.get_parameter("conv2.weight").requires_grad_(False)
    smaller = assembled(model, half_plan(model), RefitConfig())
    assert [name for name, p in smaller.named_parameters() if not p.requires_grad] == ["conv2.weight"]


def test_same_inputs_give_the_same_bits_with_a_graph_traced_before_or_here() -> None:
    model = prepared(Residual)
    first, again = (assembled(model, half_plan(model), RefitConfig(), SOME_ROWS) for _ in range(2))
    traced = assembled(model, half_plan(model), RefitConfig(), SOME_ROWS, graph=trace(model).graph)
    assert torch.equal(logits(first), logits(again))
    assert torch.equal(logits(first), logits(traced))


def test_progress_ends_at_the_last_node() -> None:
    model, calls = prepared(Chain), []
    assembled(model, half_plan(model), progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert calls[-1][1] - calls[-1][0] <= 1  # the output node is no work


def test_layer_that_cannot_be_sliced_is_explained() -> None:
    selection = LayerSelection(outputs=np.array([0]))
    with pytest.raises(ModelError, match=r"layer 'mix': expected a convolution, linear layer or norm.*, got Bilinear"):
        narrow_layer(nn.Bilinear(2, 4, 4), selection, "mix")
    with pytest.raises(ModelError, match=r"whole groups or equal numbers of a GroupNorm's channels, got \[2, 1\]"):
        narrow_layer(nn.GroupNorm(2, 4), LayerSelection(outputs=np.array([0, 1, 3])), "norm")


def test_refit_layers_are_dense_layers_called_once_with_their_own_parameters() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.depthwise = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=4)
            self.twice, self.tied, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.other.weight = self.tied.weight
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(self.depthwise(self.first(x))))
            return self.fc(self.other(self.tied(x)).mean((2, 3)))

    assert dense_layers(Mixed()) == ("first", "fc")


class Rectified(nn.Module):
    """A wide layer with a BatchNorm and a ReLU behind it, most of whose outputs are cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv2(torch.relu(self.conv1(x)))))
        return self.fc(y.mean((2, 3)))


def test_rectified_refit_is_nearer_behind_the_relu_and_keeps_the_normalisation() -> None:
    model = prepared(Rectified)
    with torch.no_grad():
        model.get_submodule("norm").bias.fill_(-1.0)
    plan = plan_without(model, {"conv1": list(range(10))})
    plain = replace(FAITHFUL, reestimate_batchnorm=True)
    aware = replace(plain, rectified_steps=6)
    images = torch.from_numpy(random_split(NUM_IMAGES).images)

    def error(config: RefitConfig) -> float:
        smaller = assembled(model, plan, config)
        outputs = []
        for network in (model, smaller):
            network.get_submodule("norm").register_forward_hook(lambda _, __, y: outputs.append(torch.relu(y)))
            with torch.inference_mode():
                network(images)
        return float((outputs[-1] - outputs[0]).square().mean())

    assert error(aware) < 0.95 * error(plain)
    norm, dense = assembled(model, plan, aware).get_submodule("norm"), model.get_submodule("norm")
    torch.testing.assert_close(norm.running_var, dense.running_var)


def test_output_layer_answers_with_nearer_probabilities() -> None:
    model = prepared(Chain)
    plan = half_plan(model)
    images = torch.from_numpy(random_split(NUM_IMAGES).images)

    def divergence(config: RefitConfig) -> float:
        with torch.inference_mode():
            dense, present = (
                network(images).div(2.0).log_softmax(1) for network in (model, assembled(model, plan, config))
            )
        return float(torch.nn.functional.kl_div(present, dense, reduction="batchmean", log_target=True))

    assert divergence(replace(FAITHFUL, output_temperature=2.0)) < divergence(FAITHFUL)


@pytest.mark.parametrize(
    "wrong", [{"relative_ridge": 0.0}, {"rectified_steps": -1}, {"output_temperature": -2.0}], ids=str
)
def test_refit_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RefitConfig(**wrong)
