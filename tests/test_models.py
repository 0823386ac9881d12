"""Built-in networks: sizes, tracing, the padded shortcut, and how specifications are resolved."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import fx

from entprune.errors import ModelError
from entprune.models import MODEL_NAMES, PaddedShortcut, build_model, is_code_spec
from entprune.models.lenet import build_lenet
from entprune.models.resnet import build_cifar_resnet

GREYSCALE = {"lenet": (1, 28, 28), "digits_cnn": (1, 8, 8)}


def input_shape_of(name: str) -> tuple[int, int, int]:
    return GREYSCALE.get(name, (3, 32, 32))


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("lenet", 431_080),
        ("vgg16_cifar", 14_728_266),
        ("resnet18_cifar", 11_173_962),
        ("resnet20_cifar", 269_722),
        ("resnet56_cifar", 853_018),
    ],
)
def test_parameter_count(name: str, num_parameters: int) -> None:
    model = build_model(name, num_classes=10, input_shape=input_shape_of(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_traced_network_gives_the_same_logits(name: str) -> None:
    model = build_model(name, num_classes=7, input_shape=input_shape_of(name)).eval()
    images = torch.randn(2, *input_shape_of(name))
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(fx.symbolic_trace(model)(images), logits)
    assert logits.shape == (2, 7)


def test_vgg_key_names_are_torchvisions() -> None:
    import torchvision

    ours = build_model("vgg16_cifar", num_classes=10, input_shape=(3, 32, 32)).state_dict()
    with torch.device("meta"):
        theirs = torchvision.models.vgg16_bn().features.state_dict()
    expected = {f"features.{key}": value.shape for key, value in theirs.items()}
    assert {key: value.shape for key, value in ours.items() if key.startswith("features.")} == expected


def test_padded_shortcut_subsamples_and_pads_both_sides() -> None:
    images = torch.randn(2, 4, 5, 6)
    padded = PaddedShortcut(stride=2, in_channels=4, out_channels=9)(images)
    assert padded.shape == (2, 9, 3, 3)
    torch.testing.assert_close(padded[:, 2:6], images[:, :, ::2, ::2])
    assert padded[:, :2].abs().sum() == 0
    assert padded[:, 6:].abs().sum() == 0


def test_only_stage_changes_have_a_padded_shortcut() -> None:
    model = build_model("resnet20_cifar", num_classes=10, input_shape=(3, 32, 32))
    names = [name for name, module in model.named_modules() if isinstance(module, PaddedShortcut)]
    assert names == ["layer2.0.shortcut", "layer3.0.shortcut"]


def test_lenet_takes_other_channels_and_sizes() -> None:
    assert build_lenet(num_classes=5, in_channels=3, image_size=32)(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_initial_parameters_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    state_before = torch.get_rng_state()
    first = build_model("lenet", num_classes=10, input_shape=(1, 28, 28), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state_before)
    torch.manual_seed(2)
    second = build_model("lenet", num_classes=10, input_shape=(1, 28, 28), seed=3).state_dict()
    other = build_model("lenet", num_classes=10, input_shape=(1, 28, 28), seed=4).state_dict()
    assert torch.equal(first["conv1.weight"], second["conv1.weight"])
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_torchvision_network() -> None:
    model = build_model("torchvision:mobilenet_v3_small", num_classes=4, input_shape=(3, 64, 64)).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


def test_factory_gets_the_number_of_classes_only_if_it_accepts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "from torch import nn\n"
        "def sized(num_classes):\n    return nn.Linear(4, num_classes)\n"
        "def fixed():\n    return nn.Linear(4, 3)\n"
        "def wrong():\n    return 'linear'\n"
        "def broken():\n    raise ValueError('no weights')\n"
    )
    (tmp_path / "entprune_test_nets.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    shape = (1, 2, 2)
    sized = build_model("entprune_test_nets:sized", num_classes=6, input_shape=shape)
    fixed = build_model("entprune_test_nets:fixed", num_classes=6, input_shape=shape)
    assert (sized.out_features, fixed.out_features) == (6, 3)
    with pytest.raises(ModelError, match=r"expected it to return a torch.nn.Module, got str"):
        build_model("entprune_test_nets:wrong", num_classes=6, input_shape=shape)
    with pytest.raises(ModelError, match="failed with ValueError: no weights"):
        build_model("entprune_test_nets:broken", num_classes=6, input_shape=shape)
    with pytest.raises(ModelError, match="expected a function 'absent'"):
        build_model("entprune_test_nets:absent", num_classes=6, input_shape=shape)
    sys.modules.pop("entprune_test_nets")


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("lenett", (1, 28, 28), "unknown model 'lenett': did you mean lenet"),
        ("something", (1, 28, 28), "unknown model 'something': expected one of lenet, "),
        ("torchvision:resnet81", (3, 32, 32), "unknown torchvision classifier 'resnet81': did you mean resnet18"),
        ("torchvision:resnet18", (1, 32, 32), "expected images with 3 channels, got 1"),
        ("no_such_package.nets:build", (3, 32, 32), "cannot import module 'no_such_package.nets'"),
        ("lenet", (1, 12, 12), "at least 16x16, got 12x12"),
        ("lenet", (1, 28, 30), "expected square images, got 28x30"),
        ("vgg16_cifar", (3, 28, 28), "at least 32x32, got 28x28"),
        ("lenet", (1, 0, 28), "positive .channels, height, width."),
    ],
)
def test_unusable_specification_is_explained(spec: str, shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(spec, num_classes=10, input_shape=shape)


def test_depth_must_be_6n_plus_2() -> None:
    with pytest.raises(ModelError, match=r"6n\+2 .*, got 21"):
        build_cifar_resnet(21)


@pytest.mark.parametrize(
    ("spec", "is_code"),
    [
        ("package.module:factory", True),
        ("module:factory", True),
        ("lenet", False),
        ("torchvision:resnet18", False),
        ("npz:data", False),
        ("imagefolder:photos", False),
        ("models:name", False),
        ("package.module:", False),
        ("../package:factory", False),
        ("os:system('x')", False),
    ],
)
def test_code_is_recognised(spec: str, is_code: bool) -> None:
    assert is_code_spec(spec) is is_code
