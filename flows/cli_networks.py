"""Commands that read one network: `entprune evaluate`, `export` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from flows.options import (
    DataOption,
    DataRootOption,
    DeviceOption,
    KeepOption,
    MeanOption,
    ModelOption,
    SourceArgument,
    StdOption,
    VerboseOption,
    image_shape,
    numbers,
)

if TYPE_CHECKING:
    from entprune.stages import Network
    from flows.tables import GroupRow

EVALUATE_EPILOG = """[bold]Examples[/bold]

Measure the network that a run wrote:

[cyan]entprune evaluate runs/lenet --data mnist --data-root data[/cyan]

Measure the version that was registered last:

[cyan]entprune evaluate models:/flowers@challenger --data imagefolder:flowers[/cyan]"""

EXPORT_EPILOG = """[bold]Examples[/bold]

For PyTorch, without entprune and without the network's code:

[cyan]entprune export runs/lenet --output lenet.pt2[/cyan]

For ONNX Runtime and most inference engines:

[cyan]entprune export models:/flowers@challenger --output flowers.onnx[/cyan]"""

INSPECT_EPILOG = """[bold]Examples[/bold]

[cyan]entprune inspect --model vgg16_cifar[/cyan]

[cyan]entprune inspect --model torchvision:resnet50[/cyan]

[cyan]entprune inspect --model my_package.networks:build --input-shape 1,64,64 \\
  --checkpoint trained.pt[/cyan]"""


def evaluate(
    *,
    source: SourceArgument,
    data: DataOption,
    data_root: DataRootOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    device: DeviceOption = "cpu",
    verbose: VerboseOption = False,  # noqa: ARG001 -- read by the outermost frame
) -> int:
    """Measure a pruned network on the test images: accuracy, size, speed.

    Images are normalised as the network was trained unless --mean and --std say otherwise.
    """
    from entprune.evaluation import measure
    from flows.sources import load_matching_data, load_network
    from flows.tables import evaluation_table

    network, card = load_network(source)
    images = load_matching_data(data, data_root, numbers("mean", mean), numbers("std", std), card)
    measured = measure(network, images.test, images.input_shape, device=device)
    Console(highlight=False).print(
        evaluation_table(
            source,
            accuracy=measured.accuracy,
            parameters=measured.parameters,
            macs=measured.macs,
            latency_ms=measured.latency_ms,
            num_images=len(images.test),
        )
    )
    return 0


def export(
    *,
    source: SourceArgument,
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="File to write: .pt2 for PyTorch, .onnx for other engines.")
    ],
    input_shape: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Of one image, for a network that does not say it itself.")
    ] = None,
    verbose: VerboseOption = False,  # noqa: ARG001 -- read by the outermost frame
) -> int:
    """Write a pruned network as one file that runs without entprune.

    The file takes any number of images, normalised as for training; it is read back and compared with the network.
    """
    from entprune.export import check_export_path, export_model
    from flows.preflight import check_output_file
    from flows.sources import find_input_shape, load_network
    from flows.tables import export_lines

    check_export_path(output)
    check_output_file(output)
    network, card = load_network(source)
    shape = find_input_shape(source, card) if input_shape is None else image_shape(input_shape)
    exported = export_model(network, output, input_shape=shape, metadata={**card, "input_shape": shape})
    console = Console(highlight=False)
    for title, text in export_lines(exported, shape, card):
        console.print(f"[bold]{title:<11}[/bold]{escape(text)}", soft_wrap=True)
    return 0


def inspect(
    *,
    model: ModelOption,
    checkpoint: Annotated[Path | None, typer.Option(metavar="FILE", help="Check that it fits, too.")] = None,
    input_shape: Annotated[
        str | None, typer.Option(metavar="C,H,W", help="Of one image; the built-in networks know theirs.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(metavar="N", help="10, or 1000 for torchvision's.")] = None,
    keep: KeepOption = None,
    verbose: VerboseOption = False,  # noqa: ARG001 -- read by the outermost frame
) -> int:
    """Show what can be pruned in a network, and why the rest cannot.

    Fails if nothing can be pruned.
    """
    from entprune.checkpoints import load_checkpoint
    from entprune.config import PruneConfig
    from entprune.models import build_model
    from entprune.stages import analyse
    from flows.tables import group_table, unprunable_table

    shape = image_shape(input_shape) if input_shape is not None else _usual_shape(model)
    classes = num_classes or (1000 if model.startswith("torchvision:") else 10)
    network = build_model(model, num_classes=classes, input_shape=shape)
    if checkpoint is not None:
        load_checkpoint(network, checkpoint)
    analysed = analyse(network, shape, PruneConfig(keep=tuple(keep or ())))
    console = Console(highlight=False)
    console.print(group_table(_group_rows(analysed)))
    console.print(unprunable_table([(entry.layer, entry.reason) for entry in analysed.groups.unprunable]))
    return 0


def _group_rows(network: Network) -> list[GroupRow]:
    from flows.tables import GroupRow

    widths = network.full_widths()
    totals = {"parameters": network.cost.parameters(widths), "macs": network.cost.macs(widths)}
    rows = []
    for group in network.groups.groups:
        shares: dict[str, float] = {}
        for objective in ("parameters", "macs"):
            cost = network.cost.along(group.name, widths, group.num_channels, objective)
            shares[objective] = float(cost[-1] - cost[0]) / totals[objective]
        rows.append(
            GroupRow(
                name=group.name,
                channels=group.num_channels,
                producers=[piece.layer for piece in group.producers],
                consumers=[piece.layer for piece in group.consumers],
                **shares,
            )
        )
    return rows


def _usual_shape(model: str) -> tuple[int, int, int]:
    known = {"lenet": (1, 28, 28), "digits_cnn": (1, 8, 8)}
    return known.get(model, (3, 224, 224) if model.startswith("torchvision:") else (3, 32, 32))
