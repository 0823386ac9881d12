"""`entprune train`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import assert_one_sentence, fail_if_called, put_in_the_way, run_cli


def test_train_writes_a_checkpoint_and_shows_its_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "dense.safetensors"
    assert run_cli("train", "--model", "digits_cnn", "--data", "digits", "--epochs", "1", "--output", str(output)) == 0
    shown = capsys.readouterr().out
    assert output.is_file()
    assert str(output) in shown
    assert "test accuracy" in shown


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        (["--output", "dense.txt"], "expected a name ending in .safetensors or .pt, got '.txt'"),
        (["--output", "file/dense.pt"], "got a file"),
        (["--output", "folder.pt"], "got a folder"),
        (["--output", "dense.pt", "--epochs", "0"], "expected epochs >= 1, got 0"),
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
