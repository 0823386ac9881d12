"""Commands that operate what was pruned: `entprune promote | rollback | schedule`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from flows.options import DataRootOption, DeviceOption, VerboseOption, numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

REFUSED = 3  # exit code: a verdict, neither a failure nor bad input


def add_commands(app: typer.Typer) -> None:
    """Make the commands of this module known to the command line."""
    app.command(epilog=_PROMOTE_EXAMPLES)(promote)
    app.command(epilog=_ROLLBACK_EXAMPLES)(rollback)
    further = {"allow_extra_args": True, "ignore_unknown_options": True}  # those of `prune`
    app.command(epilog=_SCHEDULE_EXAMPLES, context_settings=further)(schedule)


NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Registered model.")]

_PROMOTE_EXAMPLES = """[bold]Examples[/bold]

Judge the version that was registered last by what its run recorded:

[cyan]entprune promote flowers[/cyan]

Measure version 7 again on the test images, and allow half a point:

[cyan]entprune promote flowers 7 --data imagefolder:flowers --max-accuracy-drop 0.5[/cyan]"""

_ROLLBACK_EXAMPLES = """[bold]Examples[/bold]

[cyan]entprune rollback flowers[/cyan]"""

_SCHEDULE_EXAMPLES = """[bold]Examples[/bold]

Every night at two:

[cyan]prefect server start &
export PREFECT_API_URL=http://127.0.0.1:4200/api
entprune schedule --cron "0 2 * * *" --model lenet --checkpoint lenet.pt \\
  --data mnist --max-accuracy-drop 0.5 --register lenet --output runs/nightly[/cyan]"""


def promote(
    *,
    name: NameArgument,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Its number or alias.")] = "challenger",
    max_accuracy_drop: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS", help="Allowed beside the dense network; by default the version's own budget, or 1."
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Measure again on the test images of the pruning run's data.")
    ] = None,
    data_root: DataRootOption = None,
    device: DeviceOption = "cpu",
    verbose: VerboseOption = False,  # noqa: ARG001 -- read by the outermost frame
) -> int:
    """Make a registered version the champion, if it passes.

    It passes if its certificate did, its accuracy is within the allowed drop of the dense network, and it is smaller or
    faster than the present champion. The reason is written on the version. Exit code 3: it was refused.
    """
    from flows.promote import parse_promotion

    options = {
        "name": name, "version": version, "max_accuracy_drop": max_accuracy_drop, "data": data,
        "data_root": data_root, "device": device,
    }  # fmt: skip
    parameters = parse_promotion({key: value for key, value in options.items() if value is not None})
    verdict = _run_flow(name, version, lambda flows: flows.promote(parameters))
    outcome = f"version {verdict['version']} of '{name}'"
    if not verdict["accepted"]:
        sentence = f"{outcome} was not promoted: {verdict['reason']}."
        print(f"entprune: refused: {sentence}", file=sys.stderr)  # noqa: T201 -- unwrapped, for scripts
        return REFUSED
    _say(f"[bold]champion[/bold]   {escape(outcome)}: {escape(verdict['reason'])}")
    return 0


def rollback(*, name: NameArgument, verbose: VerboseOption = False) -> int:  # noqa: ARG001 -- read by the outermost frame
    """Put the previous champion back."""
    from flows.parameters import require_registry_name

    require_registry_name("NAME", name)
    done = _run_flow(name, "champion", lambda flows: flows.rollback(name))
    _say(f"[bold]champion[/bold]   version {done['to']} of '{escape(name)}', in place of version {done['from']}")
    return 0


# --- schedule ---------------------------------------------------------------------------------------------------------


def schedule(
    *,
    context: typer.Context,
    cron: Annotated[
        str, typer.Option(metavar="CRON", help='When: minute hour day month weekday, such as "0 2 * * *".')
    ],
    timezone: Annotated[str, typer.Option(metavar="ZONE", help="That the hours are meant in.")] = "UTC",
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the deployment.")] = "scheduled",
    verbose: VerboseOption = False,  # noqa: ARG001 -- read by the outermost frame
) -> int:
    """Prune again and again: all options of `entprune prune`, and when.

    Serves the schedule until it is interrupted, one run at a time, on this machine. Needs a Prefect server that stays
    up, in PREFECT_API_URL.
    """
    from flows.parameters import parse_parameters
    from flows.serving import check_cron, require_lasting_server, serve_pruning

    group = context.parent.command if context.parent else None
    prune = group.commands["prune"]  # type: ignore[union-attr]  # the command line is a group
    with prune.make_context("schedule", list(context.args), parent=context.parent) as parsed:
        parameters = parse_parameters(prune_values(parsed.params))
    check_cron(cron, timezone)
    require_lasting_server()
    _say(f"[bold]schedule[/bold]   {escape(name)}: {escape(cron)} ({escape(timezone)}); end it with Ctrl-C")
    serve_pruning(parameters, name=name, cron=cron, timezone=timezone)
    return 0


_RENAMED = {
    "finetune_lr": "finetune_learning_rate",
    "distillation_weight": "finetune_distillation_weight",
    "min_channels": "minimum_channels",
    "min_fraction": "minimum_fraction",
}


def prune_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a pruning run from the options of `entprune prune` as they were typed; folders become absolute."""
    values = {_RENAMED.get(key, key): value for key, value in options.items() if value is not None and key != "verbose"}
    for key in ("mean", "std"):
        if key in values:
            values[key] = numbers(key, values[key])
    if "cache_dir" in values and "://" not in str(values["cache_dir"]):
        values["cache_dir"] = Path(str(values["cache_dir"]))
    for key, value in values.items():
        if isinstance(value, Path):
            values[key] = value.absolute()
    return values | {"keep": tuple(values.get("keep") or ())}


# --- train ------------------------------------------------------------------------------------------------------------


def check_registry(name: str | None) -> None:
    """Require that the name is one and the tracking server answers, if something is to be registered."""
    if name is not None:
        from flows.parameters import require_registry_name
        from tasks import tracking

        require_registry_name("--register", name)
        tracking.check()


def register_trained(model: nn.Module, name: str, model_spec: str, tags: Mapping[str, Any]) -> str:
    """Register a dense network and return where it is."""
    from tasks.dense_registry import register_dense

    return f"models:/{name}/{register_dense(model, name, model_spec, tags)}"


# --- manners ----------------------------------------------------------------------------------------------------------


def _run_flow(name: str, which: str, call: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Run one of the promotion flows; a version that does not exist is refused before the flow engine starts."""
    from tasks import registry, tracking

    registry.require_database(f"find version '{which}' of model '{name}'")
    tracking.check()
    registry.find_version(name, which)
    from flows import promote as promotion_flows
    from flows.server import start_server

    start_server()
    return call(promotion_flows)


def _say(text: str) -> None:
    Console(highlight=False).print(text, soft_wrap=True)
