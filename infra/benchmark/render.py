"""Make tables and plots from the stored figures: between the markers of README.md beside this script.

    python -m infra.benchmark.render            # README.md and plots/ here
    python -m infra.benchmark.render --root     # and the short table in the project's README, between its markers

No figure is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from entprune.errors import ConfigError, EntpruneError
from entprune.storage import atomic_write_text
from infra.benchmark import engine_tables, plots, tables, tuned_tables
from infra.benchmark.ablation_tables import ablation_page
from infra.benchmark.published import published_section
from infra.benchmark.records import HERE, RESULTS, all_records

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
ABLATION_MARKERS = ("<!-- ablation:begin -->", "<!-- ablation:end -->")
_MISSING = "Not measured yet."
_SECTIONS: tuple[tuple[str, str, Callable[[tables.Records], list[str]]], ...] = (
    ("budgets", "Whole runs by accuracy budget", tables.budgets_section),
    ("low_rank", "Whole runs by accuracy budget, with layers of low rank", tables.budgets_section),
    ("estimates", "What training images say about new ones", tables.estimates_section),
    ("dense", "Longer training of the unpruned networks", tuned_tables.dense_section),
    ("tuned", "Before and after fine-tuning", tuned_tables.tuned_section),
    ("recovery", "Everyone fine-tuned alike", tuned_tables.recovery_section),
    ("epoch", "Pruning time in training epochs", tables.epoch_section),
    ("scaling", "Cost against the number of images", tables.scaling_section),
    ("latency", "Multiply-accumulates and milliseconds", tables.latency_section),
    ("sweep", "Many settings beside one", tables.sweep_section),
    ("actors", "Two actors on two cores", engine_tables.actors_section),
    ("engine", "What the engine adds to the library", engine_tables.engine_section),
)


def main() -> int:
    """Write the page, and the short table if asked; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", action="store_true", help="also fill the markers of the project's README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=HERE)
    arguments = parser.parse_args()
    try:
        write_page(arguments.results, arguments.output)
        if arguments.root:
            replace_between_markers(HERE.parents[1] / "README.md", short_table(arguments.results))
    except EntpruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_page(results: Path, output: Path) -> None:
    """Plots as files, and everything between both pairs of markers of README.md."""
    drawings = draw(results)
    for name, drawing in drawings.items():
        atomic_write_text(output / "plots" / name, drawing)
    replace_between_markers(output / "README.md", page(results, drawings))
    records = list(all_records("ablation", results))
    text = ablation_page(records) if records else _MISSING
    replace_between_markers(output / "README.md", text, ABLATION_MARKERS)


def replace_between_markers(path: Path, text: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Replace what lies between the markers of a file.

    Raises:
        ConfigError: the file has no markers.
    """
    begin, end = markers
    content = path.read_text(encoding="utf-8")
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ConfigError(f"'{path.name}': expected the markers {begin} and {end} once each; add them.")
    head, rest = content.split(begin)
    atomic_write_text(path, f"{head}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}")


def page(results: Path, drawings: Mapping[str, str]) -> str:
    """All sections."""
    lines = ["## Who chooses better, and what the refit adds\n"]
    found = tables.by_network(list(all_records("selection", results)))
    lines += [f"{tables.LEGEND}\n", *tables.standing(found)] if found else []
    for network, records in found.items():
        lines += tables.selection_section(network, records)
        lines += [f"![{network}](plots/{name})\n" for name in drawings if name.startswith(f"selection-{network}-")]
    lines += [] if found else [_MISSING]
    for part, title, section in _SECTIONS:
        records = list(all_records(part, results))
        lines += [f"\n## {title}\n", *(section(records) if records else [_MISSING])]
        lines += [f"![{title}](plots/{part}.svg)\n"] if f"{part}.svg" in drawings else []
    lines += ["\n## Beside published figures\n", *published_section(results)]
    return "\n".join(lines)


def draw(results: Path) -> dict[str, str]:
    """File name to SVG of every plot that there are figures for."""
    found: dict[str, str | None] = {}
    for network, records in tables.by_network(list(all_records("selection", results))).items():
        for objective in ("parameters", "macs"):
            found[f"selection-{network}-{objective}.svg"] = plots.draw_selection(records, objective)
    for part, drawer in (("scaling", plots.draw_scaling), ("latency", plots.draw_latency)):
        records = list(all_records(part, results))
        found[f"{part}.svg"] = drawer(records) if records else None
    return {name: drawing for name, drawing in found.items() if drawing is not None}


_SHORT_VARIANTS = (("refit", "allocated"), ("plain", "uniform"))


def short_table(results: Path) -> str:
    """Two rows per network at the middle budget of its first kind: refit at our widths, plain at uniform ones."""
    rows = []
    for network, records in tables.by_network(list(all_records("selection", results))).items():
        budgets = tables.budgets_of(records)
        kind = [label for label in budgets if label.split("-")[0] == budgets[0].split("-")[0]]
        rows += _short_rows(network, records, kind[len(kind) // 2])
    head = ("network, removed", "how", *tables.METHOD_NAMES.values())
    return f"{tables.table(head, rows)}\n\n{tables.SHORT_LEGEND}" if rows else _MISSING


def _short_rows(network: str, records: tables.Records, budget: str) -> list[list[str]]:
    cells, count = tables.collect_cells(records), tables.image_count(records)
    rows = []
    for variant in _SHORT_VARIANTS:
        rivals = [cells.get((budget, method, *variant), []) for method in tables.METHOD_NAMES]
        name = f"{network}, {tables.budget_name(budget)}"
        rows.append(["" if rows else name, tables.VARIANT_NAMES[variant], *tables.compare(rivals, count)])
    return rows


if __name__ == "__main__":
    sys.exit(main())
