"""`entprune report`: the page of a run made again, or several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from flows.options import VerboseOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

EPILOG = """[bold]Examples[/bold]

Make the page of a run again, with this version's drawings:

[cyan]entprune report runs/lenet[/cyan]

Put three runs side by side:

[cyan]entprune report runs/lenet runs/lenet-tuned runs/vgg16 --output comparison.html[/cyan]"""


def report(
    *,
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Output folders of runs (or of one sweep).")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Page to write; report.html in the run's folder, or comparison.html."),
    ] = None,
    verbose: VerboseOption = False,  # noqa: ARG001 -- read by the outermost frame
) -> int:
    """Write the page of one run again, or a page that compares several.

    Reads report.json (and the paths beside it); nothing is computed, and no engine is started.
    """
    return _one(folders[0], output) if len(folders) == 1 else _several(folders, output or Path("comparison.html"))


def _one(folder: Path, output: Path | None) -> int:
    from entprune.report.reading import SWEEP_FILE, read_paths, read_report, read_sweep, rendered
    from entprune.report.sweep_page import render_sweep
    from entprune.report.writing import render_html
    from flows.tables import result_table, sweep_table

    is_sweep = (folder / SWEEP_FILE).is_file()
    content = read_sweep(folder) if is_sweep else read_report(folder)
    if is_sweep:
        page = rendered(render_sweep, folder, content)
    else:
        page = rendered(render_html, folder, content, read_paths(folder))
    table = rendered(sweep_table if is_sweep else result_table, folder, content)
    _write(page, output or folder / ("sweep.html" if is_sweep else "report.html"), table)
    return 0


def _several(folders: Sequence[Path], output: Path) -> int:
    from entprune.report.comparison import collect_differences, render_comparison
    from entprune.report.reading import read_report, rendered
    from flows.tables import comparison_table

    runs = list(zip(distinct_names(folders), [read_report(folder) for folder in folders], strict=True))
    place = folders[0].parent
    _write(rendered(render_comparison, place, runs), output, rendered(comparison_table, place, runs))
    for sentence in collect_differences(runs):
        Console(stderr=True, highlight=False).print(f"[yellow]note[/yellow]       {escape(sentence)}", soft_wrap=True)
    return 0


def _write(page: str, path: Path, table: Table) -> None:
    from entprune.storage import atomic_write_text
    from flows.preflight import check_output_file

    check_output_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, page)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"[bold]page[/bold]       {escape(str(path))}", soft_wrap=True)


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as much of what is above them as tells them apart."""
    parts: list[Any] = [folder.absolute().parts for folder in folders]
    for length in range(1, max(len(part) for part in parts) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]
