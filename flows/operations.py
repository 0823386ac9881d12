"""Commands that operate what was pruned: `entprune promote | rollback | schedule`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from flows.options import DataRootOption, DeviceOption, VerboseOption

if TYPE_CHECKING:
    from collections.abc import Callable

REFUSED = 3  # exit code: a verdict, neither a failure nor bad input


def add_commands(app: typer.Typer) -> None:
    """Make the commands of this module known to the command line."""
    app.command(epilog=_PROMOTE_EXAMPLES)(promote)
    app.command(epilog=_ROLLBACK_EXAMPLES)(rollback)


NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Registered model.")]

_PROMOTE_EXAMPLES = """[bold]Examples[/bold]

Judge the version that was registered last by what its run recorded:

[cyan]entprune promote flowers[/cyan]

Measure version 7 again on the test images, and allow half a point:

[cyan]entprune promote flowers 7 --data imagefolder:flowers --max-accuracy-drop 0.5[/cyan]"""

_ROLLBACK_EXAMPLES = """[bold]Example[/bold]

[cyan]entprune rollback flowers[/cyan]"""


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
    done = _run_flow(name, "champion", lambda flows: flows.rollback(name))
    _say(f"[bold]champion[/bold]   version {done['to']} of '{escape(name)}', in place of version {done['from']}")
    return 0


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
