"""A registered version in the hands of programs that have mlflow and torch, and neither entprune nor pickle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from torch import nn

from entprune.artifact import ModelCard
from entprune.datasets import load_data
from entprune.evaluation import accuracy
from entprune.models import build_model
from entprune.training import TrainConfig, train
from flows.version_page import data_name, version_page, version_tags
from tasks import consumer_files, registry, tracking

pytestmark = pytest.mark.integration

# Runs isolated from this checkout; what an installation could still offer is refused.
CONSUMER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"entprune", "flows", "tasks"}:
            raise ModuleNotFoundError(f"no {name} here")

sys.meta_path.insert(0, Refuse())
try:
    import entprune
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("entprune can be imported")

import json, socket, threading, time, urllib.request
import mlflow, numpy as np, torch

uri, place = "models:/digits@champion", sys.argv[1]
with np.load(f"{place}/digits.npz") as stored:
    pixels, labels = stored["pixels"], stored["labels"]
folder = mlflow.artifacts.download_artifacts(uri)
with open(f"{folder}/extra_files/preprocessing.json") as stream:
    preparation = json.load(stream)
axes = (1, -1, 1, 1)
mean, std = (np.reshape(preparation[name], axes).astype("float32") for name in ("mean", "std"))
images = ((pixels - mean) / std).astype("float32")

graph = mlflow.pytorch.load_model(uri)
with torch.no_grad():
    expected = graph(torch.from_numpy(images)).numpy()
found = {"accuracy": 100.0 * float((expected.argmax(1) == labels).mean()), "preparation": preparation}

function = mlflow.pyfunc.load_model(uri)
found["pyfunc"] = max(float(np.abs(function.predict(images[:n]) - expected[:n]).max()) for n in (1, 3, len(images)))
found["signature"] = str(function.metadata.signature.inputs.to_dict()[0]["tensor-spec"]["shape"])
found["example"] = list(np.asarray(function.input_example).shape)

import onnxruntime
session = onnxruntime.InferenceSession(f"{folder}/extra_files/model.onnx", providers=["CPUExecutionProvider"])
(answers,) = session.run(None, {session.get_inputs()[0].name: images})
found["onnx"] = float(np.abs(answers - expected).max())

import uvicorn
from mlflow.pyfunc import scoring_server
listener = socket.create_server(("127.0.0.1", 0))
server = uvicorn.Server(uvicorn.Config(scoring_server.init(function), log_level="error"))
threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
while not server.started:
    time.sleep(0.05)
request = urllib.request.Request(
    f"http://127.0.0.1:{listener.getsockname()[1]}/invocations",
    data=json.dumps({"inputs": images[:3].tolist()}).encode(),
    headers={"Content-Type": "application/json"},
)
served = json.load(urllib.request.urlopen(request, timeout=60))["predictions"]
found["served"] = float(np.abs(np.asarray(served) - expected[:3]).max())
server.should_exit = True
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Ground:
    """A trained network that was registered and is champion."""

    folder: Path
    model: nn.Module
    accuracy: float
    card: ModelCard


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("consumers")
    data = load_data("digits")
    model = build_model("digits_cnn", num_classes=data.num_classes, input_shape=data.input_shape)
    model = train(model, data, TrainConfig(epochs=1)).model
    card = ModelCard(
        model_spec="digits_cnn",
        num_classes=data.num_classes,
        input_shape=data.input_shape,
        mean=data.mean,
        std=data.std,
        class_names=data.class_names,
    )
    pixels = data.test.batch(np.arange(len(data.test))).numpy() * data.std[0] + data.mean[0]
    np.savez(folder / "digits.npz", pixels=pixels, labels=data.test.labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        tracking.check()
        run_id = tracking.open_run("digits", "first", {})
        files = consumer_files.write_consumer_files(model, data.input_shape, card.to_dict(), folder)
        registry.register(
            run_id,
            model,
            data.input_shape,
            "digits",
            tags={"certificate_passed": True},
            alias="champion",
            card=card.to_dict(),
            files=files,
            description="# A page",
        )
        tracking.close_run(run_id)
        yield Ground(folder=folder, model=model, accuracy=accuracy(model, data.test), card=card)


def test_champion_serves_without_entprune_and_without_pickle(ground: Ground) -> None:
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", CONSUMER, str(ground.folder)],
        cwd=ground.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["accuracy"] == pytest.approx(ground.accuracy, abs=1e-9)
    assert found["preparation"]["class_names"] == list(ground.card.class_names)
    assert found["preparation"]["input"] | {"channels": 1, "height": 8, "width": 8} == found["preparation"]["input"]
    assert (found["signature"], found["example"]) == ("(-1, 1, 8, 8)", [2, 1, 8, 8])
    assert found["pyfunc"] <= 1e-5
    assert found["served"] <= 1e-5
    assert found["onnx"] <= 1e-4


def test_version_has_its_page(ground: Ground) -> None:
    assert MlflowClient().get_model_version("digits", "1").description == "# A page"


def test_version_goes_without_onnx_where_it_cannot_be_written(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("entprune.export._ONNX_PACKAGES", ("onnx", "no_such_package"))
    files = consumer_files.write_consumer_files(ground.model, (1, 8, 8), {}, tmp_path)
    assert [file.name for file in files] == ["preprocessing.json"]
    assert "goes without model.onnx" in caplog.text
    assert json.loads(files[0].read_text(encoding="utf-8"))["class_names"] == []


# --- the page and the tags --------------------------------------------------------------------------------------------


def make_report(**changes: Any) -> dict[str, Any]:
    dense = {"accuracy": 99.0, "parameters": 2000, "macs": 9000, "latency_ms": {"1": 2.0, "64": 8.0}}
    figures = {"accuracy": 98.5, "parameters": 500, "macs": 3000, "latency_ms": {"1": 1.0, "64": 9.0}}
    compared = {"accuracy_drop": 0.5, "parameters_removed": 0.75, "macs_removed": 2 / 3}
    return {
        "model": {"spec": "lenet", "input_shape": [1, 28, 28], "num_classes": 10},
        "data": {
            "spec": "npz:/secret/folder/mnist.npz", "sha256": "ab12", "mean": [0.1], "std": [0.3],
            "calibration_samples": 256, "validation_samples": 300, "test_samples": 10000,
        },
        "budget": {"max_accuracy_drop": 0.5},
        "budget_met": True,
        "validation": {"dense_accuracy": 99.1, "images": 300},
        "dense": dense,
        "one_shot": figures | compared,
        "fine_tuned": None,
        "certificate": {"max_abs_difference": 1e-15, "tolerance": 1e-4, "num_images": 32, "passed": True},
        "lineage": {"checkpoint_sha256": "cd34", "data_sha256": "ab12", "registered_version": None},
        "environment": {"platform": "Linux", "cpus": 2, "threads": 1, "gpu": None},
        "warnings": ["It is slower at batch 64."],
    } | changes  # fmt: skip


def test_version_page_says_where_the_images_to_choose_by_are_from() -> None:
    report = make_report()
    report["data"] = {**report["data"], "validation_split": "validation"}
    assert "300 of the validation split to choose by, " in version_page(report, "small")
    perturbed = make_report(settings={"perturbed_share": 0.25})
    assert "300 further ones to choose by (25% of them perturbed), " in version_page(perturbed, "small")


def test_page_tells_the_story_without_the_folders_of_the_machine() -> None:
    page = version_page(make_report(), "small")
    for fragment in (
        "## lenet, pruned: 75.0 % of the parameters removed",
        "A smaller `lenet` for images of 1 × 28 × 28 and 10 classes.",
        "without a single training step.",
        "Asked: the smallest network that loses at most 0.5 points of accuracy. Judged on 300 validation images",
        "| test accuracy | 99.00 % | 98.50 % | -0.50 points |",
        "| parameters | 2,000 | 500 | -75.0% |",
        "| time, 64 images | 8.00 ms | 9.00 ms | +12% |",
        "| time, 1 image | 2.00 ms | 1.00 ms | -50% |",
        "It computes the same as the full-size network with the removed channels silenced",
        "256 training images for the weights, 300 further ones to choose by, 10,000 test images",
        "checkpoint of the unpruned network, SHA-256: cd34",
        "npz:mnist.npz, SHA-256 ab12",
        'mlflow.pyfunc.load_model("models:/small@champion")',
        "images: float32 array of shape (n, 1, 28, 28)",
        "minus mean (0.1), divided by std (0.3)",
        "- It is slower at batch 64.",
    ):
        assert fragment in page
    assert "secret" not in page
    assert len(page) < 4000  # a verdict still has its place


def test_page_names_every_budget() -> None:
    budget = {"max_accuracy_drop": 0.5, "macs_removed": 0.3, "latency_removed": 0.2, "latency_batch": 8}
    assert (
        "the smallest network that loses at most 0.5 points of accuracy and is without at least 30.0 % of its "
        "multiply-accumulates and 20.0 % of its latency at batch size 8."
    ) in version_page(make_report(budget=budget), "small")


def test_gained_accuracy_reads_as_a_gain() -> None:
    report = make_report()
    report["one_shot"] |= {"accuracy": 99.2, "accuracy_drop": -0.2}
    assert "| test accuracy | 99.00 % | 99.20 % | +0.20 points |" in version_page(report, "small")


def test_tags_hold_what_a_promotion_needs() -> None:
    report = make_report()
    tuned = report["one_shot"] | {"accuracy": 98.9}
    tags = version_tags(report | {"fine_tuned": tuned})
    assert (tags["accuracy"], tags["dense_accuracy"], tags["budget_max_accuracy_drop"]) == (98.9, 99.0, 0.5)
    assert (tags["parameters"], tags["macs"], tags["latency_ms_64"]) == (500, 3000, 9.0)
    assert (tags["data_sha256"], tags["certificate_passed"]) == ("ab12", True)
    assert tags["measured_on"] == "Linux, 2 CPUs, 1 thread"
    assert "registered_version" not in tags


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("digits", "digits"),
        ("npz:/a/b.npz", "npz:b.npz"),
        ("imagefolder:x/photos", "imagefolder:photos"),
        ("pkg.data:make", "pkg.data:make"),
    ],
)
def test_data_name_shows_no_folder(spec: str, name: str) -> None:
    assert data_name(spec) == name
