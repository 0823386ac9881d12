"""The network and its figures as bars of plain HTML: they fit any width and need no script.

What a bar stands for is written beside it, and the unpruned network's are hatched, so colour adds nothing but ease.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entprune.report.pieces import text
from entprune.report.wording import (
    format_accuracy,
    format_count,
    format_fraction,
    format_milliseconds,
)

_LEAST_BAR = 0.4  # percent of the full length: what is there can be seen
_LEAST_ERROR = 1e-5  # as a fraction; smaller ones are not told apart
Columns = Sequence[tuple[str, Mapping[str, Any]]]


def before_and_after(columns: Columns) -> str:
    """Bars of accuracy, parameters, MACs and latency, one for each network.

    Args:
        columns: name and figures of each network, the unpruned one first.
    """
    batches = list(columns[0][1].get("latency_ms") or {})
    measures = [
        ("Accuracy on the test images", [figures.get("accuracy") for _, figures in columns], format_accuracy, 100.0),
        ("Parameters", [figures["parameters"] for _, figures in columns], format_count, None),
        ("MACs for one image", [figures["macs"] for _, figures in columns], format_count, None),
        *(
            (
                f"Time for {'one image' if batch == '1' else f'{batch} images'}",
                [(figures.get("latency_ms") or {}).get(batch) for _, figures in columns],
                format_milliseconds,
                None,
            )
            for batch in batches
        ),
    ]
    names = [name for name, _ in columns]
    cards = []
    for title, values, wording, full in measures:
        longest = full or max((value for value in values if value is not None), default=0.0) or 1.0
        rows = "".join(
            _bar_row(name, value, longest, wording(value), number)
            for number, (name, value) in enumerate(zip(names, values, strict=True))
        )
        cards.append(f"<div class='card measure'><h3>{text(title)}</h3>{rows}</div>")
    return f"<div class='figures measures'>{''.join(cards)}</div>"


def _bar_row(name: str, value: float | None, longest: float, shown: str, number: int) -> str:
    bar = "" if value is None else _bar(value / longest, "was" if number == 0 else "is" if number == 1 else "is tuned")
    return f"<div class='row'><span>{text(name)}</span><div class='track'>{bar}</div><b>{text(shown)}</b></div>"


def _bar(fraction: float, kind: str) -> str:
    """A bar of some fraction of the track's length."""
    percent = max(_LEAST_BAR, 100.0 * min(fraction, 1.0)) if fraction > 0 else 0.0
    return f"<i class='{kind}' style='width:{percent:.2f}%'></i>"


def draw_network(report: Mapping[str, Any]) -> str:
    """The groups in execution order, each as wide as its layers were (hatched) and are (solid).

    Beside the width stand the parameters and MACs of the layers that compute the group, and what the next layers lost.
    """
    groups = report["groups"]
    if not groups:
        return ""
    widest = max(entry["channels"] for entry in groups)
    channels, height, width = report["model"]["input_shape"]
    totals = {name: report["dense"][name] for name in ("parameters", "macs")}
    rows = [_group_row(entry, widest, totals) for entry in groups]
    others = report.get("other_layers")
    if others:
        rows.append(_layer_row("all other layers", "what they compute was left alone", "", "", others, totals, ""))
    ends = (
        f"<div class='end'>in: {channels} × {height} × {width} pixels</div>",
        f"<div class='end'>out: {report['model']['num_classes']} classes</div>",
    )
    head = "<div class='layer head' aria-hidden='true'>" + "".join(
        f"<span>{title}</span>" for title in ("group", "channels", "parameters", "MACs", "output lost")
    )
    return f"<div class='card network'>{head}</div>{ends[0]}{''.join(rows)}{ends[1]}</div>"


def _group_row(entry: Mapping[str, Any], widest: int, totals: Mapping[str, int]) -> str:
    before, after = entry["channels"], entry["kept"]
    bars = (
        f"<div class='track centred' style='width:{max(1.5, 100 * before / widest):.2f}%'>"
        f"{_bar(1.0, 'was')}{_bar(after / before, 'is')}</div>"
    )
    error = entry.get("reconstruction_error")
    lost = f"< {_LEAST_ERROR:.3%}".replace("%", " %") if error and error < _LEAST_ERROR else format_fraction(error)
    return _layer_row(entry["name"], entry.get("note") or "", bars, f"{before} → {after}", entry, totals, lost)


def _layer_row(
    name: str, note: str, widths: str, counts: str, entry: Mapping[str, Any], totals: Mapping[str, int], lost: str
) -> str:
    cells = [
        f"<span class='who'><code>{text(name)}</code><small>{text(note)}</small></span>",
        f"<span class='widths'>{widths}<small>{text(counts)}</small></span>"
        if counts
        else "<span class='widths'></span>",
        _share(entry.get("parameters"), totals["parameters"], "parameters"),
        _share(entry.get("macs"), totals["macs"], "MACs"),
        f"<span class='lost'>{f'<em>output lost</em>{text(lost)}' if lost else ''}</span>",
    ]
    return f"<div class='layer' data-layer>{''.join(cells)}</div>"


def _share(cost: Mapping[str, int] | None, total: int, title: str) -> str:
    """Part of the unpruned network's cost, before and after."""
    if cost is None:
        return "<span class='share'></span>"
    before, after = cost["dense"] / total, cost["pruned"] / total
    shown = f"{format_fraction(before)} → {format_fraction(after)}"
    counts = f"{format_count(cost['dense'])} → {format_count(cost['pruned'])}"
    return (
        f"<span class='share'><em>{title}</em><div class='track twin'>{_bar(before, 'was')}{_bar(after, 'is')}</div>"
        f"<small>{text(shown)}</small><small>{text(counts)}</small></span>"
    )
