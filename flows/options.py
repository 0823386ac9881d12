"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="SPEC",
        help="lenet, vgg16_cifar, resnet18_cifar, resnet20_cifar .. resnet56_cifar, digits_cnn, torchvision:NAME, or "
        "package.module:factory.",
    ),
]
DataOption = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="SPEC",
        help="digits, mnist, fashion_mnist, cifar10, cifar100, npz:FILE, imagefolder:DIR, or package.module:factory.",
    ),
]
SourceArgument = Annotated[
    str, typer.Argument(metavar="DIR|models:/NAME@ALIAS", help="Folder of a run or model, or a registered version.")
]
DataRootOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of mnist and the like, downloaded there if missing.")
]
MeanOption = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="Mean per channel that the network was trained with.")
]
StdOption = Annotated[str | None, typer.Option(metavar="R,G,B", help="Standard deviation per channel, likewise.")]
DeviceOption = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where the heavy work runs.")]
KeepOption = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Layers that must not change at all; may be repeated.")
]
SeedOption = Annotated[int, typer.Option(help="Of every random choice.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Show the engines' logs and full tracebacks.")]


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Read `0.49,0.48,0.45`.

    Raises:
        BadParameter: it is something else.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"expected numbers such as 0.49,0.48,0.45, got '{text}'", param_hint=f"--{option}"
        ) from None


def image_shape(text: str) -> tuple[int, int, int]:
    """Read `3,224,224`.

    Raises:
        BadParameter: it is something else.
    """
    try:
        channels, height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"expected channels, height and width such as 3,224,224, got '{text}'", param_hint="--input-shape"
        ) from None
    return channels, height, width
