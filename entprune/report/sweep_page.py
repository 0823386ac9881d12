"""The page ``sweep.html``: what every setting of a sweep reached, as a plot to look into and a table to read.

The plot is drawn by the page's script; without scripts the table holds the same figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entprune.report.pieces import bullets, chart, folded, pairs, render_shell, section, table, text, tiles
from entprune.report.wording import (
    format_accuracy,
    format_change,
    format_count,
    format_fraction,
    format_milliseconds,
    format_points,
    format_seconds,
)

_BATCH = "64"
_AXES = {
    "parameters": {"title": "parameters left", "short": "Parameters", "log": True},
    "macs": {"title": "multiply-accumulates left", "short": "MACs", "log": True},
    "latency": {"title": f"time for {_BATCH} images, ms", "short": "Time", "log": False},
}
_KINDS = {
    "tried": {"label": "tried on the way", "shape": "circle", "size": 3.2, "quiet": True},
    "stopped": {"label": "result of a setting that was stopped early", "shape": "triangle", "size": 5.5},
    "result": {"label": "result of a setting", "shape": "diamond", "size": 5.5},
    "chosen": {"label": "chosen", "shape": "star", "size": 8},
}
_ROOM_ABOVE = 0.6  # of the results' range: what lies higher is drawn at the edge
_PLOT_NOTE = (
    "Each mark is one smaller network: how large it is, and how much accuracy it lost on the validation images. Lower "
    "and further to the left is better; the line joins the networks that no other beats in both. Point at a mark, or "
    "tap it, for its setting and figures. Time was measured of results alone. Marks at the upper edge lost more than "
    "fits."
)
_TABLE_NOTE = (
    "Change: points of accuracy gained (+) or lost (−) on the validation images; at worst: the confidence bound by "
    "which networks are accepted. Best in: no other network of the sweep is both more accurate and smaller or faster. "
    "The chosen setting is in bold."
)
_WORK_NAMES = {
    "pairs_asked": "continuations asked for (group and setting of the solver)",
    "pairs_distinct": "of these distinct",
    "pairs_solved": "of these solved now, the others were known",
    "calibrations": "times that the calibration images went through the network",
    "workers": "workers",
}


def render_sweep(content: Mapping[str, Any]) -> str:
    """Return the whole page.

    Args:
        content: of ``sweep.json``, schema version 1.
    """
    title = f"{content['model']['spec']}: {len(content['settings'])} settings compared"
    unmet = ["No setting met the budget: the one nearest to it was kept."]
    sections = (
        _headline(content, title),
        bullets("Know before you use it", [] if content["chosen"]["budget_met"] else unmet),
        _plot(content),
        _settings(content),
        _background(content),
    )
    return render_shell(title, sections, is_drawn=True)


def _headline(content: Mapping[str, Any], title: str) -> str:
    chosen, data = content["chosen"], content["data"]
    setting = content["settings"][chosen["number"]]
    figures, dense = chosen["fine_tuned"] or chosen["one_shot"], content["dense"]
    how = "fine-tuned" if chosen["fine_tuned"] else "without fine-tuning"
    cards = tiles(
        (
            ("Chosen setting", f"#{setting['number']}", setting["label"]),
            (
                "Parameters removed",
                format_fraction(figures["parameters_removed"]),
                f"{format_count(dense['parameters'])} → {format_count(figures['parameters'])}",
            ),
            (
                "MACs removed",
                format_fraction(figures["macs_removed"]),
                f"{format_count(dense['macs'])} → {format_count(figures['macs'])}",
            ),
            (
                "Change in test accuracy",
                format_points(figures["accuracy_drop"]),
                f"{format_accuracy(dense['accuracy'])} → {format_accuracy(figures['accuracy'])}, {how}",
            ),
        )
    )
    swept = ", ".join(name.replace("_", " ") for name in content["swept"])
    return (
        f"<header>\n<p class='quiet small'>entprune sweep over {text(swept)}</p>\n<h1>{text(title)}</h1>\n{cards}\n"
        f"<p>Chosen: {text(chosen['rule'])}. Settings were compared on {data['validation_samples']:,} validation "
        f"images; the {data['test_samples']:,} test images were used for the chosen network and the unpruned one "
        "alone. The chosen network and its own report are in the folder <code>chosen</code>.</p>\n</header>"
    )


def _plot(content: Mapping[str, Any]) -> str:
    points = _points(content)
    key = [point["y"] for point in points if point["kind"] != "tried" and point["y"] is not None]
    top = max(key, default=0.0) + _ROOM_ABOVE * max(max(key, default=0.0) - min([0.0, *key]), 0.1)
    data = {
        "axes": _AXES,
        "y": "accuracy lost, points",
        "kinds": _KINDS,
        "points": points,
        "guides": _guides(content),
        "fronts": content["fronts"],
        "top": top,
    }
    return section("What each setting reaches", chart("scatter", "settings", data), note=_PLOT_NOTE)


def _guides(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The accuracy budget where all settings have the same."""
    budgets = {(setting.get("budget") or {}).get("max_accuracy_drop") for setting in content["settings"]}
    if len(budgets) != 1 or None in budgets:
        return []
    (allowed,) = budgets
    return [{"y": allowed, "text": f"budget: {allowed:g} points"}]


def _points(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Marks of the plot, each with the lines of its tooltip."""
    points: list[dict[str, Any]] = []
    for setting in content["settings"]:
        result = setting["result"]
        others = [tried for tried in setting["candidates"] if _size(tried) != _size(result)]
        points.extend(_point(setting, tried, "tried", None) for tried in others)
        kind = "stopped" if setting["status"] == "stopped" else "result"
        kind = "chosen" if setting["number"] == content["chosen"]["number"] else kind
        points.append(_point(setting, result, kind, result["latency_ms"][_BATCH]))
    return points


def _size(figures: Mapping[str, Any]) -> tuple[int, int]:
    return figures["parameters"], figures["macs"]


def _point(setting: Mapping[str, Any], figures: Mapping[str, Any], kind: str, latency: float | None) -> dict[str, Any]:
    sizes = f"{format_count(figures['parameters'])} parameters, {format_count(figures['macs'])} MACs"
    lines = [
        f"#{setting['number']} {setting['label']}",
        f"{_KINDS[kind]['label']}: {sizes}",
        f"{format_points(figures['validation_drop'])} on {figures['images']:,} validation images",
    ]
    if latency is not None:
        lines.append(f"{format_milliseconds(latency)} for a batch of {_BATCH}")
    return {
        "kind": kind,
        "label": f"#{setting['number']}" if kind == "chosen" else None,
        "x": {"parameters": figures["parameters"], "macs": figures["macs"], "latency": latency},
        "y": figures["validation_drop"],
        "bound": None,
        "lines": lines,
    }


def _settings(content: Mapping[str, Any]) -> str:
    rows = [
        [
            f"#{setting['number']}",
            setting["label"],
            format_fraction(setting["result"]["parameters_removed"]),
            format_fraction(setting["result"]["macs_removed"]),
            format_milliseconds(setting["result"]["latency_ms"][_BATCH]),
            format_change(setting["result"]["validation_drop"]),
            format_change(setting["result"]["drop_upper_bound"]),
            ", ".join(str(_AXES[axis]["short"]) for axis in fronts_of(content, setting["number"])) or "nothing",
            describe_search(setting),
        ]
        for setting in content["settings"]
    ]
    head = ["", "setting", "parameters removed", "MACs removed", f"time, {_BATCH} images", "change", "at worst",
            "best in", "search"]  # fmt: skip
    chosen = {
        place for place, entry in enumerate(content["settings"]) if entry["number"] == content["chosen"]["number"]
    }
    listed = table(head, rows, kinds="ntnnnnntt", emphasised=chosen)
    return section("Settings", f"<div class='card'>{listed}</div>", note=_TABLE_NOTE)


def fronts_of(content: Mapping[str, Any], number: int) -> list[str]:
    """Axes on whose front a setting's result lies."""
    return [
        axis
        for axis, steps in content["fronts"].items()
        if any(step["setting"] == number and step["is_result"] for step in steps)
    ]


def describe_search(setting: Mapping[str, Any]) -> str:
    """How a setting's search went, in a few words."""
    rounds = f"{setting['rounds']} round{'s' if setting['rounds'] != 1 else ''}"
    if setting["status"] == "stopped":
        return f"stopped after {rounds} by #{setting['stopped_by']}"
    return rounds if setting["budget_met"] else f"{rounds}, budget not met"


def _background(content: Mapping[str, Any]) -> str:
    seconds = content["timings_seconds"]
    total = f"Time: {format_seconds(seconds['total'])}" if "total" in seconds else "Time"
    blocks = (
        ("What the settings shared", {title: content["solve"][name] for name, title in _WORK_NAMES.items()}),
        (total, {name: format_seconds(value) for name, value in seconds.items()}),
        ("Data", content["data"]),
        ("Lineage: where it came from and where it went", content.get("lineage") or {}),
        ("Environment", content.get("environment") or {}),
    )
    return section("To do it again", *(folded(name, pairs(entries)) for name, entries in blocks if entries))
