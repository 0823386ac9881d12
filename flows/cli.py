"""The command line: `entprune prune | sweep | report | log | train | evaluate | export | inspect | promote | ...`.

Results go to standard output, progress and errors to standard error. Exit code 0: done; 1: a failure that is not the
user's; 2: something that the user can mend, in one sentence; 3: a promotion was refused; 130: interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from flows import recording
from flows.cli_networks import EVALUATE_EPILOG, EXPORT_EPILOG, INSPECT_EPILOG, evaluate, export, inspect
from flows.cli_report import EPILOG as REPORT_EPILOG
from flows.cli_report import report
from flows.cli_sweep import EPILOG as SWEEP_EPILOG
from flows.cli_sweep import sweep
from flows.cli_train import EPILOG as TRAIN_EPILOG
from flows.cli_train import train
from flows.early_server import begun_server
from flows.operations import add_commands
from flows.options import (
    DataOption,
    DataRootOption,
    DeviceOption,
    KeepOption,
    MeanOption,
    ModelOption,
    SeedOption,
    StdOption,
    VerboseOption,
    numbers,
)

if TYPE_CHECKING:
    from flows.parameters import PruneParameters

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
    except SystemExit as leaving:
        if leaving.code != signal.SIGTERM:  # Ray's handler leaves with the bare number
            raise
        print("entprune: ended by SIGTERM; the same command goes on where it was", file=sys.stderr)  # noqa: T201 -- as errors
        return 128 + signal.SIGTERM
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
    finetune_batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Images in one step of it; 128 by default.")
    ] = None,
    distillation_weight: Annotated[
        float | None, typer.Option(metavar="W", help="Share of the dense network in its loss; 0.9 by default.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Prune and fine-tune in turns, so often; for very small networks.")
    ] = 1,
    calibration_samples: Annotated[
        int | None,
        typer.Option(metavar="N", help="Training images for the statistics; more by default for small networks."),
    ] = None,
    validation_samples: Annotated[
        int | None,
        typer.Option(metavar="N", help="Images of the validation split, or else of train, to compare candidates on."),
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
    low_rank: Annotated[
        bool, typer.Option("--low-rank", help="Also make two thin layers of each with correlated outputs.")
    ] = False,
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
        "finetune_learning_rate": finetune_lr, "finetune_batch_size": finetune_batch_size,
        "finetune_distillation_weight": distillation_weight, "rounds": rounds,
        "calibration_samples": calibration_samples, "validation_samples": validation_samples, "workers": workers,
        "gpus_per_worker": gpus_per_worker, "memory_per_worker": memory_per_worker, "ray_address": ray_address,
        "device": device, "register": register, "seed": seed, "keep": tuple(keep or ()), "low_rank": low_rank,
        "round_to": round_to, "minimum_channels": min_channels, "minimum_fraction": min_fraction, "output": output,
        "cache_dir": cache_dir,
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


# --- the other commands -----------------------------------------------------------------------------------------------

app.command(epilog=SWEEP_EPILOG)(sweep)
app.command(epilog=recording.EPILOG)(recording.log)
app.command(epilog=REPORT_EPILOG)(report)
app.command(epilog=TRAIN_EPILOG)(train)
app.command(epilog=EVALUATE_EPILOG)(evaluate)
app.command(epilog=EXPORT_EPILOG)(export)
app.command(epilog=INSPECT_EPILOG)(inspect)
add_commands(app)


if __name__ == "__main__":
    main()
