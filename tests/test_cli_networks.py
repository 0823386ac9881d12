"""`entprune evaluate`, `export` and `inspect`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from entprune.artifact import ModelCard, save_model
from entprune.evaluation import count_parameters
from entprune.models import build_model
from tasks import registry
from tasks.exported import ExportedNetwork
from tests.command_line import assert_one_sentence, put_in_the_way, run_cli, write_checkpoint, write_npz


def build_unprunable() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


@pytest.fixture
def saved_run(tmp_path: Path) -> Path:
    """A run's folder with a network that is right on images which are normalised as its card says, and else wrong."""
    torch.manual_seed(3)
    model = build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8)).eval()
    images = np.random.default_rng(1).random((60, 8, 8), np.float32)
    mean, std = (0.75,), (0.05,)
    with torch.inference_mode():
        labels = model((torch.from_numpy(images)[:, None] - mean[0]) / std[0]).argmax(1).numpy()
    write_npz(tmp_path / "own.npz", x_test=images, y_test=labels)
    card = ModelCard(model_spec="digits_cnn", num_classes=10, input_shape=(1, 8, 8), mean=mean, std=std, class_names=())
    save_model(model, None, card, tmp_path / "run" / "model")
    return tmp_path / "run"


@pytest.mark.parametrize("part", ["", "model"])
def test_evaluate_normalises_as_the_network_was_trained(
    part: str, saved_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("evaluate", str(saved_run / part), "--data", f"npz:{tmp_path / 'own.npz'}") == 0
    shown = " ".join(capsys.readouterr().out.split())
    model = build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8))
    assert "accuracy on 60 test images 100.00 %" in shown
    assert f"parameters {count_parameters(model):,}" in shown
    assert "latency, batch 64" in shown
    options = ["--data", f"npz:{tmp_path / 'own.npz'}", "--mean", "0.1", "--std", "1"]
    assert run_cli("evaluate", str(saved_run / part), *options) == 0
    assert "100.00 %" not in capsys.readouterr().out


def test_evaluate_refuses_data_of_another_shape(
    saved_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_npz(
        tmp_path / "other.npz", x_train=np.zeros((40, 9, 9), np.float32), x_test=np.zeros((20, 9, 9), np.float32)
    )
    assert run_cli("evaluate", str(saved_run), "--data", f"npz:{other}") == 2
    assert_one_sentence(capsys.readouterr().err, "expected images (1, 8, 8)", "got (1, 9, 9)")


def test_evaluate_of_nothing_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("evaluate", str(tmp_path / "none"), "--data", "digits") == 2
    assert_one_sentence(capsys.readouterr().err, "expected a folder with model.json, found none")


@pytest.mark.parametrize(
    ("part", "suffix", "reader"), [("", ".pt2", "torch.export"), ("model", ".onnx", "onnxruntime")]
)
def test_export_writes_one_file_and_shows_how_exact_it_is(
    part: str, suffix: str, reader: str, saved_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / f"digits{suffix}"
    assert run_cli("export", str(saved_run / part), "--output", str(output)) == 0
    captured = capsys.readouterr()
    shown = {line.split()[0]: line.split(maxsplit=1)[1] for line in captured.out.splitlines()}
    assert captured.err == ""
    assert shown["file"] == str(output)
    assert shown["size"] == f"{output.stat().st_size:,} bytes"
    assert float(shown["verified"].split()[0]) <= 1e-5
    assert shown["verified"].endswith(f"(relative, {reader}, batches of 1, 2, 5)")
    assert (
        shown["input"] == "images (n, 1, 8, 8), float32, as (pixel in [0, 1] - mean) / std with mean 0.75 and std 0.05"
    )
    assert str(output) in shown["load"]


@pytest.mark.parametrize(
    ("source", "output", "fragment"),
    [
        ("none", "digits.txt", "expected a name ending in .pt2 or .onnx, got '.txt'"),
        ("none", "file/digits.pt2", "got a file"),
        ("none", "folder.onnx", "got a folder"),
        ("none", "digits.pt2", "expected a folder with model.json, found none"),
        ("models:/nobody@challenger", "digits.onnx", "no MLflow database"),
    ],
)
def test_bad_input_to_export_is_one_sentence_and_leaves_nothing(
    source: str,
    output: str,
    fragment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = put_in_the_way(tmp_path, "folder.onnx")
    assert run_cli("export", source, "--output", output) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_sentence(captured.err, fragment)
    assert sorted(tmp_path.rglob("*")) == before


def test_export_of_a_registered_graph_needs_only_its_input_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8)).eval()
    batch = torch.export.Dim("batch")
    graph = torch.export.export(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},)).module()
    monkeypatch.setattr(registry, "load_registered", lambda _: (ExportedNetwork(graph), {}))
    given = ["export", "models:/digits@challenger", "--output", str(tmp_path / "digits.onnx")]
    assert run_cli(*given) == 2
    assert_one_sentence(capsys.readouterr().err, "'models:/digits@challenger'", "give --input-shape C,H,W")
    assert run_cli(*given, "--input-shape", "1,8,8") == 0
    assert (tmp_path / "digits.onnx").is_file()
    assert run_cli(*given, "--input-shape", "1,9,9") == 2
    assert_one_sentence(capsys.readouterr().err, "refuses images of shape (1, 1, 9, 9)")


def test_inspect_shows_groups_and_what_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("inspect", "--model", "lenet") == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    start = lines.index(["conv1", "20", "5.9%", "82.3%"])
    assert lines[start + 1] == ["read", "by", "conv2"]
    assert ["read", "by", "fc2"] in lines
    assert "its outputs are the network's outputs" in shown
    checkpoint = write_checkpoint(tmp_path / "dense.safetensors")
    assert run_cli("inspect", "--model", "digits_cnn", "--checkpoint", str(checkpoint)) == 0


def test_inspect_lists_all_writers_of_a_stream_and_obeys_keep(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("inspect", "--model", "resnet20_cifar", "--keep", "layer3*") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "layer2.0.conv2 is protected" not in shown
    assert "layer3.0.conv1 layer3.0.conv1 is protected by --keep" in shown
    assert run_cli("inspect", "--model", "resnet20_cifar") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "also written by layer1.0.conv2, layer1.1.conv2, layer1.2.conv2, layer2.0.conv2" in shown


def test_inspect_fails_where_nothing_can_be_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("inspect", "--model", "tests.test_cli_networks:build_unprunable", "--input-shape", "1,8,8") == 2
    assert_one_sentence(capsys.readouterr().err, "nothing in this network can be pruned")


@pytest.mark.parametrize("shape", ["3,224", "a,b,c", "0,8,8"])
def test_inspect_refuses_a_shape_that_is_none(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("inspect", "--model", "lenet", "--input-shape", shape) == 2
    assert_one_sentence(capsys.readouterr().err, "channels, height", shape.split(",", 1)[0])
