"""Drawings of the report as SVG text: the same input gives the same bytes.

Axes: c channels of a group, s settings, k kept channels.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.typing import RcKeyType

from entprune.path import PathSetting, SparsityPath
from entprune.report.chart_data import candidate_kind, highest_drop_shown
from entprune.report.style import LIGHT
from entprune.report.wording import format_count
from entprune.simplex import effective_channels

_SMALL = (4.2, 2.9)  # inches; at 96 pixels per inch about as wide as a phone, so that text stays readable there
_WIDE = (4.8, 3.4)
_LONGEST_NAME = 24
_MOST_SETTINGS = 6
_LEAST_ERROR = 1e-4
_LINES = (("warm", "--", "s"), ("good", "-.", "^"), ("violet", ":", "D"), ("olive", (0, (5, 1, 1, 1, 1, 1)), "v"),
          ("bad", (0, (1, 1)), "P"), ("muted", (0, (8, 2)), "X"))  # fmt: skip
_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "entprune",
    "text.parse_math": False,  # a layer's name may hold a dollar sign
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titley": 1.03,  # fixed: matplotlib would measure every label to find a place
    "legend.fontsize": 8.5,
    "legend.facecolor": LIGHT["surface"],
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.borderpad": 0.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.edgecolor": LIGHT["muted"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelcolor": LIGHT["ink"],
    "ytick.labelcolor": LIGHT["ink"],
    "grid.color": LIGHT["grid"],
    "figure.facecolor": LIGHT["surface"],
    "axes.facecolor": LIGHT["surface"],
    "savefig.facecolor": LIGHT["surface"],
    "hatch.linewidth": 0.7,
}


def draw_plots(report: Mapping[str, Any], paths: Mapping[str, SparsityPath]) -> dict[str, str]:
    """Draw everything that the report can show.

    Returns:
        Name to SVG text: ``widths``, ``search``, and for each group with a path ``error-NUMBER`` and
        ``probability-NUMBER``, where NUMBER counts the report's groups from 0 in three digits. What has no data is
        left out.
    """
    plots: dict[str, str] = {}
    with mpl.rc_context():
        mpl.rcdefaults()  # whatever style the user has set, the bytes are the same
        mpl.rcParams.update(_STYLE)
        if report["groups"]:
            plots["widths"] = _to_svg(_draw_widths(report["groups"]))
        if any(entry.get("validation_drop") is not None for entry in report["candidates"]):
            plots["search"] = _to_svg(_draw_search(report))
        for number, entry in enumerate(report["groups"]):
            path = paths.get(entry["name"])
            if path is not None:
                plots[f"error-{number:03d}"] = _to_svg(_draw_error(path, entry["kept"]))
                plots[f"probability-{number:03d}"] = _to_svg(_draw_probability(path, entry["kept"]))
    return plots


def _to_svg(figure: Figure) -> str:
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # a date would change the bytes
    figure.savefig(stream, format="svg", metadata=nothing)
    return re.sub(r'="[^"]*"', _shorten_numbers, stream.getvalue())


def _shorten_numbers(attribute: re.Match[str]) -> str:
    """Hundredths of a point are enough."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", attribute[0])


def _new_axes(size: tuple[float, float], *, left: float = 0.62, bottom: float = 0.55, top: float = 0.4) -> Axes:
    """Axes with margins in inches, so that they do not depend on the size of the drawing."""
    width, height = size
    figure = Figure(figsize=size)
    rectangle = (left / width, bottom / height, 1 - (left + 0.15) / width, 1 - (bottom + top) / height)
    return figure.add_axes(rectangle)


def _shorten(name: str) -> str:
    """Both ends of a long name: the stage and the layer."""
    if len(name) <= _LONGEST_NAME:
        return name
    half = (_LONGEST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


# --- widths ---------------------------------------------------------------------------------------------------------


def _draw_widths(groups: Sequence[Mapping[str, Any]]) -> Figure:
    """Horizontal bars: kept channels solid, removed ones hatched."""
    names = [_shorten(entry["name"]) for entry in groups]
    before = np.array([entry["channels"] for entry in groups])
    after = np.array([entry["kept"] for entry in groups])
    axes = _new_axes(
        (_WIDE[0], 0.95 + 0.27 * len(groups)), left=0.3 + 0.075 * max(len(name) for name in names), bottom=0.5
    )
    places = np.arange(len(groups))
    axes.barh(places, after, height=0.62, color=LIGHT["kept"], label="kept")
    axes.barh(
        places, before - after, left=after, height=0.62, label="removed",
        facecolor=LIGHT["surface"], edgecolor=LIGHT["muted"], linewidth=0.7, hatch="////",
    )  # fmt: skip
    for place, old, new in zip(places, before, after, strict=True):
        axes.annotate(
            f"{old} → {new}", (old, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5
        )
    axes.set_yticks(places, names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 1.3 * before.max())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("channels")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1)
    return _figure(axes)


# --- error against width --------------------------------------------------------------------------------------------


def _draw_error(path: SparsityPath, kept: int) -> Figure:
    """What each setting loses at each width, the best of them, and the width that was chosen."""
    axes = _new_axes(_SMALL, left=0.75)
    widths = np.arange(1, path.num_channels + 1)
    scale = 100.0 / path.num_consumers  # percent of the output variance of one reading layer
    labels = _setting_labels([entry.setting for entry in path.settings])
    best = np.clip(scale * path.errors[1:], 100 * _LEAST_ERROR, None)
    for number, entry in enumerate(path.settings):
        colour, dashes, marker = _LINES[number % len(_LINES)]
        label = labels[number] if len(labels) <= _MOST_SETTINGS else "_"  # matplotlib's name for what has no entry
        errors = np.clip(scale * entry.errors[1:], 100 * _LEAST_ERROR, None)
        axes.plot(
            widths, errors, color=LIGHT[colour], linestyle=dashes, linewidth=1.2, marker=marker, markersize=4,
            markevery=_mark_places(path.num_channels, number), markerfacecolor=LIGHT["surface"], label=label,
        )  # fmt: skip
    axes.plot(
        widths,
        best,
        color=LIGHT["kept"],
        linewidth=3.2,
        alpha=0.45,
        zorder=1,
        label="best of all",
        solid_capstyle="round",
    )
    if kept >= 1:
        axes.axvline(kept, color=LIGHT["ink"], linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        axes.plot(
            [kept], [best[kept - 1]], marker="o", markersize=9, markerfacecolor="none",
            markeredgecolor=LIGHT["ink"], markeredgewidth=1.6, linestyle="none",
            label=f"chosen: {_percent(best[kept - 1])}",
        )  # fmt: skip
    _scale_width_axis(axes, path.num_channels)
    axes.set_yscale("log")
    highest = max(float(np.max(scale * entry.errors[1:])) for entry in path.settings)
    axes.set_ylim(max(100 * _LEAST_ERROR, min(1.0, 0.5 * float(best.min()))) / 1.2, max(150.0, 1.5 * highest))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("output lost")
    axes.set_title(f"{_shorten(path.group)}: {kept} of {path.num_channels} kept")
    axes.grid(visible=True, which="major", linewidth=0.6)
    axes.legend(loc="lower left", handlelength=2.6, labelspacing=0.25, borderaxespad=0.2)
    return _figure(axes)


def _mark_places(num_channels: int, number: int) -> list[int]:
    """Positions of a line's markers, evenly spaced on the logarithmic axis and shifted from those of other lines."""
    steps = np.geomspace(1, max(num_channels, 2), 7) * 1.12**number
    return sorted({min(num_channels, max(1, round(step))) - 1 for step in steps})


def _scale_width_axis(axes: Axes, num_channels: int) -> None:
    """A logarithmic axis with plain numbers: 1, 2, 5, 10 ... and c."""
    axes.set_xscale("log")
    axes.set_xlim(0.9, 1.12 * num_channels)
    round_ones = [factor * 10**power for power in range(6) for factor in (1, 2, 5)]
    ticks = [tick for tick in round_ones if tick < 0.72 * num_channels] + [num_channels]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.set_xlabel("channels kept")


def _setting_labels(settings: Sequence[PathSetting]) -> list[str]:
    """Only what differs between the settings."""
    contents = [setting.to_dict() for setting in settings]
    differing = [key for key in contents[0] if len({content[key] for content in contents}) > 1] or ["entropy_weight"]
    return [", ".join(_differing(key, content[key]) for key in differing) for content in contents]


def _differing(key: str, value: float | str) -> str:
    """A hyperparameter by which curves differ; a method's name speaks for itself."""
    return value if isinstance(value, str) else f"{key.replace('_', ' ')} {value:g}"


def _percent(value: float) -> str:
    return f"{value:.2g} %" if value < 99.5 else f"{value:.0f} %"


# --- channel probabilities ------------------------------------------------------------------------------------------


def _draw_probability(path: SparsityPath, kept: int) -> Figure:
    """Channel probabilities in falling order; those of kept channels solid, of removed ones hatched."""
    axes = _new_axes(_SMALL, left=0.7)
    probability = np.asarray(path.probability(kept), dtype=np.float64)
    is_kept = np.zeros(path.num_channels, dtype=bool)
    is_kept[list(path.kept(kept))] = True
    order = np.argsort(-probability, kind="stable")
    heights, solid = probability[order], is_kept[order]
    support = int((probability > 0).sum())
    shown = min(path.num_channels, max(8, kept + 2, math.ceil(1.15 * support)))
    edges = np.arange(shown + 1) + 0.5
    first, rest = heights[:shown], solid[:shown]
    axes.stairs(np.where(rest, first, 0), edges, fill=True, color=LIGHT["kept"], label=f"kept ({kept})")
    axes.stairs(
        np.where(rest, 0, first), edges, fill=True, facecolor=LIGHT["surface"], edgecolor=LIGHT["muted"], hatch="////",
        label=f"removed ({path.num_channels - kept})",
    )  # fmt: skip
    effective = effective_channels(torch.from_numpy(probability))
    axes.axvline(
        min(effective + 0.5, shown + 0.5),
        color=LIGHT["warm"],
        linewidth=1.4,
        linestyle="-.",
        label=f"effective ({effective:.1f})",
    )
    axes.set_xlim(0.4, shown + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylim(0, 1.5 * float(heights[0]) if heights[0] > 0 else 1)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel("channel, most important first" + ("" if shown == path.num_channels else " (the rest is 0)"))
    axes.set_ylabel("probability w")
    axes.set_title(f"{_shorten(path.group)}: {effective:.1f} effective channels")
    axes.legend(loc="upper right", labelspacing=0.25, borderaxespad=0.2)
    return _figure(axes)


# --- search ---------------------------------------------------------------------------------------------------------


def _draw_search(report: Mapping[str, Any]) -> Figure:
    """Validation loss against size for every network tried, with its upper confidence bound and the budget."""
    budget = report["budget"]
    size = "macs" if "macs_removed" in budget else "parameters"
    candidates = [entry for entry in report["candidates"] if entry.get("validation_drop") is not None]
    axes = _new_axes(_WIDE, left=0.7, top=0.62)
    ceiling = _set_search_limits(axes, candidates, budget, report["dense"][size], size)
    for entry in candidates:
        _draw_candidate(axes, entry, entry[size], ceiling)
    axes.plot([report["dense"][size]], [0.0], marker="D", markersize=7, color=LIGHT["ink"], linestyle="none")
    handles = [_handle(**look) for look in _LOOKS.values()]
    handles.append(Line2D([], [], marker="D", color=LIGHT["ink"], linestyle="none", label="unpruned"))
    line: dict[str, Any] = {"color": LIGHT["warm"], "linestyle": "--", "linewidth": 1.4}
    allowed = budget.get("max_accuracy_drop")
    if allowed is not None:
        axes.axhline(allowed, **line, zorder=0)
        handles.append(Line2D([], [], **line, label=f"budget: {allowed:g} points"))
    removed = budget.get(f"{size}_removed")
    if removed is not None:
        axes.axvline((1 - removed) * report["dense"][size], **line, zorder=0)
        handles.append(Line2D([], [], **line, label=f"budget: {100 * removed:g} % removed"))
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.1, 1), ncols=3, columnspacing=1.2, handletextpad=0.4
    )
    axes.set_ylabel("accuracy lost, points")
    axes.grid(visible=True, linewidth=0.6)
    return _figure(axes)


_LOOKS: dict[str, dict[str, Any]] = {
    "chosen": {"marker": "*", "markersize": 15, "color": LIGHT["kept"], "label": "chosen"},
    "accepted": {"marker": "o", "markersize": 7, "color": LIGHT["good"], "label": "within the budget"},
    "rejected": {
        "marker": "x",
        "markersize": 7,
        "markeredgewidth": 1.8,
        "color": LIGHT["bad"],
        "label": "not within it",
    },
}


def _handle(**look: Any) -> Line2D:
    return Line2D([], [], linestyle="none", **look)


def _set_search_limits(
    axes: Axes, candidates: Sequence[Mapping[str, Any]], budget: Mapping[str, float], dense_size: int, size: str
) -> float:
    """Show what lies near the budget; return the height above which networks are drawn at the edge."""
    ceiling = highest_drop_shown(candidates, budget)
    bottom = min(0.0, *(float(entry["validation_drop"]) for entry in candidates))
    margin = 0.08 * (ceiling - bottom)
    axes.set_ylim(bottom - margin, ceiling + margin)
    sizes = [entry[size] for entry in candidates]
    axes.set_xscale("log")
    axes.set_xlim(0.85 * min(sizes), 1.25 * dense_size)
    ticks = _size_ticks(0.85 * min(sizes), 1.25 * dense_size)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.set_xlabel("multiply-accumulates left" if size == "macs" else "parameters left")
    return ceiling


def _size_ticks(low: float, high: float) -> list[float]:
    """Five to seven round numbers between two sizes, evenly spaced in the logarithm."""
    for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside
    return inside


def _draw_candidate(axes: Axes, entry: Mapping[str, Any], size: float, ceiling: float) -> None:
    look = dict(_LOOKS[candidate_kind(entry)])
    del look["label"]
    drop, bound = float(entry["validation_drop"]), entry.get("drop_upper_bound")
    if drop > ceiling:
        axes.annotate(
            f"↑ {drop:.3g}",
            (size, ceiling),
            xytext=(0, -7),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=8,
        )
    elif bound is not None:
        axes.plot(
            [size, size], [drop, bound], color=look["color"], linewidth=1.2, marker="_", markersize=6, markevery=[1]
        )
    axes.plot([size], [min(drop, ceiling)], linestyle="none", zorder=3, **look)


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None  # noqa: S101 -- axes made by _new_axes belong to one
    return figure
