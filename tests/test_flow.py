"""The whole run: data in, smaller network out, the same plan however many workers there are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter

import entprune
from entprune.checkpoints import save_state, sha256_file
from entprune.config import Budget
from entprune.datasets import ArraySplit, ImageData, load_data, split_training
from entprune.datasets.perturbed import PerturbedSplit
from entprune.errors import CertificateError, CheckpointError, EngineError, EntpruneError, OutputError
from entprune.evaluation import predict_logits
from entprune.finetune import FinetuneConfig, finetune
from entprune.low_rank import merge_layers, new_pair
from entprune.models import build_model
from entprune.runner import InProcessRunner
from entprune.training import TrainConfig, train
from flows.parameters import PruneParameters
from flows.preflight import load_inputs
from flows.prune_model import prune_model
from flows.workers import worker_config, worker_shape
from tasks import sweeping
from tasks.cluster import connect
from tasks.progress import StageClock, report_to
from tasks.registry import load_registered
from tasks.workload import Workload, cut_out, is_worth_retrying

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


class Recorder:
    """Notes every unit that a run's workers did."""

    def __init__(self) -> None:
        self.units: list[str] = []
        self.finished_stages: list[str] = []

    def started(self, stage: str) -> None:
        """Nothing to note."""

    def advanced(self, stage: str, step: str, done: int, total: int) -> None:
        self.units.append(stage)

    def finished(self, stage: str, seconds: float, summary: str) -> None:
        self.finished_stages.append(stage)


@dataclass(frozen=True)
class Ground:
    """What all runs of this module stand on."""

    folder: Path
    data: ImageData
    model: torch.nn.Module
    checkpoint: Path

    def parameters(self, name: str, **changes: Any) -> PruneParameters:
        values = {
            "model": "digits_cnn",
            "checkpoint": self.checkpoint,
            "data": "digits",
            "max_accuracy_drop": 2.0,
            "calibration_samples": 256,
            "validation_samples": 300,
            "workers": 2,
            "output": self.folder / name,
            "cache_dir": self.folder / "cache",
            "overrides": {"min_rows": 1000, "max_rounds": 2},
        }
        return PruneParameters(**values | changes)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("flow")
    data = load_data("digits")
    model = build_model("digits_cnn", num_classes=data.num_classes, input_shape=data.input_shape)
    trained = train(model, data, TrainConfig(epochs=3)).model
    save_state(trained, folder / "dense.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        with connect(None, workers=4):  # used by every run below
            yield Ground(folder=folder, data=data, model=trained, checkpoint=folder / "dense.safetensors")


def run(parameters: PruneParameters) -> tuple[dict[str, Any], Recorder]:
    recorder = Recorder()
    with report_to(recorder):
        return prune_model(parameters), recorder


@pytest.fixture(scope="module")
def first(ground: Ground) -> tuple[dict[str, Any], Recorder]:
    return run(ground.parameters("first", register="digits"))


@pytest.fixture
def with_validation(ground: Ground, tmp_path: Path) -> str:
    """The digits with the last hundred training images as a split of their own."""
    training, test = ground.data.train, ground.data.test
    assert isinstance(training, ArraySplit)
    assert isinstance(test, ArraySplit)
    path = tmp_path / "digits.npz"
    np.savez(
        path, x_train=training.images[:-100], y_train=training.labels[:-100], x_val=training.images[-100:],
        y_val=training.labels[-100:], x_test=test.images, y_test=test.labels,
    )  # fmt: skip
    return f"npz:{path}"


def test_candidates_are_compared_on_the_validation_split_of_the_data(
    ground: Ground, with_validation: str, tmp_path: Path
) -> None:
    mean, std = ground.data.mean, ground.data.std
    changes = {"mean": mean, "std": std, "max_accuracy_drop": 5.0, "cache_dir": tmp_path / "cache"}
    report, _ = run(ground.parameters("apart", data=with_validation, **changes))
    assert report["data"]["validation_split"] == "validation"
    assert report["data"]["validation_samples"] == report["validation"]["images"] == 100
    assert report["settings"]["drop_estimate"] == "labels"
    chosen = next(entry for entry in report["candidates"] if entry["accepted"])
    assert chosen["validation_drop"] == chosen["validation_label_drop"]
    data = load_data(with_validation, mean=mean, std=std)
    assert data.validation is not None
    logits = predict_logits(ground.model.eval(), data.validation, np.arange(100), 64, "cpu")
    right = 100.0 * float((logits.argmax(1) == data.validation.labels).mean())
    assert report["validation"]["dense_accuracy"] == pytest.approx(right)


def test_fine_tuning_may_learn_from_all_training_images_where_validation_is_apart(
    ground: Ground, with_validation: str
) -> None:
    parameters = ground.parameters("workload", data=with_validation)
    work = Workload(load_inputs(parameters), parameters.config(), parameters.budget())
    assert (work.validation_split, len(work.validation), len(work.validation_indices)) == ("validation", 100, 0)
    usual_inputs = load_inputs(ground.parameters("usual"))
    usual = Workload(usual_inputs, parameters.config(), parameters.budget())
    assert (usual.validation_split, len(usual.validation), len(usual.validation_indices)) == ("train", 300, 300)
    size = Workload(usual_inputs, parameters.config(), Budget(parameters_removed=0.5))
    learns = [(each.tunes_on_validation(1), each.tunes_on_validation(2)) for each in (work, usual, size)]
    assert learns == [(False, False), (True, False), (True, True)]  # only rounds by accuracy judge tuned networks
    assert usual.config.drop_estimate == "posterior"
    assert (is_perturbed(work), is_perturbed(usual)) == (False, True)
    plain = Workload(usual_inputs, replace(usual.config, perturbed_share=0.0), parameters.budget())
    assert (is_perturbed(plain), plain.keys.validation == usual.keys.validation) == (False, False)


def test_settings_that_compare_on_other_images_share_none(ground: Ground) -> None:
    parameters = ground.parameters("images")
    inputs, usual = load_inputs(parameters), parameters.config()
    asked = [usual, replace(usual, drop_estimate="labels"), replace(usual, confidence=0.9)]
    works = sweeping.load.fn(
        lambda: [inputs] * len(asked), [(config, parameters.budget()) for config in asked], StageClock()
    )
    assert [is_perturbed(work) for work in works] == [True, False, True]
    assert works[0].validation is works[2].validation
    assert works[0].keys.validation == works[2].keys.validation != works[1].keys.validation


def is_perturbed(work: Workload) -> bool:
    return isinstance(work.validation.split, PerturbedSplit)


def plan_of(report: dict[str, Any]) -> str:
    return entprune.PruningPlan.from_dict(report["plan"]).digest()


def failed_runs() -> int:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("entprune")
    return len(client.search_runs([experiment.experiment_id], "attributes.status = 'FAILED'"))


# --- one run ----------------------------------------------------------------------------------------------------------


def test_report_is_complete_and_true(ground: Ground, first: tuple[dict[str, Any], Recorder]) -> None:
    report, _ = first
    folder = ground.folder / "first"
    assert json.loads((folder / "report.json").read_text()) == report
    assert report["certificate"]["passed"]
    assert report["one_shot"]["parameters"] < report["dense"]["parameters"]
    assert report["fine_tuned"] is None
    ((_, done),) = report["engine"]["nodes"].items()
    assert done["units"] == len(first[1].units)
    assert report["engine"]["workers"] == done["workers"] == 2
    assert report["data"]["test_samples"] == len(ground.data.test)
    lineage = report["lineage"]
    assert lineage["checkpoint_sha256"] == sha256_file(ground.checkpoint)
    assert lineage["data_sha256"] == ground.data.sha256
    assert lineage["prefect_flow_run_id"]
    assert lineage["code_version"].startswith(entprune.__version__)
    assert {"plan.json", "report.html", "report.json"} <= {path.name for path in folder.iterdir()}
    assert not [path.name for path in ground.folder.iterdir() if path.name.endswith(".partial")]


def test_every_stage_is_reported_and_timed(first: tuple[dict[str, Any], Recorder]) -> None:
    report, recorder = first
    stages = ["load", "start", "calibrate", "solve", "search", "certify", "measure"]
    assert recorder.finished_stages == [*stages, "publish"]
    assert set(report["timings_seconds"]) == {*stages, "total"}
    assert {"calibrate", "solve", "search", "measure"} == set(recorder.units)


def test_saved_network_scores_what_the_report_says(ground: Ground, first: tuple[dict[str, Any], Recorder]) -> None:
    report, _ = first
    model = entprune.load(ground.folder / "first" / "model")
    images = ground.data.test.batch(np.arange(len(ground.data.test)))
    with torch.inference_mode():
        correct = (model(images).argmax(1).numpy() == ground.data.test.labels).mean()
    assert report["one_shot"]["accuracy"] == pytest.approx(100 * correct, abs=1e-3)
    assert sum(p.numel() for p in model.parameters()) == report["one_shot"]["parameters"]


def test_registered_network_answers_as_the_saved_one(ground: Ground, first: tuple[dict[str, Any], Recorder]) -> None:
    report, _ = first
    assert report["lineage"]["registered_version"] == 1
    images = ground.data.test.batch(np.arange(5))
    registered, _ = load_registered("models:/digits@challenger")
    with torch.inference_mode():
        difference = registered(images) - entprune.load(ground.folder / "first" / "model")(images)
    assert float(difference.abs().max()) < 1e-4


def test_mlflow_run_holds_figures_lineage_and_artifacts(first: tuple[dict[str, Any], Recorder]) -> None:
    report, _ = first
    client = MlflowClient()
    tracked = client.get_run(report["lineage"]["mlflow_run_id"])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["one_shot.accuracy"] == report["one_shot"]["accuracy"]
    assert tracked.data.tags["checkpoint_sha256"] == report["lineage"]["checkpoint_sha256"]
    assert tracked.data.params["config.min_rows"] == "1000"
    names = {artifact.path for artifact in client.list_artifacts(tracked.info.run_id)}
    assert {"report.json", "report.html", "plan.json", "paths", "plots", "model"} <= names
    note = tracked.data.tags["mlflow.note.content"]
    assert f"{100 * report['one_shot']['parameters_removed']:.1f} % of the parameters" in note
    children = client.search_runs([tracked.info.experiment_id], f"tags.`mlflow.parentRunId` = '{tracked.info.run_id}'")
    assert len(children) == len(report["settings"]["settings"])


def test_page_of_the_flow_run_holds_the_short_form(first: tuple[dict[str, Any], Recorder]) -> None:
    report, _ = first
    run_id = UUID(report["lineage"]["prefect_flow_run_id"])
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id={"any_": [run_id]}))
    artifacts = {artifact.key: artifact for artifact in found}
    assert set(artifacts) >= {"digits-cnn-on-digits-result", "digits-cnn-on-digits-searching"}
    assert artifacts["digits-cnn-on-digits-searching"].data == 100.0
    table = artifacts["digits-cnn-on-digits-result"]
    accuracy = next(row for row in json.loads(str(table.data)) if row["figure"] == "test accuracy")
    assert accuracy["one shot"] == f"{report['one_shot']['accuracy']:.2f} %"
    assert report["lineage"]["mlflow_run_id"] in str(table.description)


# --- the same plan everywhere -----------------------------------------------------------------------------------------


def weights_of(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_plan_and_weights(
    ground: Ground, first: tuple[dict[str, Any], Recorder], workers: int
) -> None:
    name = f"with {workers}"
    other, recorder = run(ground.parameters(name, workers=workers, cache_dir=ground.folder / f"cache {name}"))
    assert plan_of(other) == plan_of(first[0])
    assert recorder.units == first[1].units
    assert weights_of(ground.folder / name) == weights_of(ground.folder / "first")
    for name in ("accuracy", "parameters", "macs"):
        assert other["one_shot"][name] == first[0]["one_shot"][name]


def test_library_in_process_gives_the_same_plan(ground: Ground, first: tuple[dict[str, Any], Recorder]) -> None:
    parameters = ground.parameters("first")
    calibration, validation = split_training(ground.data, calibration=256, validation=300, seed=0)
    result = entprune.prune(
        ground.model,
        cut_out(ground.data.train, calibration).split,
        budget=parameters.budget(),
        evaluate=cut_out(ground.data.train, validation).split,
        test=ground.data.test,
        config=parameters.config(),
        runner=InProcessRunner(),
    )
    assert result.plan.digest() == plan_of(first[0])
    assert result.report["one_shot"]["accuracy"] == first[0]["one_shot"]["accuracy"]


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_second_run_computes_nothing(ground: Ground, first: tuple[dict[str, Any], Recorder]) -> None:
    again, recorder = run(ground.parameters("first"))  # over the older result
    assert recorder.units == []
    assert plan_of(again) == plan_of(first[0])
    assert json.loads((ground.folder / "first" / "report.json").read_text()) == again


def test_second_budget_pays_for_its_candidate_and_for_what_was_damaged(
    ground: Ground, first: tuple[dict[str, Any], Recorder]
) -> None:
    stored = min((ground.folder / "cache" / "store" / "paths").iterdir())
    stored.write_bytes(stored.read_bytes()[:-1])
    other, recorder = run(ground.parameters("size", max_accuracy_drop=None, parameters_removed=0.5))
    assert set(recorder.units) == {"solve", "search", "measure"}
    assert recorder.units.count("solve") == recorder.units.count("search") == 1
    assert other["one_shot"]["parameters_removed"] >= 0.5
    assert stored.stat().st_size > 0


def test_fine_tuned_network_is_measured_beside_the_one_shot_one(
    ground: Ground, first: tuple[dict[str, Any], Recorder]
) -> None:
    tuned, recorder = run(ground.parameters("tuned", finetune_epochs=1))
    assert set(recorder.units) == {"finetune", "measure"}
    assert tuned["one_shot"]["accuracy"] == first[0]["one_shot"]["accuracy"]
    assert tuned["fine_tuned"]["parameters"] == tuned["one_shot"]["parameters"]
    assert tuned["certificate"]["passed"]
    saved = entprune.load(ground.folder / "tuned" / "model").state_dict()
    one_shot = entprune.load(ground.folder / "first" / "model").state_dict()
    assert any(not torch.equal(saved[name], one_shot[name]) for name in saved)
    start = entprune.load(ground.folder / "first" / "model")
    from_all = finetune(start, ground.model.eval(), ground.data.train, FinetuneConfig(epochs=1)).state_dict()
    assert all(torch.allclose(saved[name], from_all[name], rtol=1e-2, atol=1e-3) for name in saved)


@pytest.mark.parametrize("rounds", [1, 2])
def test_layers_of_low_rank_go_through_the_whole_run(ground: Ground, tmp_path: Path, rounds: int) -> None:
    torch.manual_seed(0)
    ranks = {"conv2": 12, "fc1": 6}  # which the search has to find
    dense = build_model("digits_cnn", num_classes=10, input_shape=ground.data.input_shape)
    for name, rank in ranks.items():
        new_pair(dense, name, rank)
    save_state(merge_layers(train(dense, ground.data, TrainConfig(epochs=4)).model, ranks), tmp_path / "thin.pt")
    budget = {"max_accuracy_drop": None, "parameters_removed": 0.95}
    asked = budget | {"low_rank": True, "finetune_epochs": 1, "rounds": rounds}
    parameters = ground.parameters(f"thin-{rounds}", checkpoint=tmp_path / "thin.pt", register="digits-thin", **asked)
    report, _ = run(parameters)
    assert report["low_rank"]
    assert [bool(entry["ranks"]) for entry in report["rounds"]] == ([True, True] if rounds == 2 else [])
    assert report["fine_tuned"]["parameters"] <= 0.05 * report["dense"]["parameters"]
    assert report["certificate"]["passed"]
    model = entprune.load(ground.folder / f"thin-{rounds}" / "model")
    for entry in report["low_rank"]:
        assert len(model.get_parameter(f"{entry['layer']}.reduce.weight")) == entry["rank"]
    assert sum(value.numel() for value in model.parameters()) == report["fine_tuned"]["parameters"]
    images = ground.data.test.batch(np.arange(len(ground.data.test)))
    registered, _ = load_registered("models:/digits-thin@challenger")
    with torch.inference_mode():
        torch.testing.assert_close(registered(images), model(images), rtol=1e-3, atol=1e-3)
        correct = (model(images).argmax(1).numpy() == ground.data.test.labels).mean()
    assert report["fine_tuned"]["accuracy"] == pytest.approx(100 * correct, abs=1e-3)
    page = (ground.folder / f"thin-{rounds}" / "report.html").read_text(encoding="utf-8")
    assert "Layers that became two thin ones" in page
    again, recorder = run(parameters.model_copy(update={"output": ground.folder / f"again-{rounds}", "register": None}))
    assert recorder.units == []
    assert again["plan"] == report["plan"]


def test_rounds_prune_and_tune_in_turns_and_are_resumed(ground: Ground) -> None:
    changes = {"max_accuracy_drop": None, "parameters_removed": 0.9, "finetune_epochs": 1, "rounds": 2}
    report, recorder = run(ground.parameters("rounds", **changes))
    assert recorder.finished_stages.count("finetune") == 2
    first, second = report["rounds"]
    assert first["validation_accuracy"] is second["validation_drop"] is None  # these images were learnt from
    assert (first["chosen"], second["chosen"]) == (False, True)
    assert report["one_shot"]["parameters"] == first["parameters"]
    assert report["fine_tuned"]["parameters"] == second["parameters"]
    assert 0.68 <= report["one_shot"]["parameters_removed"] < 0.9 <= report["fine_tuned"]["parameters_removed"]
    assert report["certificate"]["passed"]
    assert report["budget_met"]
    assert entprune.PruningPlan.from_dict(report["plan"]).widths() == second["widths"]
    saved = entprune.load(ground.folder / "rounds" / "model")
    assert sum(parameter.numel() for parameter in saved.parameters()) == second["parameters"]
    again, recorder = run(ground.parameters("rounds", **changes))
    assert recorder.units == []
    assert again["plan"] == report["plan"]


# --- failing ----------------------------------------------------------------------------------------------------------


def test_failed_certificate_leaves_nothing_and_fails_the_tracked_run(
    ground: Ground, first: tuple[dict[str, Any], Recorder]
) -> None:
    before = failed_runs()
    overrides = {"min_rows": 1000, "max_rounds": 2, "certificate_tolerance": -1.0}
    with pytest.raises(CertificateError, match="differs from the masked full-size one"):
        run(ground.parameters("uncertain", overrides=overrides, register="uncertain"))
    assert not (ground.folder / "uncertain").exists()
    assert failed_runs() == before + 1
    assert not MlflowClient().search_registered_models("name = 'uncertain'")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"checkpoint": Path("nowhere.pt")}, CheckpointError, "nowhere.pt"),
        ({"workers": 500}, EngineError, r"asked for 500 worker\(s\)"),
        ({"device": "cpu", "gpus_per_worker": 4.0}, EngineError, "4 GPU"),
    ],
)
def test_unusable_input_ends_in_one_sentence(
    ground: Ground, changes: dict[str, Any], error: type[EntpruneError], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(ground.parameters("unusable", **changes))
    assert not (ground.folder / "unusable").exists()


def test_foreign_folder_is_not_replaced(ground: Ground) -> None:
    folder = ground.folder / "foreign"
    folder.mkdir()
    (folder / "thesis.txt").touch()
    with pytest.raises(OutputError, match="other files"):
        run(ground.parameters("foreign"))
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


# --- what a worker gets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "asked", "gpus"), [("cpu", 0.0, 0.0), ("cuda", 0.0, 1.0), ("cuda:1", 0.5, 0.5), ("cpu", 1.0, 1.0)]
)
def test_worker_on_a_gpu_gets_one(ground: Ground, device: str, asked: float, gpus: float) -> None:
    parameters = ground.parameters("any", device=device, gpus_per_worker=asked)
    assert worker_shape(parameters).gpus == gpus
    assert worker_config(parameters).device == device.partition(":")[0]


def test_only_failures_of_unknown_cause_are_tried_again() -> None:
    class State:
        def __init__(self, data: Any) -> None:
            self.data = data

    assert is_worth_retrying(None, None, State(RuntimeError("flaky")))
    assert not is_worth_retrying(None, None, State(CertificateError("certain")))
