"""The exported file: it runs without this package, repeats the network, and is complete or absent."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import entprune
import entprune.export
from entprune.artifact import ModelCard, save_model
from entprune.assembly import slice_network
from entprune.errors import ArtifactError, ConfigError, EntpruneError, OutputError
from entprune.export import METADATA_NAME, export_model
from entprune.groups import find_groups
from entprune.models import build_model
from entprune.plan import GroupPlan, PruningPlan
from tests.micro_networks import IMAGE_SHAPE, Chain, Concat, Depthwise, Residual, warm_up

ROOT = Path(__file__).resolve().parents[1]
DIGITS_SHAPE = (1, 8, 8)
BATCH_SIZES = (1, 3, 8)
SUFFIXES = (".pt2", ".onnx")

READERS = {
    ".pt2": """
import sys
sys.modules |= dict.fromkeys(("entprune", "tasks", "flows", "tests"))  # as if they were not installed
from pathlib import Path
import numpy, torch
torch.set_num_threads(1)
for path in Path().glob("*.pt2"):
    network = torch.export.load(path).module()
    images = numpy.load(path.stem + ".images.npz")
    numpy.savez(path.name + ".npz", **{key: network(torch.from_numpy(images[key])).numpy() for key in images})
""",
    ".onnx": """
import sys
sys.modules |= dict.fromkeys(("entprune", "tasks", "flows", "tests", "torch"))  # as if they were not installed
from pathlib import Path
import numpy, onnxruntime
for path in Path().glob("*.onnx"):
    network = onnxruntime.InferenceSession(path)
    images = numpy.load(path.stem + ".images.npz")
    numpy.savez(path.name + ".npz", **{key: network.run(None, {"images": images[key]})[0] for key in images})
""",
}


class FixedBatch(nn.Module):
    """Computes with its batch size, which the export takes for a constant."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * float(len(images))


class Unfollowable(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.sum().item() >= 0 else images.flatten(1) * 2


class Unconvertible(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.special.bessel_j0(images)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Chain()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(images), "mean": images.mean((1, 2, 3))}


def halve(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[nn.Module, PruningPlan]:
    groups = find_groups(model, torch.zeros(2, *input_shape))
    entries = [(group.name, group.num_channels, tuple(range(0, group.num_channels, 2))) for group in groups.groups]
    plan = PruningPlan(groups=tuple(GroupPlan(name=n, num_channels=c, kept_channels=kept) for n, c, kept in entries))
    return slice_network(model, groups, plan).eval(), plan


def make_loaded(folder: Path) -> nn.Module:
    """A pruned network as `entprune.load` gives it."""
    smaller, plan = halve(build_model("digits_cnn", num_classes=10, input_shape=DIGITS_SHAPE).eval(), DIGITS_SHAPE)
    card = ModelCard(model_spec="digits_cnn", num_classes=10, input_shape=DIGITS_SHAPE, mean=(), std=(), class_names=())
    save_model(smaller, plan, card, folder)
    return entprune.load(folder)


NETWORKS: dict[str, Callable[[Path], nn.Module]] = {
    "chain": lambda _: warm_up(Chain()),
    "concat": lambda _: warm_up(Concat()),
    "depthwise": lambda _: warm_up(Depthwise()),
    "sliced": lambda _: halve(warm_up(Residual()), IMAGE_SHAPE)[0],
    "loaded": make_loaded,
}


@pytest.fixture(scope="module", params=SUFFIXES)
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with each network's images and outputs, and with what a process without this package computed."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    for name, build in NETWORKS.items():
        network = build(tmp_path_factory.mktemp("saved"))
        shape = DIGITS_SHAPE if name == "loaded" else IMAGE_SHAPE
        images = {str(size): torch.randn(size, *shape) for size in BATCH_SIZES}
        with torch.inference_mode():
            np.savez(folder / f"{name}.expected.npz", **{key: network(value).numpy() for key, value in images.items()})
        np.savez(folder / f"{name}.images.npz", **{key: value.numpy() for key, value in images.items()})
        export_model(network, folder / f"{name}{request.param}", input_shape=shape)
    command = [sys.executable, "-c", READERS[request.param]]
    completed = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    return folder, request.param


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_file_repeats_the_network_without_this_package(name: str, answers: tuple[Path, str]) -> None:
    folder, suffix = answers
    with np.load(folder / f"{name}.expected.npz") as expected, np.load(folder / f"{name}{suffix}.npz") as found:
        assert set(found) == {str(size) for size in BATCH_SIZES}
        for size in found:
            np.testing.assert_allclose(found[size], expected[size], rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_result_says_what_was_written(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"chain{suffix}"
    result = export_model(warm_up(Chain()), str(path), input_shape=IMAGE_SHAPE)
    assert (result.path, result.num_bytes) == (path, path.stat().st_size)
    assert result.relative_difference <= 1e-5
    assert result.verified_by == {".pt2": "torch.export", ".onnx": "onnxruntime"}[suffix]
    assert names_in(tmp_path) == ["new", f"new/chain{suffix}"]


def test_metadata_travels_in_the_file(tmp_path: Path) -> None:
    metadata = {"mean": [0.5], "class_names": ["left", "right"]}
    for suffix in SUFFIXES:
        export_model(Chain(), tmp_path / f"chain{suffix}", input_shape=IMAGE_SHAPE, metadata=metadata)
    stored = {METADATA_NAME: ""}
    torch.export.load(tmp_path / "chain.pt2", extra_files=stored)
    assert json.loads(stored[METADATA_NAME]) == metadata
    session = onnxruntime.InferenceSession(tmp_path / "chain.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map[METADATA_NAME]) == metadata
    assert [(entry.name, entry.shape) for entry in session.get_inputs()] == [("images", ["batch", *IMAGE_SHAPE])]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_tells_nothing_of_the_code_it_was_made_from(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"chain{suffix}"
    export_model(Chain(), path, input_shape=IMAGE_SHAPE)
    content = path.read_bytes()
    assert str(ROOT).encode() not in content
    assert b"torch.flatten(x, 1)" not in content


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_given_network_stays_as_it_was(suffix: str, tmp_path: Path) -> None:
    model = warm_up(Chain())
    model.train()
    model.bn1.eval()
    model.conv2.requires_grad_(requires_grad=False)
    before = copy.deepcopy(model)
    export_model(model, tmp_path / f"chain{suffix}", input_shape=IMAGE_SHAPE)
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    state = before.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_copied_pruned_network_of_another_dtype_is_exported(suffix: str, tmp_path: Path) -> None:
    model = copy.deepcopy(halve(warm_up(Residual()), IMAGE_SHAPE)[0]).to("cpu", torch.float64)
    path = tmp_path / f"double{suffix}"
    export_model(model, path, input_shape=IMAGE_SHAPE)
    images = torch.randn(4, *IMAGE_SHAPE)
    answer, _ = (entprune.export._read_pt2 if suffix == ".pt2" else entprune.export._read_onnx)(path)
    with torch.inference_mode():
        (found,) = answer(images)
        torch.testing.assert_close(found.double(), model(images.double()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_several_outputs_are_all_compared(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"several{suffix}"
    assert export_model(Several(), path, input_shape=IMAGE_SHAPE).relative_difference <= 1e-5


def test_without_the_runtime_the_reference_implementation_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = export_model(warm_up(Chain()), tmp_path / "chain.onnx", input_shape=IMAGE_SHAPE)
    assert result.verified_by == "onnx.reference"
    assert result.relative_difference <= 1e-5


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("model", [Chain(), Unfollowable(), FixedBatch()], ids=lambda model: type(model).__name__)
def test_exporters_stay_quiet(
    model: nn.Module, suffix: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with suppress(ArtifactError):
            export_model(model, tmp_path / f"model{suffix}", input_shape=IMAGE_SHAPE)
    assert tuple(capfd.readouterr()) == ("", "")
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


# --- errors -----------------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) / 0.0


class Silent(nn.Module):
    def forward(self, images: Tensor) -> None:
        return None


BAD: dict[str, tuple[nn.Module, str, tuple[int, ...], type[EntpruneError], str]] = {
    "suffix": (Chain(), "x.pt", IMAGE_SHAPE, ConfigError, r"ending in \.pt2 or \.onnx, got '\.pt'"),
    "no suffix": (Chain(), "x", IMAGE_SHAPE, ConfigError, r"ending in \.pt2 or \.onnx, got ''"),
    "two sizes": (Chain(), "x.pt2", (6, 6), ConfigError, r"\(channels, height, width\), got \(6, 6\)"),
    "no pixel": (Chain(), "x.pt2", (2, 0, 6), ConfigError, r"positive .*, got \(2, 0, 6\)"),
    "other shape": (Chain(), "x.pt2", (3, 6, 6), ConfigError, r"refuses images of shape \(1, 3, 6, 6\) \(.*\); give"),
    "infinite": (Broken(), "x.pt2", IMAGE_SHAPE, ArtifactError, "got NaN or infinity"),
    "no output": (Silent(), "x.pt2", IMAGE_SHAPE, ArtifactError, "got no tensor"),
    "values": (Unfollowable(), "x.pt2", IMAGE_SHAPE, ArtifactError, r"exported \(Could not guard .*\); let its"),
    "values, onnx": (Unfollowable(), "x.onnx", IMAGE_SHAPE, ArtifactError, "cannot be exported"),
    "fixed batch": (FixedBatch(), "x.onnx", IMAGE_SHAPE, ArtifactError, "cannot be exported .* number of images"),
    "operation": (Unconvertible(), "x.onnx", IMAGE_SHAPE, ArtifactError, r"No ONNX function .*; write a \.pt2"),
    "below a file": (Chain(), "file/x.pt2", IMAGE_SHAPE, OutputError, r"cannot write '.*x\.pt2'"),
    "a folder": (Chain(), "folder.pt2", IMAGE_SHAPE, OutputError, r"cannot write '.*folder\.pt2'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_error_is_one_sentence_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    model, name, shape, kind, message = BAD[case]
    (tmp_path / "file").touch()
    (tmp_path / "folder.pt2").mkdir()
    before = names_in(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        export_model(model, tmp_path / name, input_shape=shape)
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_package_is_named_with_its_remedy(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf'found no {package}; run `pip install "entprune\[onnx\]"`'):
        export_model(Chain(), tmp_path / "x.onnx", input_shape=IMAGE_SHAPE)
    export_model(Chain(), tmp_path / "x.pt2", input_shape=IMAGE_SHAPE)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_file_is_noticed_and_the_older_one_stays(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_text("older")
    monkeypatch.setattr(entprune.export, "_encode", lambda *_: b"damaged")
    with pytest.raises(ArtifactError, match="cannot be run"):
        export_model(Chain(), path, input_shape=IMAGE_SHAPE)
    assert path.read_text() == "older"
    assert names_in(tmp_path) == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "change", [lambda value: value * 1.001, lambda value: value * torch.nan, lambda value: value[:1]]
)
def test_other_outputs_are_noticed(
    suffix: str, change: Callable[[Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = entprune.export._encode

    def encode_other(network: nn.Module, *given: object) -> bytes:
        return encode(Changed(network, change), *given)  # type: ignore[arg-type]

    monkeypatch.setattr(entprune.export, "_encode", encode_other)
    with pytest.raises(
        ArtifactError, match=r"expected outputs within 0\.0001 .* relative difference of (1\.0e-03|nan|inf)"
    ):
        export_model(warm_up(Chain()), tmp_path / f"x{suffix}", input_shape=IMAGE_SHAPE)
    assert names_in(tmp_path) == []


class Changed(nn.Module):
    def __init__(self, network: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(self.network(images))
