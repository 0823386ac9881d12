"""What the report's own charts show, as plain values for the page's script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from entprune.report.wording import format_change, format_count, format_fraction, format_number

CANDIDATE_KINDS = {
    "rejected": {"label": "not within the budget", "shape": "cross", "size": 5},
    "accepted": {"label": "within the budget", "shape": "circle", "size": 5.5},
    "dense": {"label": "unpruned", "shape": "diamond", "size": 5},
    "chosen": {"label": "chosen", "shape": "star", "size": 8},
}
_AXES = {
    "parameters": {"title": "parameters left", "short": "Parameters", "log": True},
    "macs": {"title": "multiply-accumulates left", "short": "MACs", "log": True},
}
_FEWEST_BARS = 8


def candidate_chart(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Accuracy lost against size for every network that was tried; None where nothing was scored."""
    candidates = [entry for entry in report["candidates"] if entry.get("validation_drop") is not None]
    if not candidates:
        return None
    dense, budget = report["dense"], report["budget"]
    unpruned = {
        "kind": "dense", "x": {"parameters": dense["parameters"], "macs": dense["macs"]}, "y": 0.0, "bound": None,
        "lines": ["unpruned", f"{format_count(dense['parameters'])} parameters, {format_count(dense['macs'])} MACs"],
    }  # fmt: skip
    guides: list[dict[str, Any]] = []
    if "max_accuracy_drop" in budget:
        allowed = budget["max_accuracy_drop"]
        guides.append({"y": allowed, "text": f"budget: {allowed:g} points"})
    for axis in _AXES:
        if f"{axis}_removed" in budget:
            removed = budget[f"{axis}_removed"]
            guides.append({"x": {axis: (1 - removed) * dense[axis]}, "text": f"budget: {100 * removed:g} % removed"})
    first = "macs" if "macs_removed" in budget and "parameters_removed" not in budget else "parameters"
    return {
        "axes": {axis: _AXES[axis] for axis in sorted(_AXES, key=lambda axis: axis != first)},
        "y": "accuracy lost, points",
        "kinds": CANDIDATE_KINDS,
        "points": [*(_candidate_point(entry) for entry in candidates), unpruned],
        "guides": guides,
        "top": highest_drop_shown(candidates, budget),
    }


def _candidate_point(entry: Mapping[str, Any]) -> dict[str, Any]:
    kind = candidate_kind(entry)
    bound = entry.get("drop_upper_bound")
    return {
        "kind": kind,
        "x": {"parameters": entry["parameters"], "macs": entry["macs"]},
        "y": entry["validation_drop"],
        "bound": bound,
        "lines": [
            CANDIDATE_KINDS[kind]["label"],
            f"{format_count(entry['parameters'])} parameters ({format_fraction(entry['parameters_removed'])} removed)",
            f"{format_count(entry['macs'])} MACs ({format_fraction(entry['macs_removed'])} removed)",
            f"accuracy {format_change(entry['validation_drop'])} points, at worst {format_change(bound)}",
            f"on {entry['images']:,} validation images, round {entry['round']}",
        ],
    }


def candidate_kind(entry: Mapping[str, Any]) -> str:
    """How a tried network is marked."""
    return "chosen" if entry["chosen"] else "accepted" if entry["accepted"] else "rejected"


def highest_drop_shown(candidates: Sequence[Mapping[str, Any]], budget: Mapping[str, float]) -> float:
    """Drop in points above which networks are drawn at the edge, so that what lies near the budget can be told apart.

    Args:
        candidates: those with a drop, at least one.
        budget: of the report.
    """
    drops = [float(entry["validation_drop"]) for entry in candidates]
    bounds = [float(entry["drop_upper_bound"] or entry["validation_drop"]) for entry in candidates if entry["accepted"]]
    allowed = budget.get("max_accuracy_drop")
    wanted = max([*bounds, *(drops if allowed is None else (0.0,))], default=0.0)
    near = max(1.15 * wanted, 2.5 * (allowed or 0.0), 0.2)
    return min(near, max(1.3 * max(drops), 1.15 * wanted, 1.3 * (allowed or 0.0), 0.2))


def probability_chart(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Channel probabilities of every group that the report holds them of, in falling order; None without any."""
    plan = {entry["name"]: set(entry["kept_channels"]) for entry in (report.get("plan") or {}).get("groups", ())}
    groups = [
        {"number": number, **_probability_bars(entry, plan[entry["name"]])}
        for number, entry in enumerate(report["groups"])
        if entry.get("channel_probability") and entry["name"] in plan
    ]
    return {"groups": groups} if groups else None


def _probability_bars(entry: Mapping[str, Any], kept: set[int]) -> dict[str, Any]:
    probability = entry["channel_probability"]
    order = sorted(range(len(probability)), key=lambda channel: -probability[channel])
    last_kept = max((rank for rank, channel in enumerate(order) if channel in kept), default=0)
    support = sum(value > 0 for value in probability)
    shown = min(len(order), max(_FEWEST_BARS, last_kept + 2, math.ceil(1.15 * support)))
    rest = len(order) - shown
    left_out = f" The other {rest:,} channels have w = 0, are removed, and are not drawn." if rest else ""
    how = f" This set was found by {entry['setting']}." if entry.get("setting") else ""
    return {
        "name": entry["name"],
        "kept": entry["kept"],
        "channels": entry["channels"],
        "effective": entry["effective_channels"],
        "bars": [[channel, probability[channel], int(channel in kept)] for channel in order[:shown]],
        "text": (
            f"{entry['kept']} of {entry['channels']} channels kept (solid), the rest removed (hatched); "
            f"{format_number(entry['effective_channels'])} effective channels.{how}{left_out}"
        ),
    }
