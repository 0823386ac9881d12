"""Checks before an engine starts: what is loaded, and where a run may write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from entprune.checkpoints import save_state, sha256_file
from entprune.errors import ConfigError, OutputError
from entprune.models import build_model
from flows.parameters import PruneParameters, parse_parameters
from flows.preflight import check_output_file, check_output_folder, hand_over, preflight


@pytest.fixture
def parameters(tmp_path: Path) -> PruneParameters:
    checkpoint = tmp_path / "dense.safetensors"
    save_state(build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8), seed=5), checkpoint)
    return parse_parameters(
        {
            "model": "digits_cnn",
            "checkpoint": checkpoint,
            "data": "digits",
            "max_accuracy_drop": 1.0,
            "output": tmp_path / "out",
        }
    )


def test_inputs_are_loaded_and_analysed(parameters: PruneParameters) -> None:
    inputs = preflight(parameters)
    expected = build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8), seed=5)
    assert all(torch.equal(value, inputs.model.state_dict()[name]) for name, value in expected.state_dict().items())
    assert not inputs.model.training
    assert inputs.checkpoint_sha256 == sha256_file(parameters.checkpoint)
    assert inputs.data.name == "digits"
    assert [group.name for group in inputs.network.groups.groups] == ["conv1", "conv2", "fc1"]
    assert not parameters.output.exists()


def test_handed_over_inputs_are_returned_for_the_same_parameters_only(parameters: PruneParameters) -> None:
    inputs = preflight(parameters)
    other = parameters.model_copy(update={"seed": 1})
    with hand_over(parameters, inputs):
        assert preflight(parameters) is inputs
        assert preflight(other) is not inputs
    assert preflight(parameters) is not inputs


def test_device_is_checked_here_only_without_a_cluster(
    parameters: PruneParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_gpu = parameters.model_copy(update={"device": "cuda"})
    with pytest.raises(ConfigError, match="this machine has no such GPU"):
        preflight(on_gpu)
    assert preflight(on_gpu.model_copy(update={"ray_address": "ray://head:10001"})).data.num_classes == 10


def test_folders_that_a_run_may_write(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "report.json").write_text("{}", encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    for name in ("new", "new/below/new", "empty", "earlier"):
        check_output_folder(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_that_a_run_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, reason in {
        "file": "got a file",
        "file/below": "got a file",
        "thesis": "got other files",
        "dangling": "got a file",
    }.items():
        with pytest.raises(OutputError, match=reason):
            check_output_folder(tmp_path / name)

    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"cannot be written \(Read-only file system\)"):
        check_output_folder(tmp_path / "new")


def test_files_that_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "old.pt").touch()
    check_output_file(tmp_path / "old.pt")
    check_output_file(tmp_path / "new" / "dense.pt")
    assert not (tmp_path / "new").exists()
    with pytest.raises(OutputError, match="expected the name of a file, got a folder"):
        check_output_file(tmp_path)
    with pytest.raises(OutputError, match="got a file"):
        check_output_file(tmp_path / "old.pt" / "dense.pt")
