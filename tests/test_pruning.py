"""The whole job in process: a real network on real digits, within a real budget, with its evidence."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from entprune import Budget, PathSetting, PruneConfig, PruningResult, prune
from entprune.datasets import ArraySplit, ImageData, load_data, split_training
from entprune.datasets.perturbed import perturb_share
from entprune.errors import DataError, ModelError
from entprune.evaluation import accuracy, count_macs, count_parameters, predict_correct
from entprune.models import build_model
from entprune.pruning import as_split
from entprune.runner import InProcessRunner

CONFIG = PruneConfig(
    calibration_samples=256,
    min_rows=1000,
    rows_per_feature=1.0,
    settings=(PathSetting(l2_growth=8.0, max_drop=0.5),),
    max_rounds=3,
)
TOLERANCE = 3.0  # accuracy points

TOP_LEVEL = {
    "schema_version", "model", "data", "seed", "dense", "one_shot", "fine_tuned", "certificate", "groups", "settings",
    "timings_seconds", "lineage", "environment",
}  # fmt: skip
FIGURES = {"accuracy", "parameters", "macs", "latency_ms"}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network, and images that it has and has not seen."""

    model: nn.Module
    data: ImageData
    calibration: ArraySplit
    validation: ArraySplit


@pytest.fixture(scope="module")
def trained() -> Trained:
    torch.manual_seed(0)
    data = load_data("digits")
    model = build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8))
    seen, held_out = split_training(data, calibration=10_000, validation=300, seed=0)
    seen = np.setdiff1d(np.arange(len(data.train)), held_out)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(3):
        for part in np.array_split(np.random.default_rng(0).permutation(seen), len(seen) // 64):
            loss = nn.functional.cross_entropy(model(data.train.batch(part)), torch.from_numpy(data.train.labels[part]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    parts = [subset(data, indices) for indices in (seen, held_out)]
    return Trained(model=model.eval(), data=data, calibration=parts[0], validation=parts[1])


def subset(data: ImageData, indices: np.ndarray) -> ArraySplit:
    images = data.train.batch(indices).numpy()
    return ArraySplit(images=images, labels=data.train.labels[indices], mean=(0.0,), std=(1.0,))


@dataclass(frozen=True, kw_only=True)
class Spy:
    """A split that writes down when it is read, between the stages of the run."""

    split: Any
    log: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> np.ndarray:
        self.log.append("labels")
        return np.asarray(self.split.labels)

    def batch(self, indices: np.ndarray) -> Tensor:
        self.log.append("batch")
        return self.split.batch(indices)

    def progress(self, stage: str, done: int, total: int) -> None:
        self.log.append(stage)


@pytest.fixture(scope="module")
def spy(trained: Trained) -> Spy:
    return Spy(split=trained.data.test)


@pytest.fixture(scope="module")
def result(trained: Trained, spy: Spy) -> PruningResult:
    return prune(
        trained.model, trained.calibration, budget=Budget(max_accuracy_drop=TOLERANCE), evaluate=trained.validation,
        test=spy, config=CONFIG, progress=spy.progress, model_spec="digits_cnn",
    )  # fmt: skip


# --- an accuracy budget ----------------------------------------------------------------------------------------------


def test_network_becomes_much_smaller_within_the_budget(trained: Trained, result: PruningResult) -> None:
    dense, pruned = (accuracy(model, trained.validation) for model in (trained.model, result.model))
    assert dense > 90.0
    assert result.report["budget_met"]
    assert dense - pruned <= TOLERANCE
    assert result.report["one_shot"]["parameters_removed"] > 0.5
    assert result.certificate.passed


def test_report_has_every_field_of_the_schema(result: PruningResult) -> None:
    report = result.report
    assert set(report) >= TOP_LEVEL
    assert report["schema_version"] == 1
    assert set(report["dense"]) >= FIGURES
    assert FIGURES | {"accuracy_drop", "parameters_removed", "macs_removed"} <= set(report["one_shot"])
    assert report["fine_tuned"] is None
    for figures in (report["dense"], report["one_shot"]):
        assert set(figures["latency_ms"]) == {"1", "64"}
        assert min(figures["latency_ms"].values()) > 0
    assert {"max_abs_difference", "tolerance", "passed"} <= set(report["certificate"])
    wanted = {"name", "channels", "kept", "reconstruction_error", "entropy", "effective_channels", "note"}
    assert all(wanted <= set(entry) for entry in report["groups"])
    assert report["timings_seconds"]["total"] >= max(v for k, v in report["timings_seconds"].items() if k != "total")
    assert json.loads(json.dumps(report, allow_nan=False)) is not None


def test_report_tells_the_truth(trained: Trained, result: PruningResult) -> None:
    dense, one_shot = result.report["dense"], result.report["one_shot"]
    for figures, model in ((dense, trained.model), (one_shot, result.model)):
        assert figures["parameters"] == count_parameters(model)
        assert figures["macs"] == count_macs(model, (1, 8, 8))
        assert figures["accuracy"] == pytest.approx(accuracy(model, trained.data.test), abs=1e-3)
    assert one_shot["accuracy_drop"] == pytest.approx(dense["accuracy"] - one_shot["accuracy"], abs=1e-3)
    lost, won = (
        np.mean(predict_correct(better, trained.data.test) & ~predict_correct(worse, trained.data.test))
        for better, worse in ((trained.model, result.model), (result.model, trained.model))
    )
    reach = 196 * ((lost + won - (lost - won) ** 2) / len(trained.data.test)) ** 0.5
    assert one_shot["accuracy_drop_interval"]["low"] == pytest.approx(one_shot["accuracy_drop"] - reach, abs=0.2)
    assert one_shot["accuracy_drop_interval"]["high"] == pytest.approx(one_shot["accuracy_drop"] + reach, abs=0.2)
    assert one_shot["parameters_removed"] == pytest.approx(1 - one_shot["parameters"] / dense["parameters"])
    widths = result.plan.widths()
    assert [(entry["name"], entry["kept"]) for entry in result.report["groups"]] == list(widths.items())
    for objective in ("parameters", "macs"):
        parts = [*result.report["groups"], result.report["other_layers"]]
        for stage, figures in (("dense", "dense"), ("pruned", "one_shot")):
            assert sum(part[objective][stage] for part in parts) == result.report[figures][objective]
    for entry in result.report["groups"]:
        assert len(entry["channel_probability"]) == entry["channels"]
        assert sum(entry["channel_probability"]) == pytest.approx(1.0, abs=1e-2)
        assert 0 <= entry["entropy"] <= np.log(entry["channels"])
        assert 1 <= entry["effective_channels"] <= entry["channels"]
        assert 0 <= entry["reconstruction_error"] <= 1
    (chosen,) = {c["parameters"] for c in result.report["candidates"] if c["chosen"]}
    assert chosen == one_shot["parameters"]
    compared = perturb_share(trained.validation, np.arange(len(trained.validation)), 0.25, seed=0)
    assert result.report["validation"]["dense_accuracy"] == pytest.approx(accuracy(trained.model, compared), abs=1e-3)
    assert result.report["settings"]["perturbed_share"] == 0.25


def test_plan_is_what_the_network_is(trained: Trained, result: PruningResult) -> None:
    for name, width in result.plan.widths().items():
        assert len(result.model.get_parameter(f"{name}.weight")) == width
        assert result.paths[name].num_channels == len(trained.model.get_parameter(f"{name}.weight"))
        assert set(result.plan.kept(name)) == set(result.paths[name].kept(width))
    assert not result.model.training


def test_test_images_are_read_only_after_everything_is_decided(result: PruningResult, spy: Spy) -> None:
    log = spy.log[spy.log.index("calibrate") :]
    reads = [number for number, entry in enumerate(log) if entry in {"batch", "labels"}]
    decisions = [number for number, entry in enumerate(log) if entry.startswith("search")]
    assert "batch" not in spy.log[: spy.log.index("calibrate")]
    assert min(reads) > max(decisions)
    assert {log[number] for number in reads} == {"batch", "labels"}


def test_neither_test_images_nor_a_second_worker_change_the_choice(trained: Trained, result: PruningResult) -> None:
    again = pruned(trained, runner=InProcessRunner(workers=2))
    assert again.plan.digest() == result.plan.digest()
    other = again.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in result.model.state_dict().items())
    assert [c["widths"] for c in again.report["candidates"]] == [c["widths"] for c in result.report["candidates"]]
    assert again.report["dense"]["accuracy"] is again.report["one_shot"]["accuracy_drop"] is None
    assert again.report["one_shot"]["accuracy_drop_interval"] is None
    assert json.dumps(again.report, allow_nan=False)


def pruned(trained: Trained, **options: Any) -> PruningResult:
    arguments: dict[str, Any] = {
        "budget": Budget(max_accuracy_drop=TOLERANCE), "evaluate": trained.validation, "config": CONFIG,
    } | options  # fmt: skip
    return prune(trained.model, trained.calibration, **arguments)


def test_scoring_in_bfloat16_touches_no_weight(trained: Trained) -> None:
    budget = Budget(parameters_removed=0.5)
    exact, fast = (
        pruned(trained, budget=budget, config=replace(CONFIG, scoring_precision=precision))
        for precision in ("float32", "bfloat16")
    )
    assert fast.certificate.passed
    for name, value in fast.model.state_dict().items():
        assert torch.equal(value, exact.model.state_dict()[name])
        assert value.is_contiguous()


def test_impossible_budget_says_so_and_still_gives_a_certified_network(trained: Trained) -> None:
    strict = replace(CONFIG, max_rounds=1, candidates_per_round=1, drop_estimate="labels")
    shuffled = replace(
        trained.validation, labels=trained.model(trained.validation.batch(np.arange(300))).argmax(1).numpy()
    )
    found = pruned(
        trained, budget=Budget(max_accuracy_drop=0.0), evaluate=shuffled, config=strict
    )  # the dense net is perfect
    assert found.report["budget_met"] is False
    assert not any(candidate["accepted"] for candidate in found.report["candidates"])
    assert found.certificate.passed
    assert found.report["warnings"]


# --- a size budget ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "removed"), [("parameters_removed", 0.8), ("macs_removed", 0.6)])
def test_size_budget_needs_no_labels_and_is_respected(trained: Trained, kind: str, removed: float) -> None:
    images = [trained.calibration.batch(np.arange(start, start + 50)) for start in (0, 50)]
    before = copy.deepcopy(trained.model.state_dict())
    config = replace(CONFIG, min_rows=500)
    found = prune(trained.model, images, budget=Budget(**{kind: removed}), config=config)
    assert found.report["one_shot"][kind] >= removed
    assert found.report["budget"] == {kind: removed}
    assert found.report["budget_met"]
    assert found.report["data"]["calibration_samples"] == 100
    assert found.certificate.passed
    assert all(torch.equal(value, before[name]) for name, value in trained.model.state_dict().items())
    assert accuracy(found.model, trained.data.test) > 60.0


# --- bad input -------------------------------------------------------------------------------------------------------

PIXELS = np.zeros((4, 1, 8, 8), dtype=np.float32)


def test_protected_layers_keep_their_bits_though_everything_before_them_changes(trained: Trained) -> None:
    config = PruneConfig(keep=("fc1",), min_rows=500, calibration_samples=256)
    found = prune(trained.model, trained.calibration, budget=Budget(parameters_removed=0.02), config=config)
    before, after = trained.model.state_dict(), found.model.state_dict()
    assert torch.equal(before["fc1.weight"], after["fc1.weight"])
    assert torch.equal(before["fc1.bias"], after["fc1.bias"])
    assert before["conv2.weight"].shape[1] > after["conv2.weight"].shape[1]
    assert [group.name for group in found.plan.groups] == ["conv1"]
    with pytest.raises(ModelError, match="nothing in this network can be pruned"):
        prune(
            trained.model,
            trained.calibration,
            budget=Budget(parameters_removed=0.1),
            config=replace(config, keep=("*",)),
        )


def test_floor_and_rounding_shape_every_width(trained: Trained) -> None:
    config = PruneConfig(minimum_fraction=0.4, round_to=8, min_rows=500, calibration_samples=256)
    found = prune(trained.model, trained.calibration, budget=Budget(parameters_removed=0.5), config=config)
    for group in found.plan.groups:
        width = len(group.kept_channels)
        assert width >= 0.4 * group.num_channels
        assert width % 8 == 0


def test_accuracy_budget_without_labels_is_explained() -> None:
    with pytest.raises(DataError, match="an accuracy budget needs labelled images"):
        prune(nn.Identity(), PIXELS, budget=Budget(max_accuracy_drop=1.0))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PIXELS[0], r"expected images of shape \(n, C, H, W\), got \(1, 8, 8\)"),
        (PIXELS[:0], r"expected images of shape .* got \(0, 1, 8, 8\)"),
        (np.full_like(PIXELS, np.nan), "expected finite images, got NaN or infinity"),
        ((PIXELS, np.zeros(3)), r"expected one label per image, got \(3,\) labels for 4 images"),
        ([], "expected at least one batch of images, got none"),
    ],
)
def test_unusable_images_are_explained(images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prune(nn.Identity(), images, budget=Budget(parameters_removed=0.5))


def test_unusable_test_images_are_refused_before_any_work() -> None:
    dark = np.full_like(PIXELS, -np.inf)
    with pytest.raises(DataError, match="expected finite images"):
        prune(nn.Identity(), PIXELS, budget=Budget(parameters_removed=0.5), test=(dark, np.zeros(4)))


def test_network_without_anything_to_prune_is_explained() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(
        ModelError, match=r"nothing in this network can be pruned \(1: its outputs are the network's outputs\)"
    ):
        prune(model, PIXELS, budget=Budget(parameters_removed=0.5))


def test_weights_that_are_not_finite_are_explained(trained: Trained) -> None:
    broken = copy.deepcopy(trained.model)
    broken.get_parameter("fc2.bias").data[0] = torch.nan
    with pytest.raises(ModelError, match=r"expected finite weights, got NaN or infinity in 'fc2.bias'"):
        prune(broken, trained.calibration, budget=Budget(parameters_removed=0.5), config=CONFIG)


# --- images of every kind --------------------------------------------------------------------------------------------


def loader(with_labels: bool) -> Iterator[Any]:
    for start in (0, 3):
        images = torch.arange(start, start + 3).float().reshape(3, 1, 1, 1)
        yield [images, torch.tensor([start, start + 1, start + 2])] if with_labels else images


def test_loader_of_pairs_gives_images_and_labels() -> None:
    split = as_split(loader(with_labels=True), labelled=True)
    assert split.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert split.batch(np.array([4, 1])).ravel().tolist() == [4.0, 1.0]


def test_labels_are_not_looked_at_where_they_are_not_needed() -> None:
    targets = [{"boxes": []}] * 3
    split = as_split([(torch.zeros(3, 1, 2, 2), targets)])
    assert len(split) == 3


@pytest.mark.parametrize("images", [PIXELS, torch.zeros(4, 1, 8, 8), [torch.zeros(2, 1, 8, 8)] * 2])
def test_missing_labels_are_not_invented(images: Any) -> None:
    assert len(as_split(images)) == 4
    with pytest.raises(DataError, match="expected labelled images, got images alone"):
        as_split(images, labelled=True)


def test_split_is_taken_as_it_is(trained: Trained) -> None:
    assert as_split(trained.data.test, labelled=True) is trained.data.test
