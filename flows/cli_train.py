"""The command `entprune train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from flows.operations import check_registry, register_trained
from flows.options import (
    DataOption,
    DataRootOption,
    DeviceOption,
    MeanOption,
    ModelOption,
    SeedOption,
    StdOption,
    VerboseOption,
    numbers,
)

EPILOG = """[bold]Examples[/bold]

Train a small network on the digits that come with scikit-learn, in seconds:

[cyan]entprune train --model digits_cnn --data digits --output dense.safetensors[/cyan]

Train a ResNet on a GPU:

[cyan]entprune train --model resnet20_cifar --data cifar10 --epochs 60 \\
  --batch-size 256 --lr 0.2 --device cuda --output resnet20.pt[/cyan]"""


def train(
    *,
    model: ModelOption,
    data: DataOption,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Checkpoint to write: .safetensors or .pt.")],
    data_root: DataRootOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Images in one step; 128 by default.")] = None,
    lr: Annotated[float | None, typer.Option(metavar="X", help="Peak of the learning rate; 0.05 by default.")] = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Register the dense network in MLflow, for `watch` to find.")
    ] = None,
    verbose: VerboseOption = False,  # noqa: ARG001 -- read by the outermost frame
) -> int:
    """Train a network by a plain, good recipe, for those who have no checkpoint yet."""
    from entprune.checkpoints import save_state
    from entprune.datasets import load_data
    from entprune.errors import CheckpointError
    from entprune.models import build_model
    from entprune.training import TrainConfig
    from entprune.training import train as train_network
    from flows.preflight import check_output_file
    from flows.progress_bar import RichReporter

    given = {"epochs": epochs, "batch_size": batch_size, "learning_rate": lr}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    config = TrainConfig(device=device, seed=seed, **chosen)
    if output.suffix not in {".safetensors", ".pt"}:
        raise CheckpointError(
            f"output '{output}': expected a name ending in .safetensors or .pt, got '{output.suffix}'."
        )
    check_output_file(output)
    check_registry(register)
    images = load_data(data, root=data_root, mean=numbers("mean", mean), std=numbers("std", std))
    network = build_model(model, num_classes=images.num_classes, input_shape=images.input_shape, seed=seed)
    with RichReporter() as reporter:
        result = train_network(
            network, images, config, lambda done, total, text: reporter.advanced("train", text, done, total)
        )
    save_state(result.model, output)
    console = Console(highlight=False)
    console.print(f"[bold]test accuracy[/bold]  {result.accuracy:.2f} %")
    console.print(f"[bold]checkpoint[/bold]     {escape(str(output))}", soft_wrap=True)
    if register is not None:
        tags = {"accuracy": result.accuracy, "data": images.name, "data_sha256": images.sha256, "seed": seed}
        console.print(f"[bold]registered[/bold]     {escape(register_trained(result.model, register, model, tags))}")
    return 0
