"""A whole sweep: shared work once, the same answer on any number of workers, one chosen network with its evidence."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch import nn

import entprune
from entprune.checkpoints import save_state
from entprune.datasets import ImageData, load_data, split_training
from entprune.errors import OutputError
from entprune.low_rank import merge_layers, new_pair
from entprune.models import build_model
from entprune.training import TrainConfig, train
from flows.recording import record_again
from flows.sweep import sweep
from flows.sweep_inputs import preflight_sweep
from flows.sweep_parameters import SweepParameters, parse_sweep
from tasks.cluster import connect
from tasks.progress import report_to
from tasks.workload import cut_out
from tests.test_flow import Recorder

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

GRID = {"entropy_weight": [0.0, 1.0], "loss_exponent": [0.5, 1.0], "calibration_samples": [128, 256]}


@dataclass(frozen=True)
class Ground:
    """What all sweeps of this module stand on."""

    folder: Path
    data: ImageData
    model: nn.Module

    def parameters(self, name: str, *, cache: str = "cache", workers: int = 2, **changes: Any) -> SweepParameters:
        base = {
            "model": "digits_cnn",
            "checkpoint": str(self.folder / "dense.safetensors"),
            "data": "digits",
            "max_accuracy_drop": 2.0,
            "validation_samples": 300,
            "workers": workers,
            "cache_dir": str(self.folder / cache),
            "min_rows": 500,
            "max_rounds": 2,
        }
        return parse_sweep({"base": base, "grid": GRID, "output": self.folder / name} | changes)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("sweep")
    data = load_data("digits")
    model = build_model("digits_cnn", num_classes=data.num_classes, input_shape=data.input_shape)
    trained = train(model, data, TrainConfig(epochs=3)).model
    save_state(trained, folder / "dense.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        with connect(None, workers=4):
            yield Ground(folder=folder, data=data, model=trained)


def run(parameters: SweepParameters) -> tuple[dict[str, Any], Recorder]:
    recorder = Recorder()
    with report_to(recorder):
        return sweep(parameters), recorder


@pytest.fixture(scope="module")
def first(ground: Ground) -> tuple[dict[str, Any], Recorder]:
    return run(ground.parameters("first", register="swept"))


def figures(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What a sweep found, without times and run ids."""
    found = []
    for setting in content["settings"]:
        result = {name: value for name, value in setting["result"].items() if name != "latency_ms"}
        found.append({name: setting[name] for name in ("label", "status", "widths", "candidates")} | {"result": result})
    return found


# --- one sweep --------------------------------------------------------------------------------------------------------


def test_what_settings_share_is_computed_once(first: tuple[dict[str, Any], Recorder]) -> None:
    content, recorder = first
    assert len(content["settings"]) == 8
    solve = content["solve"]
    assert (solve["pairs_asked"], solve["pairs_distinct"], solve["pairs_solved"]) == (48, 18, 18)
    assert solve["calibrations"] == 2
    assert recorder.units.count("solve") == 18  # three groups, two weights and elimination, two calibrations
    assert recorder.finished_stages.count("calibrate") == 2


def test_chosen_network_is_the_smallest_within_the_budget_by_validation(
    ground: Ground, first: tuple[dict[str, Any], Recorder]
) -> None:
    content, _ = first
    chosen = content["chosen"]
    finished = [s["result"] for s in content["settings"] if s["status"] == "finished"]
    within = [result["parameters"] for result in finished if result["drop_upper_bound"] <= 2.0]
    assert chosen["budget_met"] == bool(within)
    assert content["settings"][chosen["number"]]["result"]["parameters"] == min(within)
    assert chosen["certificate"]["passed"]
    model = entprune.load(ground.folder / "first" / "chosen" / "model")
    assert sum(p.numel() for p in model.parameters()) == chosen["one_shot"]["parameters"] == min(within)


def test_files_are_complete_and_name_no_folder(ground: Ground, first: tuple[dict[str, Any], Recorder]) -> None:
    folder = ground.folder / "first"
    assert {path.name for path in folder.iterdir()} == {"sweep.json", "sweep.html", "chosen", "tracking.json"}
    assert json.loads((folder / "sweep.json").read_text()) == first[0]
    assert json.loads((folder / "chosen" / "report.json").read_text())["one_shot"] == first[0]["chosen"]["one_shot"]
    assert str(ground.folder) not in (folder / "sweep.json").read_text() + (folder / "sweep.html").read_text()
    assert not [path.name for path in ground.folder.iterdir() if path.name.endswith(".partial")]


def test_every_setting_is_a_child_run_and_the_chosen_one_is_registered(
    first: tuple[dict[str, Any], Recorder],
) -> None:
    content, client = first[0], MlflowClient()
    parent = client.get_run(content["lineage"]["mlflow_run_id"])
    assert parent.info.status == "FINISHED"
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], query)
    assert {child.info.run_id for child in children} == {s["mlflow_run_id"] for s in content["settings"]}
    assert {child.info.status for child in children} == {"FINISHED"}
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} == {"sweep.json", "sweep.html"}
    version = client.get_model_version_by_alias("swept", "challenger")
    chosen = content["settings"][content["chosen"]["number"]]
    assert version.run_id == chosen["mlflow_run_id"]
    other = next(s for s in content["settings"] if s is not chosen)
    tracked = client.get_run(other["mlflow_run_id"]).data
    assert tracked.metrics["parameters"] == other["result"]["parameters"]
    assert tracked.params["loss_exponent"] == str(other["values"]["loss_exponent"])


def test_sweep_without_mlflow_is_recorded_later(
    ground: Ground, first: tuple[dict[str, Any], Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = ground.parameters("unheard", register="unheard")
    with socket.socket() as unused, monkeypatch.context() as patch:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused.getsockname()[1]}")
        content, recorder = run(parameters)
    assert recorder.units == []
    assert content["chosen"]["registered_version"] is None
    assert record_again(parameters.output)[0] > 0
    assert record_again(parameters.output)[0] == 0
    written = json.loads((parameters.output / "sweep.json").read_text())
    assert written["chosen"]["registered_version"] == 1
    client = MlflowClient()
    parent = client.get_run(written["lineage"]["mlflow_run_id"])
    query = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], query)
    assert {child.info.run_id for child in children} == {s["mlflow_run_id"] for s in written["settings"]}
    assert {parent.info.status, *(child.info.status for child in children)} == {"FINISHED"}
    chosen = written["settings"][written["chosen"]["number"]]
    assert client.get_model_version_by_alias("unheard", "challenger").run_id == chosen["mlflow_run_id"]
    names = {artifact.path for artifact in client.list_artifacts(chosen["mlflow_run_id"])}
    assert {"report.json", "report.html", "model"} <= names
    assert chosen["mlflow_run_id"] in (parameters.output / "chosen" / "report.json").read_text()


# --- the same answer everywhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_answer(
    ground: Ground, first: tuple[dict[str, Any], Recorder], workers: int
) -> None:
    name = f"with {workers}"
    other, _ = run(ground.parameters(name, cache=f"cache {name}", workers=workers))
    assert figures(other) == figures(first[0])
    assert other["chosen"]["number"] == first[0]["chosen"]["number"]
    assert other["chosen"]["one_shot"]["accuracy"] == first[0]["chosen"]["one_shot"]["accuracy"]
    weights = [(ground.folder / folder / "chosen" / "model" / "model.safetensors") for folder in ("first", name)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_setting_gives_in_process_and_alone_what_it_gives_in_the_sweep(
    ground: Ground, first: tuple[dict[str, Any], Recorder]
) -> None:
    compared = 0
    for asked, setting in zip(ground.parameters("first").settings(), first[0]["settings"], strict=True):
        if setting["status"] == "stopped" or asked.values["calibration_samples"] == 256:
            continue
        calibration, validation = split_training(ground.data, calibration=128, validation=300, seed=0)
        result = entprune.prune(
            ground.model,
            cut_out(ground.data.train, calibration).split,
            budget=asked.parameters.budget(),
            evaluate=cut_out(ground.data.train, validation).split,
            config=asked.parameters.config(),
        )
        assert result.plan.widths() == setting["widths"]
        compared += 1
    assert compared > 0


def test_second_run_computes_nothing(ground: Ground, first: tuple[dict[str, Any], Recorder]) -> None:
    again, recorder = run(ground.parameters("first"))  # over the older result
    assert recorder.units == []
    assert again["solve"]["pairs_solved"] == 0
    assert figures(again) == figures(first[0])


def test_another_setting_pays_for_what_is_new(ground: Ground, first: tuple[dict[str, Any], Recorder]) -> None:
    grid = {"entropy_weight": [0.0, 2.0], "calibration_samples": [128]}
    other, recorder = run(ground.parameters("other", grid=grid))
    assert recorder.units.count("solve") == 3
    assert recorder.units.count("calibrate") == 0
    assert other["solve"]["pairs_distinct"] == 9


# --- before the engine ------------------------------------------------------------------------------------------------


def test_low_rank_can_be_swept(ground: Ground, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = build_model("digits_cnn", num_classes=10, input_shape=ground.data.input_shape)
    for name, rank in (ranks := {"conv2": 12, "fc1": 6}).items():
        new_pair(dense, name, rank)
    save_state(merge_layers(train(dense, ground.data, TrainConfig(epochs=4)).model, ranks), tmp_path / "thin.pt")
    base = ground.parameters("rank").base | {"checkpoint": str(tmp_path / "thin.pt"), "calibration_samples": 256}
    del base["max_accuracy_drop"]
    asked = {"grid": {"low_rank": [False, True]}, "base": base | {"parameters_removed": 0.97}}
    content, _ = run(ground.parameters("rank", **asked))
    whole, thin = content["settings"]
    assert thin["result"]["validation_drop"] < whole["result"]["validation_drop"]
    report = json.loads((ground.folder / "rank" / "chosen" / "report.json").read_text(encoding="utf-8"))
    assert content["chosen"]["number"] == thin["number"]
    assert report["low_rank"]
    model = entprune.load(ground.folder / "rank" / "chosen" / "model")
    assert sum(value.numel() for value in model.parameters()) == thin["result"]["parameters"]


def test_networks_and_data_are_loaded_once(ground: Ground) -> None:
    inputs = preflight_sweep(ground.parameters("new"))
    assert len(inputs) == 8
    assert len({id(entry.network) for entry in inputs}) == 1


def test_foreign_folder_is_refused(ground: Ground) -> None:
    folder = ground.folder / "foreign"
    folder.mkdir()
    (folder / "report.json").touch()  # of another kind of run
    with pytest.raises(OutputError, match="other files"):
        preflight_sweep(ground.parameters("foreign"))
