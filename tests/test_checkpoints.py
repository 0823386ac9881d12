"""Checkpoints: real ones load strictly, hostile and damaged ones are refused with one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from entprune.checkpoints import load_checkpoint, load_state, save_state, sha256_file
from entprune.errors import CheckpointError, OutputError
from entprune.models import build_model

CHECKPOINTS = Path(__file__).resolve().parents[1].parent / "shared" / "checkpoints"


@pytest.fixture
def model() -> nn.Module:
    return build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8))


def written(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("name", "file_name", "num_parameters"),
    [
        ("lenet", "lenet_mnist.pt", 431_080),
        ("vgg16_cifar", "vgg16_cifar10.pt", 14_728_266),
        ("resnet18_cifar", "resnet18_cifar10.pt", 11_173_962),
        ("resnet20_cifar", "resnet20_cifar10.pt", 269_722),
        ("resnet56_cifar", "resnet56_cifar10.pt", 853_018),
    ],
)
def test_real_checkpoint_loads_strictly(name: str, file_name: str, num_parameters: int) -> None:
    path = CHECKPOINTS / file_name
    if not path.is_file():
        pytest.skip("the benchmark checkpoints in ../shared are not here")
    input_shape = (1, 28, 28) if name == "lenet" else (3, 32, 32)
    model = build_model(name, num_classes=10, input_shape=input_shape)
    assert load_checkpoint(model, path) is model
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    state = torch.load(path, weights_only=True)
    assert all(torch.equal(value, state[key].to(value.dtype)) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_saved_state_returns(model: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"state{suffix}"
    save_state(model, path)
    assert list(path.parent.iterdir()) == [path], "no temporary file may stay"
    other = build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8), seed=9)
    load_checkpoint(other, path)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_wrappers_and_prefix_are_removed(model: nn.Module, tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    path = written(tmp_path, {wrapper: state, "epoch": 3} if wrapper else state)
    assert list(load_state(path)) == list(model.state_dict())


@given(dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]))
def test_floating_dtypes_become_float32(tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype) -> None:
    path = written(tmp_path_factory.mktemp("dtype"), {"weight": torch.ones(3).to(dtype), "count": torch.tensor(2)})
    state = load_state(path)
    assert (state["weight"].dtype, state["count"].dtype) == (torch.float32, torch.int64)
    assert torch.equal(state["weight"], torch.ones(3))


class Malice:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def write_malice(path: Path, form: str, marker: Path) -> None:
    content = {"weight": torch.ones(1), "payload": Malice(marker)}
    if form == "archive":
        torch.save(content, path)
    elif form == "archive, protocol 4":
        torch.save(content, path, pickle_protocol=4)
    elif form == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:  # a bare stream, by hand: push os.mkdir, push the tuple (marker,), call, stop
        path.write_bytes(f"cos\nmkdir\n(V{marker}\ntR.".encode())


@pytest.mark.parametrize("form", ["archive", "archive, protocol 4", "legacy", "bare stream"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, form: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / "checkpoint.pt"
    write_malice(path, form, marker)
    assert b"mkdir" in path.read_bytes(), "the file must hold the call"
    with pytest.raises(CheckpointError, match="holds other objects or code, which was not run"):
        load_state(path)
    assert not marker.exists()
    function, arguments = Malice(marker).__reduce__()
    function(*arguments)
    assert marker.exists(), "the call must be one that would have left a trace"


def test_whole_module_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="save the network's state_dict"):
        load_state(written(tmp_path, model))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"hello, this is a letter"])
def test_damaged_file_is_explained(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"damaged{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged.*expected .*; (download|save)"):
        load_state(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dictionary of tensors, got list"),
        ({}, "found no entries"),
        ({"weight": torch.ones(1), "epoch": 3}, "found entries that are none: epoch"),
        ({"weight": torch.tensor([1.0, float("nan")])}, "'weight' has NaN or infinite values"),
        ({"weight": torch.tensor([float("inf")])}, "'weight' has NaN or infinite values"),
        ({"weight": torch.ones(2, dtype=torch.complex64)}, "expected 'weight' to be a dense real tensor"),
        pytest.param(
            {"weight": torch.eye(2).to_sparse()},
            "expected 'weight' to be a dense real tensor",
            marks=pytest.mark.filterwarnings("ignore:Validating sparse"),
        ),
    ],
)
def test_unusable_content_is_explained(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_state(written(tmp_path, content))


def test_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a file, found none; check the path"):
        load_state(tmp_path / "absent.pt")


def changed(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "missing":
        return {key: value for key, value in state.items() if key != "fc2.bias"}
    if how == "unexpected":
        return {**state, "fc9.bias": torch.ones(1)}
    if how == "shape":
        return {**state, "fc2.bias": torch.ones(100)}
    return {**state, "fc2.bias": torch.ones(10, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "1 missing: fc2.bias"),
        ("unexpected", "1 unexpected: fc9.bias"),
        ("shape", r"1 wrong: 'fc2.bias' \(expected \(10,\), found \(100,\)\)"),
        ("dtype", r"1 wrong: 'fc2.bias' \(expected \(10,\), found \(10,\) int64\)"),
    ],
)
def test_mismatch_names_the_key_and_leaves_the_network(
    model: nn.Module, tmp_path: Path, how: str, message: str
) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    other = build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8), seed=9)
    path = written(tmp_path, changed(other.state_dict(), how))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_mismatch_lists_only_the_first_keys(model: nn.Module, tmp_path: Path) -> None:
    state = {f"layer{position}": torch.ones(1) for position in range(9)}
    with pytest.raises(CheckpointError, match="9 unexpected: layer0, layer1, layer2, layer3 and 5 more"):
        load_checkpoint(model, written(tmp_path, state))


def test_batch_counters_may_be_absent(model: nn.Module, tmp_path: Path) -> None:
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert len(state) < len(model.state_dict())
    load_checkpoint(model, written(tmp_path, state))


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")
    assert sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(CheckpointError, match="cannot be read"):
        sha256_file(tmp_path / "absent")


def test_save_refuses_other_suffixes_and_unwritable_places(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ending in .safetensors or .pt, got '.onnx'"):
        save_state(model, tmp_path / "model.onnx")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write checkpoint"):
        save_state(model, tmp_path / "file" / "model.pt")
