"""`entprune log`: what a run could not tell MLflow at its time, told now."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from flows.options import VerboseOption

if TYPE_CHECKING:
    from tasks.record import Entry, Record

EPILOG = """[bold]Examples[/bold]

MLflow did not answer while a network was pruned; now it does:

[cyan]entprune log runs/lenet[/cyan]"""

_LOCK_NAME = ".tracking.lock"


def log(
    *,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Output folder of `prune` or `sweep`.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="What `prune` was given, to register a network of your own code."),
    ] = None,
    verbose: VerboseOption = False,  # noqa: ARG001 -- read by the outermost frame
) -> int:
    """Record a finished run in MLflow that did not answer, or died, while it ran.

    Parameters, metrics, artifacts and the registered version, each once, however often this is called.
    """
    from tasks.record import Record

    Record.read(folder)  # of a folder without one nothing is left behind, not even a lock
    lock = FileLock(folder / _LOCK_NAME, timeout=0)
    try:
        with lock:
            told, record = record_again(folder, model)
    except Timeout as cause:
        raise _busy(folder) from cause
    finally:
        if not lock.is_locked:
            (folder / _LOCK_NAME).unlink(missing_ok=True)
    _show(record, told)
    return 0


def record_again(folder: Path, model_spec: str | None = None) -> tuple[int, Record]:
    """Tell MLflow what waits in a folder; returns how many entries that were, and the record.

    Raises:
        EngineError: the server does not answer. ArtifactError: the folder is unusable.
    """
    from tasks.record import Record

    record = Record.read(folder)
    waiting = len(record.waiting())
    record.catch_up(partial(_register, folder, model_spec))
    return waiting, record


def _register(folder: Path, model_spec: str | None, run_id: str, entry: Entry) -> int:
    """Register the network from its files."""
    from entprune.artifact import load_model, read_card
    from entprune.models import build_model
    from tasks.stages import register_network

    place = folder / entry["place"] / "model"
    card = read_card(place)
    dense = None
    if model_spec is not None:
        dense = build_model(model_spec, num_classes=card.num_classes, input_shape=card.input_shape)
    return register_network(load_model(place, model=dense), card, run_id, entry)


def _busy(folder: Path) -> Exception:
    from entprune.errors import EngineError

    return EngineError(f"'{folder}' is being recorded by another process; wait for it.")


def _show(record: Record, told: int) -> None:
    runs = [entry for entry in record.entries if entry["kind"] == "run"]
    versions = [entry for entry in record.entries if entry["kind"] == "version"]
    title = "recorded" if told else "recorded before, nothing to do"
    lines = [(title, f"run {runs[0]['run_id']} in experiment '{runs[0]['experiment']}'")]
    lines += [("registered", f"models:/{entry['name']}/{entry['version']}") for entry in versions]
    for name, text in lines:
        Console(highlight=False).print(f"[bold]{name:<11}[/bold] {escape(text)}", soft_wrap=True)


def unrecorded_lines(folder: Path) -> list[tuple[str, str]]:
    """What the end of a run says if MLflow has not heard everything of it."""
    from tasks.record import is_waiting

    return [("unrecorded", f"entprune log {folder}  (MLflow did not answer)")] if is_waiting(folder) else []
