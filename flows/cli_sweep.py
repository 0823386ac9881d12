"""`entprune sweep`: what it takes and what it prints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from flows.early_server import begun_server
from flows.options import VerboseOption
from flows.recording import unrecorded_lines

if TYPE_CHECKING:
    from flows.sweep_parameters import SweepParameters

EPILOG = """[bold]Examples[/bold]

A description such as infra/sweeps/lenet.yaml holds what all settings have in common and what they differ by:

[cyan]entprune sweep infra/sweeps/lenet.yaml --output runs/sweep[/cyan]"""


def sweep(
    *,
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="Base, grid or random ranges, and rule.")],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the results, in place of the file's.")
    ] = None,
    verbose: VerboseOption = False,
) -> int:
    """Try many settings on one network, share what they have in common, and keep the best result.

    Settings are compared on validation images; the test images are read for the chosen network alone.
    """
    if verbose:
        os.environ.update({"PREFECT_LOGGING_LEVEL": "INFO", "MLFLOW_LOGGING_LEVEL": "INFO"})
    with begun_server():
        from flows.sweep_parameters import read_sweep

        parameters = read_sweep(config, {} if output is None else {"output": output})
        content = _run(parameters)
    _show(content, parameters)
    return 0 if content["chosen"]["certificate"]["passed"] else 1


def _run(parameters: SweepParameters) -> dict[str, Any]:
    from flows.engines import started_engines
    from flows.preflight import hand_over
    from flows.progress_bar import RichReporter
    from flows.sweep_inputs import preflight_sweep

    with RichReporter() as reporter:
        reporter.started("check the input")
        inputs = preflight_sweep(parameters)
        settings = [setting.parameters for setting in parameters.settings()]
        with started_engines(zip(inputs, settings, strict=True), reporter), hand_over(parameters, inputs):
            from flows.server import run_flow
            from flows.sweep import sweep as sweep_flow

            content: dict[str, Any] = run_flow(sweep_flow, parameters)
    return content


def _show(content: dict[str, Any], parameters: SweepParameters) -> None:
    from flows.tables import sweep_table

    console = Console(highlight=False)
    console.print()
    console.print(sweep_table(content))
    chosen, output = content["chosen"], parameters.output
    figures = chosen["fine_tuned"] or chosen["one_shot"]
    lines = [
        ("chosen", f"#{chosen['number']}, {content['settings'][chosen['number']]['label']}"),
        ("test", f"{figures['accuracy']:.2f} % ({-figures['accuracy_drop']:+.2f} points), of the chosen network alone"),
        ("plot", str(output / "sweep.html")),
        ("report", str(output / "chosen" / "report.html")),
        ("model", str(output / "chosen" / "model")),
    ]
    if parameters.register is not None and chosen["registered_version"] is not None:
        lines.append(("registered", f"models:/{parameters.register}/{chosen['registered_version']}"))
    lines += unrecorded_lines(output)
    for title, text in lines:
        console.print(f"[bold]{title:<11}[/bold]{escape(text)}", soft_wrap=True)
    if not chosen["budget_met"]:
        Console(stderr=True, highlight=False).print("[yellow]note[/yellow]       no setting met the budget.")
