"""The portable artifact: what is loaded equals what was saved, nothing named in it is run, damage is noticed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import entprune.artifact
from entprune.artifact import ModelCard, load_model, read_card, save_model
from entprune.assembly import slice_network
from entprune.errors import ArtifactError, ConfigError, OutputError
from entprune.groups import find_groups
from entprune.models import build_model
from entprune.plan import GroupPlan, PruningPlan

ROOT = Path(__file__).resolve().parents[1]
TINY_CARD = ModelCard(
    model_spec=None, num_classes=2, input_shape=(1, 1, 3), mean=(), std=(), class_names=("left", "right")
)


class Separable(nn.Module):
    """A depthwise convolution, whose number of groups is its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.point = nn.Conv2d(1, width, 1)
        self.depth = nn.Conv2d(width, width, 3, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.depth(self.point(x))).mean((2, 3))
        return self.head(features)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped


def make_card(spec: str | None, input_shape: tuple[int, int, int]) -> ModelCard:
    channels = input_shape[0]
    return ModelCard(
        model_spec=spec, num_classes=10, input_shape=input_shape,
        mean=(0.5,) * channels, std=(0.25,) * channels, class_names=tuple("0123456789"),
    )  # fmt: skip


def prune_half(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[nn.Module, PruningPlan]:
    groups = find_groups(model, torch.zeros(2, *input_shape))
    plan = PruningPlan(
        groups=tuple(
            GroupPlan(
                name=group.name, num_channels=group.num_channels, kept_channels=tuple(range(0, group.num_channels, 2))
            )
            for group in groups.groups
        )
    )
    return slice_network(model, groups, plan).eval(), plan


def randomize_statistics(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)


def save_pruned(directory: Path, spec: str, input_shape: tuple[int, int, int]) -> nn.Module:
    model = build_model(spec, num_classes=10, input_shape=input_shape, seed=1).eval()
    randomize_statistics(model)
    smaller, plan = prune_half(model, input_shape)
    save_model(smaller, plan, make_card(spec, input_shape), directory)
    return smaller


def save_tiny(directory: Path, **changes: Any) -> nn.Module:
    model = nn.Linear(3, 2).eval()
    save_model(model, None, TINY_CARD, directory, **changes)
    return model


def compute(model: nn.Module, input_shape: tuple[int, int, int]) -> np.ndarray:
    images = torch.linspace(-1.0, 1.0, 2 * int(np.prod(input_shape))).reshape(2, *input_shape)
    with torch.no_grad():
        return np.asarray(model(images))


def edit_description(directory: Path, **changes: Any) -> None:
    """Change entries and renew the checksum, as another version of the program would write them."""
    path = directory / "model.json"
    description = json.loads(path.read_text()) | changes
    description["sha256"] = entprune.artifact._description_digest(description)
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("spec", "input_shape"),
    [
        ("digits_cnn", (1, 8, 8)),
        ("lenet", (1, 28, 28)),
        ("resnet20_cifar", (3, 32, 32)),
        ("torchvision:resnet18", (3, 32, 32)),
    ],
)
def test_loaded_network_equals_the_saved_one(tmp_path: Path, spec: str, input_shape: tuple[int, int, int]) -> None:
    smaller = save_pruned(tmp_path / "model", spec, input_shape)
    loaded = load_model(tmp_path / "model")
    assert not any(module.training for module in loaded.modules())
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in smaller.parameters())
    np.testing.assert_array_equal(compute(loaded, input_shape), compute(smaller, input_shape))
    assert repr(loaded) == repr(smaller)  # sizes in the attributes as well, for tools that read those


def test_fresh_process_computes_the_same(tmp_path: Path) -> None:
    shape = (1, 8, 8)
    smaller = save_pruned(tmp_path / "model", "digits_cnn", shape)
    np.save(tmp_path / "images.npy", torch.linspace(-1.0, 1.0, 128).reshape(2, *shape).numpy())
    program = (
        "import sys, numpy, torch; from pathlib import Path; from entprune.artifact import load_model; "
        "torch.set_num_threads(1); folder = Path(sys.argv[1]); model = load_model(folder / 'model'); "
        "outputs = model(torch.from_numpy(numpy.load(folder / 'images.npy'))); "
        "numpy.save(folder / 'outputs.npy', outputs.detach().numpy())"
    )
    completed = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stderr
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), compute(smaller, shape), rtol=1e-6, atol=1e-7)


def test_dense_network_without_plan(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", extra={"note": "dense"})
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    assert description["format_version"] == 1
    assert description["plan"] is None
    assert description["extra"] == {"note": "dense"}
    assert description["layers"] == {"": {"type": "Linear", "in_features": 3, "out_features": 2}}
    loaded = load_model(tmp_path / "model", model=nn.Linear(3, 2))
    np.testing.assert_array_equal(compute(loaded, (1, 1, 3)), compute(model, (1, 1, 3)))


def test_plan_is_kept_beside_the_weights(tmp_path: Path) -> None:
    model = build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8)).eval()
    smaller, plan = prune_half(model, (1, 8, 8))
    save_model(smaller, plan, make_card("digits_cnn", (1, 8, 8)), tmp_path / "model")
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    assert PruningPlan.from_dict(description["plan"]) == plan
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]


def test_output_folder_of_a_run_stands_for_the_network_in_it(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path / "model")
    loaded = load_model(tmp_path, model=nn.Linear(3, 2))
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)
    assert read_card(tmp_path) == read_card(tmp_path / "model")


def test_network_in_a_folder_below_is_not_taken_for_the_one_asked_for(tmp_path: Path) -> None:
    saved = save_tiny(tmp_path)
    save_model(nn.Linear(3, 2), None, TINY_CARD, tmp_path / "model")
    loaded = load_model(tmp_path, model=nn.Linear(3, 2))
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_depthwise_convolution_keeps_its_groups(tmp_path: Path) -> None:
    smaller = Separable(3).eval()
    randomize_statistics(smaller)
    save_model(smaller, None, TINY_CARD, tmp_path / "model")
    loaded = load_model(tmp_path / "model", model=Separable(8))
    assert loaded.get_submodule("depth").groups == 3
    np.testing.assert_array_equal(compute(loaded, (1, 5, 5)), compute(smaller, (1, 5, 5)))


def test_given_network_is_not_changed(tmp_path: Path) -> None:
    save_model(Separable(3).eval(), None, TINY_CARD, tmp_path / "model")
    dense = Separable(8).train()
    state = copy.deepcopy(dense.state_dict())
    load_model(tmp_path / "model", model=dense)
    assert dense.training
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in state.items())


def test_saving_does_not_change_the_network(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).double().train()
    save_model(model, None, TINY_CARD, tmp_path / "model")
    assert model.training
    assert model.weight.dtype == torch.float64
    assert load_model(tmp_path / "model", model=nn.Linear(3, 2)).weight.dtype == torch.float32


@pytest.mark.parametrize("spec", ["os:getcwd", "package.module:factory", None])
def test_code_named_in_the_artifact_is_not_run(tmp_path: Path, spec: str | None) -> None:
    card = ModelCard(model_spec=spec, num_classes=2, input_shape=(1, 1, 3), mean=(), std=(), class_names=())
    model = nn.Linear(3, 2).eval()
    save_model(model, None, card, tmp_path / "model")
    with pytest.raises(ArtifactError, match=r"build an unpruned instance yourself and pass it as model="):
        load_model(tmp_path / "model")
    loaded = load_model(tmp_path / "model", model=nn.Linear(3, 2))
    np.testing.assert_array_equal(compute(loaded, (1, 1, 3)), compute(model, (1, 1, 3)))


def test_every_damaged_byte_of_the_description_is_noticed(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    path = tmp_path / "model.json"
    original = path.read_bytes()
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="artifact"):
            read_card(tmp_path)


def test_every_flipped_byte_of_the_weights_is_noticed(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    path = tmp_path / "model.safetensors"
    original = path.read_bytes()
    for position in range(len(original)):
        path.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
        with pytest.raises(ArtifactError, match=r"model\.safetensors does not match its checksum"):
            load_model(tmp_path, model=nn.Linear(3, 2))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_cut_off_and_missing_files_are_noticed(tmp_path: Path, name: str) -> None:
    save_tiny(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=rf"{name} (is damaged|does not match its checksum)"):
        load_model(tmp_path, model=nn.Linear(3, 2))
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name}, found none"):
        load_model(tmp_path, model=nn.Linear(3, 2))


def test_unknown_version_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    edit_description(tmp_path, format_version=2)
    with pytest.raises(ArtifactError, match="expected format_version 1, got 2"):
        read_card(tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"layers": []}, "is incomplete"),
        ({"card": {}}, "card is incomplete"),
        ({"layers": {"": {"type": "Linear", "in_features": 10**12, "out_features": 2}}}, "expected 1 to 3"),
        ({"layers": {"": {"type": "Linear", "in_features": 0, "out_features": 2}}}, "expected 1 to 3"),
        ({"layers": {"": "Linear"}}, "is recorded as Linear"),
        ({"layers": {"other": {}}}, "is in only one of the two"),
        ({"layers": {"": {"type": "Linear", "in_features": 2, "out_features": 2}}}, "size mismatch"),
    ],
)
def test_contradictory_descriptions_are_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    save_tiny(tmp_path)
    edit_description(tmp_path, **changes)
    with pytest.raises(ArtifactError, match=problem):
        load_model(tmp_path, model=nn.Linear(3, 2))


def test_another_network_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(ArtifactError, match="is in only one of the two"):
        load_model(tmp_path, model=Separable(2))
    with pytest.raises(ArtifactError, match=r"is recorded as.*Linear.*Conv2d"):
        load_model(tmp_path, model=nn.Conv2d(3, 2, 1))


def test_network_with_infinite_weights_is_not_saved(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.bias, float("inf"))
    with pytest.raises(ArtifactError, match="NaN or infinity in 'bias'"):
        save_model(model, None, TINY_CARD, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="choose another folder"):
        save_tiny(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_failed_save_keeps_the_older_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model")

    def fail(*_: Any) -> None:
        raise OutputError("no room")

    monkeypatch.setattr(entprune.artifact, "atomic_write_text", fail)
    with pytest.raises(OutputError, match="no room"):
        save_tiny(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded = load_model(tmp_path / "model", model=nn.Linear(3, 2))
    np.testing.assert_array_equal(compute(loaded, (1, 1, 3)), compute(model, (1, 1, 3)))


def test_card_round_trip(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    assert read_card(tmp_path) == TINY_CARD


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_classes": 0}, "num_classes >= 1"),
        ({"input_shape": (3, 0, 32)}, "positive"),
        ({"mean": (0.5,), "std": ()}, "as many means"),
        ({"mean": (0.5,), "std": (0.0,)}, "positive deviations"),
    ],
)
def test_impossible_cards_are_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ModelCard(**(TINY_CARD.to_dict() | changes))
