"""Layers of low rank: the best weights of a rank, two layers in the place of one, and ranks at a price."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import entprune
from entprune import Budget, PruneConfig, prune
from entprune.artifact import ModelCard, load_model, save_model
from entprune.datasets import load_data
from entprune.errors import ArtifactError, ModelError
from entprune.evaluation import count_macs, count_parameters
from entprune.low_rank import merge_layers, new_pair, reduce_rank, split_layer, split_layers
from entprune.models import build_model
from entprune.plan import GroupPlan, PruningPlan, compose_plans
from entprune.pruning import certify_result
from entprune.rank_choice import RankChoice, missed_variance
from entprune.stages import ImageSet, Network, analyse
from entprune.training import TrainConfig, train

CONFIG = PruneConfig(calibration_samples=512, min_rows=2000, low_rank=True)


def regression(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated rows (t, d), weight (m, d) and bias (m,)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=generator) * torch.linspace(2, 0.05, 12)
    rows = torch.randn(400, 12, generator=generator) @ mixing + 3.0
    return rows, torch.randn(9, 12, generator=generator), torch.randn(9, generator=generator)


def error(rows: Tensor, weight: Tensor, bias: Tensor, answers: Tensor, gain: Tensor) -> float:
    return float((((rows @ weight.T + bias - answers) * gain) ** 2).sum(1).mean())


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_reduced_weights_miss_the_trailing_variance_and_no_more(rank: int) -> None:
    rows, weight, bias = regression()
    gain = torch.linspace(0.2, 3.0, 9)
    answers = rows @ weight.T + bias
    reduced, shift = reduce_rank(weight, bias, rows.split(150), gain, rank)
    assert torch.linalg.matrix_rank(reduced.double(), rtol=1e-4) == rank
    weighted = (answers - answers.mean(0)).double() * gain
    trailing = torch.linalg.eigvalsh(weighted.T @ weighted / len(rows))[: 9 - rank].sum()
    assert error(rows, reduced, shift, answers, gain) == pytest.approx(float(trailing), rel=1e-3)
    torch.testing.assert_close((rows @ reduced.T + shift).mean(0), answers.mean(0), rtol=1e-4, atol=1e-4)


def test_reduced_weights_are_better_than_the_weights_own_leading_directions() -> None:
    rows, weight, bias = regression()
    answers, gain = rows @ weight.T + bias, torch.ones(9)
    reduced, shift = reduce_rank(weight, bias, [rows], gain, 3)
    left, sizes, right = torch.linalg.svd(weight)
    plain = left[:, :3] @ torch.diag(sizes[:3]) @ right[:3]
    plain_shift = answers.mean(0) - plain @ rows.mean(0)
    assert error(rows, reduced, shift, answers, gain) < 0.5 * error(rows, plain, plain_shift, answers, gain)


def test_an_output_that_counts_little_is_given_up_first() -> None:
    rows, weight, bias = regression()
    answers, gain = rows @ weight.T + bias, torch.ones(9)
    gain[0] = 1e-6
    reduced, shift = reduce_rank(weight, bias, [rows], gain, 8)
    missed = ((rows @ reduced.T + shift - answers) ** 2).mean(0)
    assert bool(reduced.isfinite().all())
    assert float(missed[1:].max()) < 1e-3 * float(answers[:, 1:].var(0).min())


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(7, 5), (3, 7)),
    "linear without bias": (nn.Linear(7, 5, bias=False), (3, 7)),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 8, 8)),
    "strided": (nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), bias=False), (2, 4, 9, 9)),
    "dilated": (nn.Conv2d(4, 6, 3, padding="same", dilation=2, padding_mode="circular"), (2, 4, 8, 8)),
    "pointwise": (nn.Conv2d(4, 6, 1, stride=2), (2, 4, 8, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_two_layers_answer_like_one_of_their_rank_and_become_it_again(name: str) -> None:
    layer, shape = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1]
    weight = layer.get_parameter("weight")
    left, sizes, right = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
    with torch.no_grad():
        weight.copy_((left[:, :2] * sizes[:2] @ right[:2]).reshape(weight.shape))
    images = torch.randn(shape)
    network = nn.Sequential(copy.deepcopy(layer)).eval()
    split_layers(network, {"0": 2})
    inner, outer = network.get_parameter("0.reduce.weight"), network.get_parameter("0.expand.weight")
    assert (len(inner), outer.shape[1]) == (2, 2)
    torch.testing.assert_close(network(images), layer(images), rtol=1e-4, atol=1e-5)
    network = merge_layers(network, {"0": 2})
    assert type(network[0]) is type(layer)
    torch.testing.assert_close(network[0].get_parameter("weight"), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network(images), layer(images), rtol=1e-4, atol=1e-5)
    assert not network[0].training


def test_grouped_convolutions_are_not_split() -> None:
    with pytest.raises(ModelError, match="convolution in one group, got Conv2d"):
        split_layer(nn.Conv2d(4, 4, 3, groups=4), 1)


def test_weights_of_a_higher_rank_are_not_cut_short() -> None:
    with pytest.raises(ModelError, match="expected weights of rank 2, got others"):
        split_layer(nn.Linear(7, 5), 2)


def test_without_an_intercept_the_mean_counts() -> None:
    rows, weight, _ = regression()
    none, gain = torch.zeros(9), torch.ones(9)
    answers = rows @ weight.T
    found = {
        flag: error(rows, reduce_rank(weight, none, [rows], gain, 2, intercept=flag)[0], none, answers, gain)
        for flag in (True, False)
    }
    assert found[False] < 0.8 * found[True]


def test_missed_variance_is_what_the_leading_directions_leave() -> None:
    missed = missed_variance(np.diag([1.0, 5.0, 4.0]))
    np.testing.assert_allclose(missed, [1.0, 0.5, 0.1, 0.0], atol=1e-12)
    assert not missed_variance(np.zeros((2, 2))).any()


# --- ranks at a price -------------------------------------------------------------------------------------------------


class Correlated(nn.Module):
    """Its second convolution has 24 outputs that are mixtures of three."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Linear(24, 10)
        mixture = torch.randn(24, 3, generator=generator) @ torch.randn(3, 144, generator=generator)
        with torch.no_grad():
            self.second.weight.copy_(mixture.reshape(24, 16, 3, 3) / 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(x))))
        logits: Tensor = self.head(hidden.mean((2, 3)))
        return logits


def rank_chooser(**changes: Any) -> tuple[RankChoice, PruningPlan]:
    torch.manual_seed(0)
    network = analyse(Correlated().eval(), (1, 8, 8), CONFIG)
    outputs: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            outputs[name] = np.cov(output.detach().transpose(1, -1).reshape(-1, output.shape[1]).double().numpy().T)

        return hook

    for name in ("first", "second", "head"):
        network.model.get_submodule(name).register_forward_hook(keep(name))
    network.model(torch.randn(32, 1, 8, 8))
    groups = tuple(
        GroupPlan(name=group.name, num_channels=group.num_channels, kept_channels=tuple(range(group.num_channels)))
        for group in network.groups.groups
    )
    values = {"network": network, "covariances": outputs} | changes
    return RankChoice(**values), PruningPlan(groups=groups)


def test_nothing_is_split_for_nothing() -> None:
    choice, plan = rank_chooser()
    assert choice.complete(plan, 0.0, "parameters").ranks == ()


def test_a_small_price_finds_the_rank_that_is_there() -> None:
    choice, plan = rank_chooser()
    assert dict(choice.complete(plan, 1e-7, "parameters").ranks)["second"] == 3


def test_a_high_price_leaves_rank_one_and_only_where_two_layers_are_smaller() -> None:
    choice, plan = rank_chooser()
    ranks = dict(choice.complete(plan, 1e3, "parameters").ranks)
    assert ranks["second"] == 1
    cost, widths = choice.network.cost, plan.widths()
    for name in ranks:
        assert cost.parameters(widths, {name: 1}) < cost.parameters(widths)


def test_ranks_are_multiples_where_widths_are() -> None:
    choice, plan = rank_chooser(round_to=4)
    assert dict(choice.complete(plan, 1e-7, "parameters").ranks)["second"] == 4


def test_kept_channels_alone_count() -> None:
    choice, plan = rank_chooser()
    second = next(group for group in plan.groups if group.num_channels == 24)
    less = replace(plan, groups=tuple(replace(g, kept_channels=(0, 1)) if g is second else g for g in plan.groups))
    assert dict(choice.complete(less, 1e-7, "parameters").ranks).get("second", 2) <= 2


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A network on the digits whose two widest layers have ranks 12 and 6, as one finds them, but exactly."""
    torch.manual_seed(0)
    data, ranks = load_data("digits"), {"conv2": 12, "fc1": 6}
    model = build_model("digits_cnn", num_classes=10, input_shape=data.input_shape)
    for name, rank in ranks.items():
        new_pair(model, name, rank)
    return merge_layers(train(model, data, TrainConfig(epochs=8)).model, ranks)


def pruned(model: nn.Module, config: PruneConfig = CONFIG, **budget: float) -> entprune.PruningResult:
    data = load_data("digits")
    images = data.train.batch(np.arange(512))
    return prune(
        model, images, budget=Budget(**budget), evaluate=(images, data.train.labels[:512]), config=config,
        model_spec="digits_cnn",
    )  # fmt: skip


@pytest.mark.parametrize("budget", [{"parameters_removed": 0.93}, {"macs_removed": 0.8}])
def test_a_size_budget_is_met_with_ranks_counted(trained: nn.Module, budget: dict[str, float], tmp_path: Path) -> None:
    result = pruned(trained, **budget)
    (kind, asked), figures = next(iter(budget.items())), result.report["one_shot"]
    assert result.plan.ranks
    assert result.report["low_rank"] == [{"layer": name, "rank": rank} for name, rank in result.plan.ranks]
    assert asked <= figures[kind] < asked + 0.06  # ranks come in steps
    candidate = next(entry for entry in result.report["candidates"] if entry["chosen"])
    assert candidate["parameters"] == figures["parameters"] == count_parameters(result.model)
    assert candidate["macs"] == figures["macs"] == count_macs(result.model, (1, 8, 8))
    for objective in ("parameters", "macs"):
        by_group = sum(group[objective]["pruned"] for group in result.report["groups"])
        assert by_group + result.report["other_layers"][objective]["pruned"] == figures[objective]
    assert result.certificate.passed
    entprune.save(result, tmp_path / "small")
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(entprune.load(tmp_path / "small")(images), result.model(images))


def test_at_the_same_size_less_is_lost_than_by_channels_alone(trained: nn.Module) -> None:
    with_ranks, without = pruned(trained, parameters_removed=0.97).report["candidates"]
    assert with_ranks["validation_drop"] < without["validation_drop"]
    assert with_ranks["chosen"]


def test_channels_alone_are_chosen_where_they_lose_less(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entprune.rank_choice._LOSS_SHARE", 0.0)  # one direction of each layer, whatever it loses
    result = pruned(trained, parameters_removed=0.9)
    with_ranks, without = result.report["candidates"]
    assert with_ranks["validation_drop"] > without["validation_drop"]
    assert without["chosen"]
    assert result.plan.ranks == ()


def test_an_accuracy_budget_is_searched_with_ranks(trained: nn.Module) -> None:
    config = replace(CONFIG, drop_estimate="labels")
    sizes = {
        low_rank: pruned(trained, replace(config, low_rank=low_rank), max_accuracy_drop=3.0).report["one_shot"]
        for low_rank in (True, False)
    }
    assert sizes[True]["parameters"] < sizes[False]["parameters"]


@pytest.mark.parametrize("budget", [
    {"parameters_removed": 0.93, "macs_removed": 0.6},
    {"parameters_removed": 0.5, "macs_removed": 0.85},
    {"max_accuracy_drop": 5.0, "parameters_removed": 0.9},
    {"max_accuracy_drop": 5.0, "macs_removed": 0.8},
])  # fmt: skip
def test_several_budgets_hold_together(trained: nn.Module, budget: dict[str, float]) -> None:
    result = pruned(trained, replace(CONFIG, drop_estimate="labels"), **budget)
    assert result.report["budget_met"]
    assert result.plan.ranks
    sizes = {kind: asked for kind, asked in budget.items() if kind != "max_accuracy_drop"}
    for kind, asked in sizes.items():
        assert result.report["one_shot"][kind] >= asked
    if len(sizes) == 2:  # and no more goes than must
        assert min(result.report["one_shot"][kind] - asked for kind, asked in sizes.items()) < 0.06


def test_of_two_networks_that_lose_too_much_the_one_that_loses_less_is_given(trained: nn.Module) -> None:
    config = replace(CONFIG, drop_estimate="labels")
    report = pruned(trained, config, max_accuracy_drop=0.5, parameters_removed=0.99).report
    assert not report["budget_met"]
    bounds = [candidate["drop_upper_bound"] for candidate in report["candidates"]]
    assert len(bounds) == 2  # with ranks and without
    assert len(set(bounds)) == 2
    assert next(c for c in report["candidates"] if c["chosen"])["drop_upper_bound"] == min(bounds)


def test_latency_is_that_of_the_two_layers(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[nn.Module] = []

    def compare(dense: nn.Module, smaller: nn.Module, *_: object) -> float:
        timed.append(smaller)
        return count_macs(smaller, (1, 8, 8)) / count_macs(dense, (1, 8, 8))

    monkeypatch.setattr("entprune.latency.compare_latency", compare)
    result = pruned(trained, latency_removed=0.8)
    assert result.report["budget_met"]
    assert result.plan.ranks
    assert result.report["one_shot"]["macs_removed"] >= 0.8
    chosen = next(entry for entry in result.report["candidates"] if entry["chosen"])
    assert chosen["latency_kept"] == pytest.approx(chosen["macs"] / count_macs(trained, (1, 8, 8)))
    assert count_macs(result.model, (1, 8, 8)) in {count_macs(model, (1, 8, 8)) for model in timed}


def test_channels_alone_meet_a_latency_that_two_layers_cannot(
    trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(network: Network, plan: PruningPlan, *, batch_size: int, threads: int) -> float:
        return 2.0 if plan.ranks else network.cost.macs(plan.widths()) / network.dense_macs()

    monkeypatch.setattr("entprune.latency.measure_kept_latency", kept)
    result = pruned(trained, latency_removed=0.8)
    assert result.report["budget_met"]
    assert result.plan.ranks == ()


@pytest.mark.parametrize("part", ["reduce", "expand"])
def test_certificate_fails_if_the_two_layers_are_not_the_one(trained: nn.Module, part: str) -> None:
    result = pruned(trained, parameters_removed=0.93)
    network, data = analyse(trained, (1, 8, 8), CONFIG), load_data("digits")
    images = ImageSet(split=data.train, indices=np.arange(64))
    assert certify_result(network, result.model, result.plan, images, CONFIG).passed
    layer = result.model.get_submodule(f"{result.plan.ranks[0][0]}.{part}")
    layer.register_forward_hook(lambda _, __, output: output.roll(1, dims=-1))
    assert not certify_result(network, result.model, result.plan, images, CONFIG).passed


# --- plan and artifact ------------------------------------------------------------------------------------------------

PLAN = PruningPlan(groups=(GroupPlan(name="g", num_channels=2, kept_channels=(1,)),))
THIN = replace(PLAN, ranks=(("fc", 3),))


def test_plan_with_ranks_survives_json_and_has_a_digest_of_its_own() -> None:
    assert PruningPlan.from_dict(THIN.to_dict()) == THIN
    assert (PLAN.to_dict()["plan_version"], THIN.to_dict()["plan_version"]) == (1, 2)
    assert "ranks" not in PLAN.to_dict()
    assert THIN.digest() != PLAN.digest() != replace(PLAN, ranks=(("fc", 4),)).digest() != THIN.digest()


def test_plans_put_together_have_the_ranks_of_the_second() -> None:
    rest = PruningPlan(groups=(GroupPlan(name="g", num_channels=1, kept_channels=(0,)),))
    assert compose_plans(PLAN, replace(rest, ranks=THIN.ranks)) == THIN
    assert compose_plans(THIN, rest) == PLAN


def test_merged_network_answers_like_the_one_with_thin_layers_which_stays() -> None:
    torch.manual_seed(0)
    model = build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8)).eval()
    names, ranks = [name for name, _ in model.named_parameters()], {"conv2": 5, "fc1": 3}
    for name, rank in ranks.items():
        new_pair(model, name, rank)
    thin, images = copy.deepcopy(model), torch.randn(4, 1, 8, 8)
    one = merge_layers(model, ranks)
    assert [name for name, _ in one.named_parameters()] == names
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in thin.named_parameters()]
    with torch.inference_mode():
        torch.testing.assert_close(one(images), thin(images))


@pytest.mark.parametrize(
    ("ranks", "problem"),
    [
        ({"fc1": 0}, "layer 'fc1' has rank 0, expected 1 to 500"),
        ({"fc1": "3"}, "layer 'fc1' has rank '3'"),
        ({"relu1": 3}, "'relu1', which is recorded as one of rank 3, is no dense layer"),
        ({"nothing": 3}, "'nothing'"),
        ([3], r"ranks of layers are recorded as \[3\]"),
        ({"fc2": 3}, "is in only one of the two"),
    ],
)
def test_contradictory_ranks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: Any, problem: str
) -> None:
    network = build_model("lenet", num_classes=10, input_shape=(1, 28, 28))
    new_pair(network, "fc1", 5)
    card = ModelCard(model_spec="lenet", num_classes=10, input_shape=(1, 28, 28), mean=(), std=(), class_names=())
    save_model(network, replace(PLAN, ranks=(("fc1", 5),)), card, tmp_path / "kept")
    assert count_parameters(load_model(tmp_path / "kept")) == count_parameters(network)
    read = entprune.artifact._read_description
    monkeypatch.setattr("entprune.artifact._read_description", lambda folder: read(folder) | {"ranks": ranks})
    with pytest.raises(ArtifactError, match=problem):
        load_model(tmp_path / "kept")
