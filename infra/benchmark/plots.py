"""Plots of the benchmark as SVG, from the stored figures alone; the same figures give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from infra.benchmark.tables import (
    METHOD_NAMES,
    VARIANT_NAMES,
    Records,
    budgets_of,
    collect_cells,
    curve,
    mean_accuracy,
)

_STYLE = {
    "svg.hashsalt": "entprune", "svg.fonttype": "none", "font.size": 9.0, "axes.titlesize": 9.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#d8dee4",
    "legend.frameon": False, "legend.fontsize": 8.0,
}  # fmt: skip
_LINES = {
    "ours": ("#1f5fa8", "-", "o"), "random": ("#57606a", ":", "x"), "l1": ("#b4500f", "--", "s"),
    "fpgm": ("#7d6608", "-.", "v"), "taylor": ("#b42319", "--", "D"), "lasso": ("#75509a", "-.", "^"),
    "block_obs": ("#1a7f4f", "--", "P"),
}  # fmt: skip


_PANELS = (("refit", "allocated"), ("plain", "uniform"))


def draw_selection(records: Records, objective: str) -> str | None:
    """Accuracy over size, refit at our widths beside plain at uniform ones; None where no budget is of this kind.

    Args:
        records: of one network.
        objective: "parameters" or "macs".
    """
    chosen = [record for record in records if record["budget"].startswith(objective)]
    if not chosen:
        return None
    dense = chosen[0]["facts"]["dense"]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 3.4), layout="constrained")
        panels = figure.subplots(1, len(_PANELS))
        for axes, variant in zip(panels, _PANELS, strict=True):
            _draw_methods(axes, chosen, variant, objective, dense[objective])
            axes.axhline(dense["accuracy"], color="#57606a", linewidth=0.8, linestyle=":", label="unpruned")
            axes.set_title(VARIANT_NAMES[variant])
            axes.set_xlabel(f"{'MACs' if objective == 'macs' else 'parameters'} left, %")
        panels[0].set_ylabel("test accuracy, %")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        return _svg(figure)


def _draw_methods(axes: Axes, records: Records, variant: tuple[str, str], objective: str, dense: int) -> None:
    cells = collect_cells(records)
    for method, name in METHOD_NAMES.items():
        found = [cells[b, method, *variant] for b in budgets_of(records) if (b, method, *variant) in cells]
        points = sorted((100.0 * values[0][objective] / dense, mean_accuracy(values)) for values in found)
        colour, dashes, mark = _LINES[method]
        axes.plot(
            [share for share, _ in points], [accuracy for _, accuracy in points],
            color=colour, linestyle=dashes, marker=mark, markersize=4, label=name,
        )  # fmt: skip


def draw_scaling(records: Records) -> str | None:
    """Seconds and memory over the number of images, on logarithmic axes; None without measurements."""
    cells = [cell for record in records for cell in record["cells"]]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.5, 3.0), layout="constrained")
        seconds, memory = figure.subplots(1, 2)
        curves = (
            (seconds, "solve, one setting", "solve", "solve_seconds", None, 0),
            (memory, "calibrate and solve", "memory", "peak_mib", "solve", 0),
            (memory, "with assembly", "memory", "peak_mib", "assemble", 1),
        )
        styles = list(_LINES.values())
        for axes, label, quantity, field, stage, number in curves:
            points = curve(cells, quantity, field, stage)
            if not points:
                continue
            colour, dashes, mark = styles[2 * number]
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, marker=mark, label=label)
            axes.set_xscale("log")
            axes.set_xlabel("calibration images")
            axes.set_ylim(bottom=0)
            axes.legend()
        seconds.set_ylabel("seconds")
        memory.set_ylabel("peak memory, MiB")
        return _svg(figure)


def draw_latency(records: Records) -> str | None:
    """Time left over multiply-accumulates left, batch 1 and 64, with the line of equal shares."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.2, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#57606a", linewidth=0.8, label="equal shares")
        for batch, (colour, _, mark) in zip(("1", "64"), list(_LINES.values())[::2], strict=False):
            for name, multiple in records[0]["cells"][0]["values"]["multiples"].items():
                shares = zip(*_shares(records, name, batch), strict=True)
                fill, widths = (colour, "") if multiple == 1 else ("none", f", widths in multiples of {multiple}")
                axes.plot(*shares, mark, color=colour, markerfacecolor=fill, label=f"batch {batch}{widths}")
        axes.set_xlabel("share of the MACs left")
        axes.set_ylabel("share of the time left")
        axes.legend()
        return _svg(figure)


def _shares(records: Records, name: str, batch: str) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for values in (cell["values"] for record in records for cell in record["cells"]):
        macs: Mapping[str, Any] = values["macs"]
        times = values["latency_ms"]
        found.append((macs[name] / macs["dense"], times[name][batch] / times["dense"][batch]))
    return found


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
