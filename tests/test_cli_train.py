"""`entprune train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from entprune.datasets import ImageData
from entprune.training import TrainConfig, TrainResult
from tests.command_line import assert_one_sentence, fail_if_called, put_in_the_way, run_cli


def test_train_writes_a_checkpoint_and_shows_its_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "dense.safetensors"
    assert run_cli("train", "--model", "digits_cnn", "--data", "digits", "--epochs", "1", "--output", str(output)) == 0
    shown = capsys.readouterr().out
    assert output.is_file()
    assert str(output) in shown
    assert "test accuracy" in shown


def test_the_recipe_is_the_one_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig] = []

    def train(model: nn.Module, data: ImageData, config: TrainConfig, progress: Any) -> TrainResult:
        seen.append(config)
        return TrainResult(model=model, history=(), accuracy=50.0)

    monkeypatch.setattr("entprune.training.train", train)
    options = ["--model", "digits_cnn", "--data", "digits", "--output", str(tmp_path / "dense.pt")]
    recipe = ["--epochs", "7", "--batch-size", "256", "--lr", "0.2", "--seed", "3"]
    assert run_cli("train", *options) == 0
    assert run_cli("train", *options, *recipe) == 0
    assert seen == [TrainConfig(), TrainConfig(epochs=7, batch_size=256, learning_rate=0.2, seed=3)]


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (["--output", "dense.txt"], "expected a name ending in .safetensors or .pt, got '.txt'"),
        (["--output", "file/dense.pt"], "got a file"),
        (["--output", "folder.pt"], "got a folder"),
        (["--output", "dense.pt", "--epochs", "0"], "expected epochs >= 1, got 0"),
        (["--output", "dense.pt", "--batch-size", "1"], "expected batch_size >= 2, got 1"),
        (["--output", "dense.pt", "--lr", "0"], "expected learning_rate > 0, got 0.0"),
        (["--output", "dense.pt", "--model", "lenett"], "unknown model"),
        (["--output", "dense.pt", "--data", "npz:none.npz"], "found none"),
    ],
)
def test_bad_input_to_train_is_refused_before_training(
    changes: list[str],
    fragment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("entprune.training.train", fail_if_called)
    before = put_in_the_way(tmp_path, "folder.pt")
    assert run_cli("train", "--model", "digits_cnn", "--data", "digits", *changes) == 2
    assert_one_sentence(capsys.readouterr().err, fragment)
    assert sorted(tmp_path.rglob("*")) == before
