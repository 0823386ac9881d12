"""A real round trip through MLflow on SQLite, and what happens when there is no server."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from torch import nn

from entprune.errors import CertificateError, EngineError
from entprune.evaluation import count_macs, count_parameters, measure
from entprune.path import PathSetting, SettingPath, SparsityPath, lower_envelope
from tasks import registry, tracked_values, tracking
from tasks.record import MARK, Record, TrackedRun

ROOT = Path(__file__).resolve().parents[1]
INPUT_SHAPE = (1, 8, 8)
SETTINGS = (PathSetting(entropy_weight=0.0), PathSetting(entropy_weight=0.3))

pytestmark = pytest.mark.integration


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3 * 36, 4)
    ).eval()


def make_path(group: str, num_channels: int) -> SparsityPath:
    generator = np.random.default_rng(num_channels)
    return lower_envelope(
        group,
        2,
        [
            SettingPath(
                setting=setting,
                order=np.arange(num_channels),
                errors=np.sort(generator.random(num_channels + 1))[::-1].copy(),
                snapshots=np.full((2, num_channels), 1 / num_channels, np.float32),
                status="complete",
            )
            for setting in SETTINGS
        ],
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of its own as the current one; the database is made by the first test that asks."""
    folder = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture
def client(workplace: Path) -> MlflowClient:
    tracking.check()
    return MlflowClient(tracking_uri=f"sqlite:///{workplace / 'mlflow.db'}")


@pytest.fixture
def run(client: MlflowClient, tmp_path: Path) -> Iterator[TrackedRun]:
    opened = Record(tmp_path / "out").open_run("lenet", "first", {"data_sha256": "ab12", "unknown": None})
    yield opened
    opened.close()


@pytest.fixture
def run_id(run: TrackedRun) -> str:
    return run.id


def history(client: MlflowClient, run_id: str, name: str) -> dict[int, float]:
    return {metric.step: metric.value for metric in client.get_metric_history(run_id, name)}


def test_run_goes_to_its_experiment_with_its_tags(client: MlflowClient, run_id: str, workplace: Path) -> None:
    run = client.get_run(run_id)
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.name == "lenet"
    assert experiment.artifact_location.startswith((workplace / "mlartifacts").as_uri())
    assert run.info.status == "RUNNING"
    assert run.data.tags["data_sha256"] == "ab12"
    assert "unknown" not in run.data.tags


def test_closed_run_has_its_status_and_an_end(client: MlflowClient) -> None:
    run_id = tracking.open_run("lenet", "failing", {})
    tracking.close_run(run_id, "FAILED")
    info = client.get_run(run_id).info
    assert info.status == "FAILED"
    assert info.end_time >= info.start_time


def test_settings_and_numbers_are_flattened(client: MlflowClient, run: TrackedRun) -> None:
    many = {f"option{number}": number for number in range(130)}  # more than one request may carry
    run.settings({"model": "lenet", "config": {"keep": ("a", "b"), "exact": True, "no": None}, **many})
    run.numbers({"dense": {"accuracy": 98.5, "latency_ms": {"1": 2}}, "text": "x", "none": None}, step=3)
    data = client.get_run(run.id).data
    assert data.params["config.keep"] == '["a", "b"]'
    assert data.params["config.exact"] == "true"
    assert len(data.params) == 133
    assert data.metrics == {"dense.accuracy": 98.5, "dense.latency_ms.1": 2.0}
    assert history(client, run.id, "dense.accuracy") == {3: 98.5}


def test_each_setting_gets_a_child_run_with_its_curves(client: MlflowClient, run: TrackedRun) -> None:
    paths = {"conv 1": make_path("conv 1", 6), "features.3": make_path("features.3", 700)}
    children = [child.id for child in run.paths(paths)]
    assert len(children) == len(SETTINGS)
    for number, (child, setting) in enumerate(zip(children, SETTINGS, strict=True)):
        found = client.get_run(child)
        assert found.data.tags["mlflow.parentRunId"] == run.id
        assert found.info.status == "FINISHED"
        assert found.info.run_name == setting.label()
        assert float(found.data.params["entropy_weight"]) == setting.entropy_weight
        expected = paths["conv 1"].settings[number].errors / 2  # two consumers
        curve = history(client, child, "reconstruction_error.conv 1")
        assert curve == pytest.approx(dict(enumerate(expected)))
        long_curve = history(client, child, "reconstruction_error.features.3")
        assert len(long_curve) == 200
        assert {0, 700} <= set(long_curve)
    won = [client.get_run(child).data.metrics["widths_won_fraction"] for child in children]
    assert sum(won) == pytest.approx(1.0)


def test_no_paths_give_no_child_runs(run: TrackedRun) -> None:
    assert run.paths({}) == []


def test_what_is_told_twice_is_there_once(client: MlflowClient, run_id: str) -> None:
    for _ in range(2):
        tracking.log_numbers(run_id, [("accuracy", 98.5, 1), ("accuracy", 99.0, 2)], 1_700_000_000_000)
        tracking.log_params(run_id, {"model": "lenet"})
    assert [metric.value for metric in client.get_metric_history(run_id, "accuracy")] == [98.5, 99.0]


def test_marks_are_found_again(client: MlflowClient, run: TrackedRun) -> None:
    mark = client.get_run(run.id).data.tags[MARK]
    assert tracking.find_marked_run("lenet", MARK, mark) == run.id
    assert tracking.find_marked_run("lenet", MARK, "other") is None
    tags = {"certificate_passed": True, MARK: mark}
    version = registry.register(run.id, make_network(), INPUT_SHAPE, "marked", tags=tags)
    assert tracking.find_marked_version("marked", MARK, mark) == version
    assert tracking.find_marked_version("marked", MARK, "other") is None
    assert tracking.find_marked_version("unknown", MARK, mark) is None


def test_run_of_a_killed_driver_is_closed_by_the_next_one(client: MlflowClient, tmp_path: Path) -> None:
    killed, elsewhere = (Record(tmp_path / name).open_run("lenet", "killed", {}) for name in ("out", "other"))
    child = killed.open_child("setting", {})
    following = Record(tmp_path / "out").open_run("lenet", "next", {})
    states = [client.get_run(run.id).info.status for run in (killed, child, elsewhere, following)]
    assert states == ["KILLED", "KILLED", "RUNNING", "RUNNING"]


def test_groups_are_logged_by_their_number(client: MlflowClient, run: TrackedRun) -> None:
    group = {
        "name": "a",
        "channels": 4,
        "kept": 1,
        "reconstruction_error": 0.5,
        "entropy": 0.1,
        "effective_channels": 1.5,
    }
    run.groups({"groups": [group, {**group, "kept": 3, "entropy": None}]})
    assert history(client, run.id, "group.kept_fraction") == {0: 0.25, 1: 0.75}
    assert history(client, run.id, "group.entropy") == {0: 0.1}
    assert history(client, run.id, "group.effective_channels") == {0: 1.5, 1: 1.5}


def test_artifacts_are_stored_with_their_folders(client: MlflowClient, run: TrackedRun, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "model").mkdir(parents=True)
    (source / "report.json").write_text('{"schema_version": 1}', encoding="utf-8")
    (source / "tracking.json").write_text("{}", encoding="utf-8")
    (source / "model" / "model.json").write_text("{}", encoding="utf-8")
    run.artifacts(source)
    stored = Path(client.download_artifacts(run.id, "", str(tmp_path)))
    assert json.loads((stored / "report.json").read_text(encoding="utf-8")) == {"schema_version": 1}
    assert [entry.path for entry in client.list_artifacts(run.id, "model")] == ["model/model.json"]
    assert {entry.path for entry in client.list_artifacts(run.id)} == {"model", "report.json"}


LOAD_AND_ANSWER = """
import sys
import mlflow, numpy, torch
model = mlflow.pytorch.load_model("models:/digits@challenger")
images = numpy.load(sys.argv[1])
with torch.no_grad():
    answers = {str(size): model(torch.from_numpy(images[:size])).numpy() for size in (1, 2, 7)}
numpy.savez(sys.argv[2], **answers)
"""


@pytest.mark.timeout(400)  # a new process imports torch and MLflow: long on a busy machine
def test_registered_network_answers_alike_in_a_fresh_process(client: MlflowClient, run_id: str, tmp_path: Path) -> None:
    model = make_network()
    tags = {"certificate_passed": True, "checkpoint_sha256": "cd34", "parameters_removed": 0.5}
    card = {"mean": [0.1], "std": [0.2], "class_names": ["a", "b"]}
    version = registry.register(run_id, model, INPUT_SHAPE, "digits", tags=tags, card=card)

    registered = client.get_model_version_by_alias("digits", "challenger")
    assert int(registered.version) == version
    assert registered.run_id == run_id
    assert registered.tags == {"certificate_passed": "true", "checkpoint_sha256": "cd34", "parameters_removed": "0.5"}
    logged = client.get_logged_model(registered.source.removeprefix("models:/"))
    assert logged.experiment_id == client.get_run(run_id).info.experiment_id
    assert not Path("mlruns").exists()  # MLflow's own choice of folder

    images = torch.randn(7, *INPUT_SHAPE)
    np.save(tmp_path / "images.npy", images.numpy())
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": tracking.tracking_uri(),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", LOAD_AND_ANSWER, str(tmp_path / "images.npy"), str(tmp_path / "answers.npz")]
    subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    with np.load(tmp_path / "answers.npz") as answers, torch.inference_mode():
        for size in (1, 2, 7):
            np.testing.assert_allclose(answers[str(size)], model(images[:size]).numpy(), rtol=1e-5, atol=1e-6)


def test_registered_network_is_measured_like_the_original(run_id: str) -> None:
    model = make_network()
    registry.register(run_id, model, INPUT_SHAPE, "measured", tags={"certificate_passed": "true"}, card={"mean": [0.5]})
    loaded, card = registry.load_registered("models:/measured@challenger")
    assert card == {"mean": [0.5]}
    assert count_parameters(loaded) == count_parameters(model)
    assert count_macs(loaded, INPUT_SHAPE) == count_macs(model, INPUT_SHAPE)
    images, labels = torch.randn(9, *INPUT_SHAPE), np.arange(9) % 4
    split = _Split(images, labels)
    found = measure(loaded, split, INPUT_SHAPE, repeats=1)
    expected = measure(model, split, INPUT_SHAPE, repeats=1)
    assert found.accuracy == expected.accuracy
    assert loaded.eval() is loaded


class _Split:
    def __init__(self, images: torch.Tensor, labels: np.ndarray) -> None:
        self._images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        return self._images[indices]


def test_alias_moves_to_the_newest_version(client: MlflowClient, run_id: str) -> None:
    tags = {"certificate_passed": True}
    first = registry.register(run_id, make_network(), INPUT_SHAPE, "twice", tags=tags)
    second = registry.register(run_id, make_network(), INPUT_SHAPE, "twice", tags=tags)
    assert (first, second) == (1, 2)
    assert int(client.get_model_version_by_alias("twice", "challenger").version) == 2


@pytest.mark.parametrize("tags", [{}, {"certificate_passed": False}, {"certificate_passed": None}])
def test_network_without_a_passed_certificate_is_refused(
    client: MlflowClient, run_id: str, tags: dict[str, object]
) -> None:
    with pytest.raises(CertificateError, match="was not registered: expected a passed certificate"):
        registry.register(run_id, make_network(), INPUT_SHAPE, "refused", tags=tags)
    assert "refused" not in {model.name for model in client.search_registered_models()}


class _FixedBatch(nn.Module):
    """Computes with its batch size, which the export takes for a constant."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) * float(len(images))


class _Unfollowable(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) if images.sum().item() >= 0 else images.flatten(1) * 2


def test_network_that_cannot_be_exported_is_one_sentence(client: MlflowClient, run_id: str) -> None:
    with pytest.raises(EngineError, match="cannot be exported for the registry"):
        registry.register(run_id, _Unfollowable(), INPUT_SHAPE, "odd", tags={"certificate_passed": True})
    assert "odd" not in {model.name for model in client.search_registered_models()}


def test_network_of_one_batch_size_is_refused(client: MlflowClient, run_id: str) -> None:
    with pytest.raises(EngineError, match="exported for one batch size only and refuses 1"):
        registry.register(run_id, _FixedBatch(), INPUT_SHAPE, "fixed", tags={"certificate_passed": True})
    assert "fixed" not in {model.name for model in client.search_registered_models()}


def test_loading_makes_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        EngineError, match=r"cannot load 'models:/digits@challenger': no MLflow database at '.*mlflow.db'"
    ):
        registry.load_registered("models:/digits@challenger")
    assert list(tmp_path.iterdir()) == []


def test_unknown_version_is_one_sentence(client: MlflowClient) -> None:
    with pytest.raises(EngineError, match=r"could not load 'models:/nobody@challenger'"):
        registry.load_registered("models:/nobody@challenger")


def test_deleted_experiment_is_one_sentence(client: MlflowClient) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(EngineError, match="experiment 'gone' was deleted; restore it"):
        tracking.open_run("gone", "first", {})


def test_unreachable_server_is_one_sentence_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(
            tracking.TrackingError, match=r"no MLflow server answers at 'http://127.0.0.1:\d+' \(.*refused.*\); start"
        ):
            tracking.check()
    assert time.monotonic() - start < 10


def test_silent_server_is_one_sentence_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_PROBE_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(EngineError, match=r"no MLflow server answers .*timed out"):
            tracking.check()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("uri", ["postgresql://user:secret@127.0.0.1:1/runs", "nonsense://here"])
def test_wrong_address_is_one_sentence_without_the_password(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(EngineError, match="no MLflow server answers at") as caught:
        tracking.check()
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value, tracking.TrackingError) == (uri.startswith("postgresql") and has_driver())


def has_driver() -> bool:
    """Whether PostgreSQL can be spoken to: without its driver the address is at fault, not the server."""
    return importlib.util.find_spec("psycopg2") is not None


def test_registering_leaves_the_environment_alone(run_id: str) -> None:
    registry.register(run_id, make_network(), INPUT_SHAPE, "tidy", tags={"certificate_passed": True})
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert "MLFLOW_ALLOW_PICKLE_DESERIALIZATION" not in os.environ


WHOLE_ROUND = """
import logging
logging.getLogger().setLevel(logging.INFO)
import numpy, torch
from tasks import registry, tracking
tracking.check()
run_id = tracking.open_run("quiet", "first", {})
tracking.log_numbers(run_id, [("accuracy", 1.0, 0)], 1)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
registry.register(run_id, model, (1, 2, 2), "quiet", tags={"certificate_passed": True})
registry.load_registered("models:/quiet@challenger")
tracking.close_run(run_id)
assert logging.getLogger().handlers == [], logging.getLogger().handlers
"""


@pytest.mark.timeout(400)  # a new process imports torch and MLflow: long on a busy machine
def test_first_use_in_a_fresh_folder_prints_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_LOGGING_LEVEL", None)  # a new process, in which nothing was asked for
    completed = subprocess.run(
        [sys.executable, "-c", WHOLE_ROUND], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout + completed.stderr == ""
    assert (tmp_path / "mlflow.db").is_file()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mlartifacts", "mlflow.db"]


def test_tracking_uri_of_the_environment_is_respected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking.tracking_uri() == "http://tracker:5000"


NAMES = st.text(min_size=1, max_size=8)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.integers(), max_size=3))


@given(
    st.recursive(st.dictionaries(NAMES, LEAVES, max_size=3), lambda inner: st.dictionaries(NAMES, inner, max_size=3))
)
def test_flattening_keeps_every_leaf(values: dict[str, object]) -> None:
    def count(value: object) -> int:
        return sum(map(count, value.values())) if isinstance(value, dict) else 1

    assert len(list(tracked_values.flatten(values))) == count(values)


@given(st.lists(st.integers()), st.integers(1, 5))
def test_parts_join_to_the_whole(entries: list[int], size: int) -> None:
    pieces = list(tracked_values.parts(entries, size))
    assert [entry for piece in pieces for entry in piece] == entries
    assert all(0 < len(piece) <= size for piece in pieces)
