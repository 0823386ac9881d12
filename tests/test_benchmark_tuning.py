"""The benchmark's trainings: rounds, kept networks, killed tunings, longer trainings, and everyone tuned alike."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from entprune.checkpoints import load_checkpoint, sha256_file
from entprune.config import Budget, PruneConfig
from entprune.datasets import load_data
from entprune.errors import ConfigError
from entprune.evaluation import accuracy, count_parameters
from entprune.finetune import FinetuneConfig, finetune
from entprune.models import build_model
from entprune.pruning import PruningResult
from entprune.resumption import TrainingState
from entprune.training import TrainConfig

pytest.importorskip("torch_pruning", reason="the benchmark's peers are development dependencies")
pytest.importorskip("sklearn", reason="the benchmark's peers are development dependencies")

from infra.benchmark import at_once, budgets, contest, dense, recovery, tuned
from infra.benchmark.networks import Bench, Folders, TrainedNetwork
from infra.benchmark.outcomes import unpack_outcomes
from infra.benchmark.parts import Part, Request
from infra.benchmark.pruned import PrunedNetwork, pruned_network
from infra.benchmark.records import Record, Subject, all_records
from infra.benchmark.selectors import METHODS
from tests.benchmark_requests import ENTRY, TINY_RECIPE, TinyRequest, tiny_request


@pytest.fixture(scope="module")
def request_chain() -> TinyRequest:
    return tiny_request()


def test_a_pruned_network_is_kept_for_another_machine_to_tune(tmp_path: Path) -> None:
    data, budget = load_data("digits"), Budget(parameters_removed=0.5)
    model = build_model("digits_cnn", num_classes=10, input_shape=data.input_shape)
    config = PruneConfig(calibration_samples=192, validation_samples=200, min_rows=500)
    bench = Bench(replace(ENTRY, model="digits_cnn"), model.eval(), data, config, "c")
    first = pruned_network(bench, budget, tmp_path)
    again = pruned_network(bench, budget, tmp_path)
    assert again is not first
    assert (again.dense, again.one_shot, again.seconds) == (first.dense, first.one_shot, first.seconds)
    images = data.test.batch(np.arange(8))
    assert torch.equal(again.model(images), first.model(images))
    (figures,) = tmp_path.glob("*.json")
    content = json.loads(figures.read_text(encoding="utf-8"))
    figures.write_text(json.dumps({name: value for name, value in content.items() if name != "ranks"}))
    with pytest.raises(ConfigError, match="one of an earlier version; delete the folder"):
        pruned_network(bench, budget, tmp_path)
    figures.write_text(json.dumps(content))
    bench.facts["checkpoint_sha256"] = "another"
    with pytest.raises(ConfigError, match="expected one made from the checkpoint and images given"):
        pruned_network(bench, budget, tmp_path)


@pytest.mark.parametrize("low_rank", [False, True])
def test_each_round_prunes_what_the_one_before_tuned(
    request_chain: TinyRequest, monkeypatch: pytest.MonkeyPatch, low_rank: bool
) -> None:
    recipe = replace(TINY_RECIPE, rounds=2, low_rank=low_rank)
    assert recipe.first_budget().parameters_removed == pytest.approx(1 - 0.5**0.5)
    assert recipe.key() == TINY_RECIPE.key() | {"rounds": 2} | ({"low_rank": True} if low_rank else {})
    pruned: list[nn.Module] = []
    came_of: list[nn.Module] = []

    def prune_again(bench: Bench, budget: Budget, *, model: nn.Module) -> PruningResult:
        images = torch.randn(2, *bench.data.input_shape)
        torch.testing.assert_close(model(images), came_of[-1](images))
        assert list(model.state_dict()) == list(bench.model.state_dict())  # thin layers are one again
        return budgets.prune_to(bench, budget, model=model)

    def tune(student: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        pruned.append(student)
        came_of.append(finetune(student, *arguments, **options))
        return came_of[-1]

    monkeypatch.setattr(tuned, "prune_to", prune_again)
    monkeypatch.setattr(tuned, "finetune", tune)
    subject = Subject(part="tuned", network="chain", seed=0)
    values = tuned.TunedMeter(request_chain, (recipe,)).measure(subject, recipe.key())
    first, last = (count_parameters(network) for network in pruned)
    assert first > last == values["parameters"]
    assert 0.5 <= values["parameters_removed"] < 0.6


def test_killed_tuning_goes_on_after_its_last_epoch(
    request_chain: TinyRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(TINY_RECIPE, tuning=replace(TINY_RECIPE.tuning, epochs=3))
    subject, bench, networks = Subject(part="tuned", network="chain", seed=0), request_chain.bench(), []
    start = budgets.prune_to(bench, recipe.budget)
    kept = PrunedNetwork(model=start.model, dense=start.report["dense"], one_shot=start.report["one_shot"], seconds=1.0)
    monkeypatch.setattr(tuned, "pruned_network", lambda *_: kept)
    monkeypatch.setattr(bench, "accuracy", lambda model: networks.append(model) or 50.0)
    monkeypatch.setattr(TinyRequest, "bench", lambda *_: bench)
    tuned.TunedMeter(request_chain, (recipe,)).measure(subject, recipe.key())
    resumable = tuned.TunedMeter(replace(request_chain, pruned=tmp_path), (recipe,))
    save, epochs = tuned.save_training, []

    def save_and_die(state: TrainingState, place: Path) -> None:
        save(state, place)
        epochs.append(state.epoch)
        if epochs == [1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuned, "save_training", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        resumable.measure(subject, recipe.key())
    assert list(tmp_path.iterdir())
    values = resumable.measure(subject, recipe.key())
    assert epochs == [1, 2, 3]
    assert values["epoch_seconds"] > 0
    undisturbed, resumed = (network.state_dict() for network in networks)
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())
    assert not list(tmp_path.iterdir())


def test_a_longer_training_stores_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = TrainedNetwork(
        name="digits_long", model="digits_cnn", checkpoint="long.pt", data="digits", parameters_removed=(),
        macs_removed=(),
    )  # fmt: skip
    monkeypatch.setattr(dense, "find_network", lambda _: entry)
    monkeypatch.setattr(dense, "RECIPE", TrainConfig(epochs=4))
    request = Request(network="digits_long", seed=1, threads=1, folders=Folders(data=tmp_path, checkpoints=tmp_path))
    ((subject, key),) = dense.cells(request)
    values = dense.DenseMeter(request).measure(subject, key)
    data = load_data("digits")
    model = build_model("digits_cnn", num_classes=10, input_shape=data.input_shape)
    stored = load_checkpoint(model, tmp_path / "long.pt")
    assert values["accuracy"] == accuracy(stored, data.test) > 90
    assert values["checkpoint_sha256"] == sha256_file(tmp_path / "long.pt")
    assert torch.load(tmp_path / "long.pt", weights_only=True)["conv1.weight"].dtype == torch.float16


class FakeMeter:
    """Trains nothing; a tuned network needs the one that another job trains."""

    def __init__(self, request: Request) -> None:
        self._file = request.folders.checkpoints / f"{request.network}.pt"

    def facts(self, record: Record) -> dict[str, str]:
        return {}

    def measure(self, subject: Subject, key: dict) -> dict[str, int]:
        if subject.part == "dense":
            time.sleep(0.3)
            self._file.touch()
        elif not self._file.exists():
            raise ConfigError("it came too early.")
        return {"seed": subject.seed}


def test_trainings_at_once_wait_for_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = {
        name: Part(
            name=name, networks=("vgg16_cifar_long", "resnet18_cifar"), threads=1, meter=FakeMeter,
            cells=lambda request, name=name: [(Subject(part=name, network=request.network, seed=request.seed), {})],
        )
        for name in ("dense", "tuned")
    }  # fmt: skip
    monkeypatch.setattr(at_once, "_PARTS", fakes)
    arguments = ["--device", "cpu", "--checkpoints", str(tmp_path), "--results", str(tmp_path / "results")]
    jobs = ["tuned:vgg16_cifar_long:1", "tuned:vgg16_cifar_long:2", "dense:vgg16_cifar_long:0"]
    assert at_once.main([*jobs, *arguments]) == 0
    assert [record["cells"][0]["values"]["seed"] for record in all_records("tuned", tmp_path / "results")] == [1, 2]
    assert at_once.main(["tuned:resnet18_cifar:0", *arguments]) == 1
    for job in ("sorted:resnet18_cifar:0", "dense:lenet:0", "dense:resnet18_cifar", "dense:resnet18_cifar:first"):
        assert at_once.main([job, *arguments]) == 2


def test_tuned_network_is_that_of_the_library_and_learnt_from_all_training_images(
    request_chain: TinyRequest,
) -> None:
    key, bench = TINY_RECIPE.key(), request_chain.bench()
    assert key == {
        "budget": "parameters_removed-0.5", "epochs": 1, "learning_rate": 0.1, "distillation_weight": 0.5,
        "clip_norm": 5.0, "images": "all",
    }  # fmt: skip
    meter = tuned.TunedMeter(request_chain, (TINY_RECIPE,))
    values = meter.measure(Subject(part="tuned", network="chain", seed=0), key)
    pruned = budgets.prune_to(bench, TINY_RECIPE.budget)
    tuned_network = finetune(pruned.model, bench.model, bench.data.train, TINY_RECIPE.tuning)
    assert values["one_shot_accuracy"] == pruned.report["one_shot"]["accuracy"]
    assert values["tuned_accuracy"] == bench.accuracy(tuned_network)
    assert values["parameters"] == sum(value.numel() for value in tuned_network.parameters())
    assert values["parameters_removed"] >= 0.5


def test_methods_are_tuned_alike_and_equal_networks_once(
    request_chain: TinyRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    tune = recovery.finetune
    monkeypatch.setattr(recovery, "finetune", lambda *args, **options: calls.append(1) or tune(*args, **options))
    recipe = FinetuneConfig(epochs=1, learning_rate=0.1)
    meter = recovery.RecoveryMeter(request_chain, recipe)
    subject = Subject(part="recovery", network="chain", seed=0, budget="parameters_removed-0.5")
    assert meter.facts(Record(subject.path(tmp_path), subject))["dense"]["parameters"] > 0
    found = {
        (*start, method): meter.measure(subject, {"method": method, "weights": start[0], "widths": start[1]})
        for start in recovery.STARTS
        for method in METHODS
    }
    assert len(calls) == len({(place[0], values["plan_sha256"]) for place, values in found.items()}) < len(found)
    bench, values = request_chain.bench(), found["plain", "uniform", "l1"]
    sliced = contest.Contest(bench)
    start = sliced.build(sliced.plan("l1", subject.budget, "uniform"), refit=False)
    excluded = bench.validation.indices
    after = finetune(start, bench.model, bench.data.train, recipe, validation_indices=excluded)
    assert values["one_shot_accuracy"] == bench.accuracy(start)
    assert values["tuned_accuracy"] == bench.accuracy(after)
    assert 100 * np.mean(~unpack_outcomes(values["tuned_wrong"], 200)) == pytest.approx(values["tuned_accuracy"])
