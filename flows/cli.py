"""The command line: `entprune prune | sweep | report | log | train | evaluate | export | inspect | promote | ...`.

Results go to standard output, progress and errors to standard error. Exit code 0: done; 1: a failure that is not the
user's; 2: something that the user can mend, in one sentence; 3: a promotion was refused; 130: interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from flows import recording
from flows.cli_report import EPILOG as REPORT_EPILOG
from flows.cli_report import report
from flows.cli_sweep import EPILOG as SWEEP_EPILOG
from flows.cli_sweep import sweep
from flows.operations import add_commands, check_registry, register_trained
from flows.options import (
    DataOption,
    DataRootOption,
    DeviceOption,
    KeepOption,
    MeanOption,
    ModelOption,
    SeedOption,
    SourceArgument,
    StdOption,
    VerboseOption,
    image_shape,
    numbers,
)
from flows.own_server import begun_server

if TYPE_CHECKING:
    from entprune.stages import Network
    from flows.parameters import PruneParameters
    from flows.tables import GroupRow

app = typer.Typer(
    name="entprune",
    help="Shrink pretrained convolutional networks: a checkpoint, data and a budget go in, a smaller network and its "
    "evidence come out.",
    epilog="[bold]Try it[/bold]  entprune train --model digits_cnn --data digits --output dense.safetensors",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(given))


def _run(arguments: list[str]) -> int:
    try:
        code = app(arguments, prog_name="entprune", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:  # noqa: BLE001 -- the outermost frame: whatever happened becomes one sentence
        return _explain(error, is_verbose="--verbose" in arguments)
    return code if isinstance(code, int) else 0


def _explain(error: Exception, *, is_verbose: bool) -> int:
    """Print one sentence about an error and return the exit code."""
    from tasks.redaction import redact

    if is_verbose:
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")  # noqa: T201 -- as Python does
    if hasattr(error, "format_message"):  # a usage error
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "entprune"
        _print_error(f"{error.format_message().rstrip('.')}; see `{command} --help`.")
        return 2
    mendable = _find_mendable(error)
    if mendable is not None:
        _print_error(str(mendable))
        return 2
    hint = "" if is_verbose else "; run again with --verbose for the traceback"
    _print_error(redact(f"unexpected {type(error).__name__}: {str(error).rstrip('.') or 'no message'}{hint}."))
    return 1


def _find_mendable(error: BaseException) -> BaseException | None:
    """The user's error in a chain of causes: an engine may have wrapped it."""
    errors = sys.modules.get("entprune.errors")
    link: BaseException | None = error
    while errors is not None and link is not None:
        if isinstance(link, errors.EntpruneError):
            return link
        link = link.__cause__ or link.__context__
    return None


def _print_error(sentence: str) -> None:
    print(f"entprune: error: {' '.join(sentence.split())}", file=sys.stderr)  # noqa: T201 -- unwrapped, for scripts


# --- prune ------------------------------------------------------------------------------------------------------------


@app.command(
    epilog="""[bold]Examples[/bold]

Lose at most half an accuracy point, and be as small as that allows:

[cyan]entprune prune --model lenet --checkpoint lenet.pt --data mnist \\
  --max-accuracy-drop 0.5 --output runs/lenet[/cyan]

Remove 60 % of the multiply-accumulates, fine-tune, and register the result:

[cyan]entprune prune --model torchvision:resnet18 --checkpoint r18.pt \\
  --data imagefolder:flowers --macs-removed 0.6 --finetune-epochs 5 \\
  --register flowers --output runs/flowers[/cyan]

Work on a Ray cluster, two workers on each GPU, and leave the first layer alone:

[cyan]entprune prune --model vgg16_cifar --checkpoint vgg.pt --data cifar10 \\
  --parameters-removed 0.8 --ray-address ray://head:10001 --device cuda \\
  --gpus-per-worker 0.5 --keep features.0 --output runs/vgg[/cyan]"""
)
def prune(
    *,
    model: ModelOption,
    checkpoint: Annotated[Path, typer.Option(metavar="FILE", help="Trained parameters: .pt, .pth or .safetensors.")],
    data: DataOption,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the report and the smaller network.")],
    max_accuracy_drop: Annotated[
        float | None, typer.Option(metavar="POINTS", help="Smallest network that loses at most so many points.")
    ] = None,
    parameters_removed: Annotated[
        float | None, typer.Option(metavar="FRACTION", help="Remove this fraction of the parameters.")
    ] = None,
    macs_removed: Annotated[
        float | None, typer.Option(metavar="FRACTION", help="Remove this fraction of the multiply-accumulates.")
    ] = None,
    latency_removed: Annotated[
        float | None, typer.Option(metavar="FRACTION", help="Remove this fraction of the CPU latency, measured here.")
    ] = None,
    latency_batch: Annotated[int, typer.Option(metavar="N", help="Images at once where latency is measured.")] = 64,
    data_root: DataRootOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    finetune_epochs: Annotated[int, typer.Option(metavar="N", help="Epochs of distillation afterwards.")] = 0,
    finetune_lr: Annotated[
        float | None, typer.Option(metavar="X", help="Peak of its learning rate; 0.02 by default.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Prune and fine-tune in turns, so often; for very small networks.")
    ] = 1,
    calibration_samples: Annotated[
        int | None,
        typer.Option(metavar="N", help="Training images for the statistics; more by default for small networks."),
    ] = None,
    validation_samples: Annotated[
        int | None, typer.Option(metavar="N", help="Further training images that candidates are compared on.")
    ] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Parallel workers; all cores by default.")] = None,
    gpus_per_worker: Annotated[float, typer.Option(metavar="X", help="GPUs each worker reserves; may be 0.5.")] = 0.0,
    memory_per_worker: Annotated[
        float | None, typer.Option(metavar="GIB", help="Memory each worker reserves; estimated by default, 0 for none.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Ray cluster to use; this machine by default.")
    ] = None,
    device: DeviceOption = "cpu",
    register: Annotated[str | None, typer.Option(metavar="NAME", help="Register the result in MLflow.")] = None,
    seed: SeedOption = 0,
    keep: KeepOption = None,
    round_to: Annotated[
        int, typer.Option(metavar="N", help="Widths of layers are multiples of N; 8 suits most hardware.")
    ] = 1,
    min_channels: Annotated[int, typer.Option(metavar="N", help="Channels that every group keeps at least.")] = 1,
    min_fraction: Annotated[
        float, typer.Option(metavar="FRACTION", help="The same as a fraction of its channels.")
    ] = 0.0,
    cache_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder or URI where results are kept for the next run.")
    ] = None,
    verbose: VerboseOption = False,
) -> int:
    """Prune a network to a budget and write the smaller one with its evidence.

    Give --max-accuracy-drop, --parameters-removed, --macs-removed or --latency-removed, or several of them: then the
    smallest network is searched that loses at most so much and removes at least so much.
    """
    options = {
        "model": model, "checkpoint": checkpoint, "data": data, "data_root": data_root,
        "mean": numbers("mean", mean), "std": numbers("std", std), "max_accuracy_drop": max_accuracy_drop,
        "parameters_removed": parameters_removed, "macs_removed": macs_removed,
        "latency_removed": latency_removed, "latency_batch": latency_batch, "finetune_epochs": finetune_epochs,
        "finetune_learning_rate": finetune_lr, "rounds": rounds,
        "calibration_samples": calibration_samples, "validation_samples": validation_samples, "workers": workers,
        "gpus_per_worker": gpus_per_worker, "memory_per_worker": memory_per_worker, "ray_address": ray_address,
        "device": device, "register": register, "seed": seed, "keep": tuple(keep or ()), "round_to": round_to,
        "minimum_channels": min_channels, "minimum_fraction": min_fraction, "output": output, "cache_dir": cache_dir,
    }  # fmt: skip
    return _prune({name: value for name, value in options.items() if value is not None}, is_verbose=verbose)


def _prune(options: dict[str, Any], *, is_verbose: bool) -> int:
    if is_verbose:
        os.environ.update({"PREFECT_LOGGING_LEVEL": "INFO", "MLFLOW_LOGGING_LEVEL": "INFO"})
    with begun_server():
        report, parameters = _run_flow(options)
    _show_result(report, parameters.output, parameters.register)
    return 0 if report["certificate"]["passed"] else 1


def _run_flow(options: dict[str, Any]) -> tuple[dict[str, Any], PruneParameters]:
    from flows.engines import started_engines
    from flows.parameters import parse_parameters
    from flows.preflight import hand_over, preflight
    from flows.progress_bar import RichReporter

    parameters = parse_parameters(options)
    with RichReporter() as reporter:
        reporter.started("check the input")
        inputs = preflight(parameters)
        with started_engines([(inputs, parameters)], reporter), hand_over(parameters, inputs):
            from flows.prune_model import prune_model
            from flows.server import run_flow

            return run_flow(prune_model, parameters), parameters


def _show_result(report: dict[str, Any], output: Path, register: str | None) -> None:
    from flows.tables import result_table

    console = Console(highlight=False)
    console.print()
    console.print(result_table(report))
    lineage = report.get("lineage", {})
    lines = [("report", str(output / "report.html")), ("model", str(output / "model"))]
    lines.append(("load", f'entprune.load("{output / "model"}")'))
    if register is not None and lineage.get("registered_version") is not None:
        lines.append(("registered", f"models:/{register}/{lineage['registered_version']}"))
    if "MLFLOW_TRACKING_URI" not in os.environ:
        lines.append(("runs", "mlflow ui --backend-store-uri sqlite:///mlflow.db"))
    lines += recording.unrecorded_lines(output)
    for title, text in lines:
        console.print(f"[bold]{title:<11}[/bold]{escape(text)}", soft_wrap=True)
    for warning in report.get("warnings", ()):
        Console(stderr=True, highlight=False).print(
            f"[yellow]note[/yellow]       {escape(str(warning))}", soft_wrap=True
        )


# --- sweep ------------------------------------------------------------------------------------------------------------

app.command(epilog=SWEEP_EPILOG)(sweep)
app.command(epilog=recording.EPILOG)(recording.log)


# --- report -----------------------------------------------------------------------------------------------------------

app.command(epilog=REPORT_EPILOG)(report)


# --- train ------------------------------------------------------------------------------------------------------------


@app.command(
    epilog="""[bold]Examples[/bold]

Train a small network on the digits that come with scikit-learn, in seconds:

[cyan]entprune train --model digits_cnn --data digits --output dense.safetensors[/cyan]

Train a ResNet on a GPU:

[cyan]entprune train --model resnet20_cifar --data cifar10 --epochs 60 \\
  --device cuda --output resnet20.pt[/cyan]"""
)
def train(
    *,
    model: ModelOption,
    data: DataOption,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Checkpoint to write: .safetensors or .pt.")],
    data_root: DataRootOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Passes over the training images.")] = None,
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

    config = TrainConfig(device=device, seed=seed)
    if epochs is not None:
        config = replace(config, epochs=epochs)
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


# --- evaluate ---------------------------------------------------------------------------------------------------------


@app.command(
    epilog="""[bold]Examples[/bold]

Measure the network that a run wrote:

[cyan]entprune evaluate runs/lenet --data mnist --data-root data[/cyan]

Measure the version that was registered last:

[cyan]entprune evaluate models:/flowers@challenger --data imagefolder:flowers[/cyan]"""
)
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


# --- export -----------------------------------------------------------------------------------------------------------


@app.command(
    epilog="""[bold]Examples[/bold]

For PyTorch, without entprune and without the network's code:

[cyan]entprune export runs/lenet --output lenet.pt2[/cyan]

For ONNX Runtime and most inference engines:

[cyan]entprune export models:/flowers@challenger --output flowers.onnx[/cyan]"""
)
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


# --- inspect ----------------------------------------------------------------------------------------------------------


@app.command(
    epilog="""[bold]Examples[/bold]

[cyan]entprune inspect --model vgg16_cifar[/cyan]

[cyan]entprune inspect --model torchvision:resnet50[/cyan]

[cyan]entprune inspect --model my_package.networks:build --input-shape 1,64,64 \\
  --checkpoint trained.pt[/cyan]"""
)
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

    widths = {group.name: group.num_channels for group in network.groups.groups}
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


add_commands(app)


if __name__ == "__main__":
    main()
