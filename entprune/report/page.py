"""The page ``report.html``: what was asked, what came of it, and why, for a reader who did not watch the run."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from entprune.report.style import inline_plot, style_sheet
from entprune.report.wording import (
    UNKNOWN,
    describe_budget,
    describe_certificate,
    describe_outcome,
    format_accuracy,
    format_change,
    format_count,
    format_fraction,
    format_milliseconds,
    format_number,
    format_seconds,
    result_of,
)

_OPEN_GROUPS = 12  # curves of further groups are folded away

_FIGURES_NOTE = (
    "Accuracy is top-1 on the test images, by which nothing was chosen. One shot: channels were removed and the "
    "remaining weights computed anew from the calibration images, without a single training step. MACs: "
    "multiply-accumulates for one image."
)
_ROUNDS_NOTE = (
    "Each round prunes the network that the one before it left, and tunes it; its figures are of the tuned network, "
    "against the unpruned one. Networks tried and curves further down are those of the first round."
)
_WIDTHS_CAPTION = (
    "Channels before and after. A group is a set of channels that can only be kept or removed together; it is named "
    "after the first layer that computes it."
)
_SEARCH_CAPTION = (
    "Each mark is one pruned network: how small it is, and what it lost on the validation images. The bar above a "
    "mark ends at the upper confidence bound, by which it is judged. A mark at the upper edge with an arrow lost "
    "more than fits."
)
_ERROR_CAPTION = (
    "Output lost against channels kept, for every setting of the solver and the best of them; both scales are "
    "logarithmic. The circle is the width that was chosen."
)
_PROBABILITY_CAPTION = (
    "Channel probabilities w at the point of the solver's path nearest to the chosen width, in falling order. "
    "Hatched bars belong to removed channels."
)
_GROUPS_NOTE = (
    "Output lost: how much of the variance of what the next layers compute cannot be had from the kept channels. "
    "Effective channels: exp H(w), the number of equally important channels that would have the same entropy H, at "
    "the width that was kept."
)


def render_page(report: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    """Return the whole page.

    Args:
        report: schema version 1.
        plots: from :func:`entprune.report.plots.draw_plots`.
    """
    title = f"{_model_name(report)} pruned: entprune report"
    sections = (
        _headline(report),
        _warnings(report["warnings"]),
        _figures_table(report),
        _rounds(report),
        _overview(report, plots),
        _groups(report, plots),
        _unprunable(report["unprunable"]),
        _background(report),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>\n{style_sheet()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


# --- sections -------------------------------------------------------------------------------------------------------


def _headline(report: Mapping[str, Any]) -> str:
    data, budget, certificate = report["data"], report["budget"], report.get("certificate")
    channels, height, width = report["model"]["input_shape"]
    facts = (
        f"Data: {data.get('spec') or 'images passed in process'}, {channels} × {height} × {width} pixels, "
        f"{report['model']['num_classes']} classes; {data['calibration_samples']:,} images to calibrate, "
        f"{data['validation_samples']:,} to choose, {data['test_samples']:,} to test."
    )
    verdicts = (
        _verdict(report.get("budget_met"), f"Asked: {describe_budget(budget)}. {describe_outcome(report)}"),
        _verdict(bool(certificate and certificate["passed"]), describe_certificate(certificate)),
    )
    return (
        f"<header>\n<p class='quiet small'>entprune report, seed {_text(report.get('seed'))}</p>\n"
        f"<h1>{_text(_model_name(report))}, pruned</h1>\n<p class='quiet'>{_text(facts)}</p>\n{_tiles(report)}\n"
        f"<ul class='verdicts'>\n{''.join(verdicts)}</ul>\n</header>"
    )


def _tiles(report: Mapping[str, Any]) -> str:
    dense, result = report["dense"], result_of(report)
    accuracy = f"{format_accuracy(dense.get('accuracy'))} → {format_accuracy(result.get('accuracy'))}"
    how = "after fine-tuning" if report.get("fine_tuned") else "without fine-tuning"
    tiles = [
        (
            "Parameters removed",
            format_fraction(result["parameters_removed"]),
            _before_after(dense, result, "parameters"),
        ),
        ("MACs removed", format_fraction(result["macs_removed"]), _before_after(dense, result, "macs")),
        ("Test accuracy, points", format_change(result.get("accuracy_drop")), f"{accuracy}, {how}"),
        ("Speed-up, one image", *_speed(dense, result)),
    ]
    return "<dl class='tiles'>" + "".join(_tile(*tile) for tile in tiles) + "</dl>"


def _tile(name: str, value: str, detail: str) -> str:
    return f"<div class='card'><dt>{_text(name)}</dt><dd>{_text(value)}<small>{_text(detail)}</small></dd></div>"


def _before_after(dense: Mapping[str, Any], result: Mapping[str, Any], key: str) -> str:
    return f"{format_count(dense[key])} → {format_count(result[key])}"


def _speed(dense: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, str]:
    before, after = _latency(dense, "1"), _latency(result, "1")
    if before is None or after is None:
        return UNKNOWN, "not measured"
    return f"{before / after:.2g} ×", f"{format_milliseconds(before)} → {format_milliseconds(after)}"


def _verdict(is_good: bool | None, sentence: str) -> str:
    sign, kind = ("✓", "good") if is_good else ("✗", "bad")
    return f"<li class='{kind}'><span aria-hidden='true'>{sign}</span><span>{_text(sentence)}</span></li>\n"


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "\n".join(f"<li>{_text(warning)}</li>" for warning in warnings)
    return (
        "<section class='card warnings' role='note'>\n<h3>Know before you use it</h3>\n"
        f"<ul>\n{items}\n</ul>\n</section>"
    )


def _figures_table(report: Mapping[str, Any]) -> str:
    columns = [("unpruned", report["dense"]), ("one shot", report["one_shot"])]
    if report.get("fine_tuned"):
        columns.append(("fine-tuned", report["fine_tuned"]))
    columns += [(str(entry["name"]), entry) for entry in report.get("baselines") or ()]
    figures = [entry for _, entry in columns]
    rows = [
        ["accuracy", *(format_accuracy(entry.get("accuracy")) for entry in figures)],
        ["change, points", *(format_change(entry.get("accuracy_drop")) for entry in figures)],
        ["parameters", *(format_count(entry.get("parameters")) for entry in figures)],
        ["… removed", *(format_fraction(entry.get("parameters_removed")) for entry in figures)],
        ["MACs", *(format_count(entry.get("macs")) for entry in figures)],
        ["… removed", *(format_fraction(entry.get("macs_removed")) for entry in figures)],
        ["time, 1 image", *(format_milliseconds(_latency(entry, "1")) for entry in figures)],
        ["time, 64 images", *(format_milliseconds(_latency(entry, "64")) for entry in figures)],
    ]
    table = _table(["", *(name for name, _ in columns)], rows, kinds="t" + "n" * len(columns))
    return (
        f"<section>\n<h2>Before and after</h2>\n<p class='quiet small'>{_FIGURES_NOTE}</p>\n"
        f"<div class='card'>{table}</div>\n</section>"
    )


def _rounds(report: Mapping[str, Any]) -> str:
    """Of a run that pruned and tuned in turns: what each round came to."""
    rounds, dense = report.get("rounds") or (), report["dense"]
    if not rounds:
        return ""
    rows = [
        [
            entry["round"],
            format_count(entry["parameters"]),
            format_fraction(1.0 - entry["parameters"] / dense["parameters"]),
            format_fraction(1.0 - entry["macs"] / dense["macs"]),
            format_accuracy(entry.get("validation_accuracy")),
            format_change(entry.get("validation_drop")),
            format_change(entry.get("drop_upper_bound")),
            entry["networks_tried"],
            _judgement(entry | {"accepted": not entry["budgets_missed"]}),
        ]
        for entry in rounds
    ]
    head = ["round", "parameters", "removed", "MACs removed", "validation accuracy", "change", "at worst", "tried",
            "judgement"]  # fmt: skip
    chosen = {number for number, entry in enumerate(rounds) if entry["chosen"]}
    table = _table(head, rows, kinds="nnnnnnnnt", emphasised=chosen)
    return (
        f"<section>\n<h2>Rounds of pruning and tuning</h2>\n<p class='quiet small'>{_ROUNDS_NOTE}</p>\n"
        f"<div class='card'>{table}</div>\n</section>"
    )


def _overview(report: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    headings = {
        "widths": ("Channels of each group", _WIDTHS_CAPTION),
        "search": (f"Networks tried: {len(report['candidates'])}", _SEARCH_CAPTION),
    }
    figures = "\n".join(
        _figure(name, plots[name], heading, caption) for name, (heading, caption) in headings.items() if name in plots
    )
    if not figures:
        return ""
    gallery = f"<div class='figures wide'>\n{figures}\n</div>"
    return f"<section>\n<h2>What was chosen</h2>\n{gallery}\n{_candidates(report['candidates'])}\n</section>"


def _candidates(candidates: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            entry["round"],
            format_count(entry["parameters"]),
            format_fraction(entry["parameters_removed"]),
            format_fraction(entry["macs_removed"]),
            format_accuracy(entry.get("validation_accuracy")),
            format_change(entry.get("validation_drop")),
            format_change(entry.get("drop_upper_bound")),
            f"{entry['images']:,}",
            _judgement(entry),
        ]
        for entry in candidates
    ]
    head = [
        "round",
        "parameters",
        "removed",
        "MACs removed",
        "validation accuracy",
        "change",
        "at worst",
        "images",
        "judgement",
    ]
    chosen = {number for number, entry in enumerate(candidates) if entry["chosen"]}
    return _folded(
        f"All {len(candidates)} networks that were tried", _table(head, rows, kinds="nnnnnnnnt", emphasised=chosen)
    )


def _judgement(entry: Mapping[str, Any]) -> str:
    verdict = "within the budget" if entry["accepted"] else "not within the budget"
    return f"{verdict}, chosen" if entry["chosen"] else verdict


def _groups(report: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    if not report["groups"]:
        return ""
    rows = [
        [
            entry["name"],
            entry["channels"],
            entry["kept"],
            format_fraction(entry["kept"] / entry["channels"]),
            format_fraction(entry.get("reconstruction_error")),
            format_number(entry.get("effective_channels")),
            format_number(entry.get("entropy")),
            entry.get("setting") or UNKNOWN,
            entry.get("note") or "",
        ]
        for entry in report["groups"]
    ]
    head = ["group", "before", "after", "kept", "output lost", "effective channels", "entropy, nats", "setting", "note"]
    table = _table(head, rows, kinds="cnnnnnntt")
    return (
        f"<section>\n<h2>Groups of channels</h2>\n<p class='quiet small'>{_GROUPS_NOTE}</p>\n"
        f"<div class='card'>{table}</div>\n{_curves(report['groups'], plots)}\n</section>"
    )


def _curves(groups: Sequence[Mapping[str, Any]], plots: Mapping[str, str]) -> str:
    """Small multiples: what each width costs, and how the probabilities lie at the chosen one."""
    parts = []
    for kind, heading, caption in (
        ("error", "What each width costs", _ERROR_CAPTION),
        ("probability", "How important each channel is", _PROBABILITY_CAPTION),
    ):
        names = {f"{kind}-{number:03d}": entry["name"] for number, entry in enumerate(groups)}
        figures = [
            _figure(name, plots[name], label=f"{heading}: {group}") for name, group in names.items() if name in plots
        ]
        if figures:
            parts.append(f"<h3>{heading}</h3>\n<p class='quiet small'>{caption}</p>\n{_gallery(figures)}")
    return "\n".join(parts)


def _gallery(figures: Sequence[str]) -> str:
    shown = f"<div class='figures'>\n{''.join(figures[:_OPEN_GROUPS])}</div>"
    rest = figures[_OPEN_GROUPS:]
    if not rest:
        return shown
    folded = _folded(f"The other {len(rest)} groups", f"<div class='figures'>{''.join(rest)}</div>")
    return f"{shown}\n{folded}"


def _unprunable(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return ""
    table = _table(
        ["layer", "why it was left alone"], [[entry["layer"], entry["reason"]] for entry in entries], kinds="ct"
    )
    body = (
        f"<div class='card'>{table}</div>" if len(entries) <= _OPEN_GROUPS else _folded(f"{len(entries)} layers", table)
    )
    return f"<section>\n<h2>Layers whose outputs were left alone</h2>\n{body}\n</section>"


def _background(report: Mapping[str, Any]) -> str:
    timings = report.get("timings_seconds") or {}
    total = timings.get("total")
    blocks = [
        (
            f"Time: {format_seconds(total)}" if total is not None else "Time",
            {k: format_seconds(v) for k, v in timings.items()},
        ),
        ("Data", report["data"]),
        ("Lineage: where it came from and where it went", report.get("lineage") or {}),
        ("Settings", report.get("settings") or {}),
        ("Environment", report.get("environment") or {}),
    ]
    folded = [_folded(name, _table(["", ""], _pairs(content), kinds="tv")) for name, content in blocks if content]
    return "<section>\n<h2>To do it again</h2>\n" + "\n".join(folded) + "\n</section>"


# --- pieces ---------------------------------------------------------------------------------------------------------


def _pairs(content: Mapping[str, Any]) -> list[list[str]]:
    return [[str(key).replace("_", " "), _plain(value)] for key, value in content.items()]


def _plain(value: Any) -> str:
    if value is None or value == []:
        return UNKNOWN
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _model_name(report: Mapping[str, Any]) -> str:
    return str(report["model"].get("spec") or "Network passed in process")


def _latency(figures: Mapping[str, Any], batch_size: str) -> float | None:
    value = (figures.get("latency_ms") or {}).get(batch_size)
    return None if value is None else float(value)


def _figure(name: str, svg: str, heading: str = "", caption: str = "", *, label: str = "") -> str:
    head = f"<h3>{_text(heading)}</h3>" if heading else ""
    foot = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    drawing = inline_plot(name, svg, label or heading)
    return f"<figure class='card' data-plot='{_text(name)}'>{head}{drawing}{foot}</figure>\n"


def _folded(summary: str, body: str) -> str:
    return f"<details class='card'><summary>{_text(summary)}</summary>{body}</details>"


def _table(
    head: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    kinds: str,
    emphasised: frozenset[int] | set[int] = frozenset(),
) -> str:
    """A table that scrolls sideways on narrow screens.

    Args:
        head: column headings; none at all if they are empty.
        rows: cells, escaped here.
        kinds: one letter for each column: t text, n number, c code on one line, v code that may be broken.
        emphasised: numbers of rows to stress.
    """
    classes = [
        {"t": " class='text'", "n": " class='number'", "c": " class='name'", "v": " class='code'"}[kind]
        for kind in kinds
    ]
    header = ""
    if any(head):
        titles = "".join(f"<th scope='col'{kind}>{_text(name)}</th>" for name, kind in zip(head, classes, strict=True))
        header = f"<thead><tr>{titles}</tr></thead>"
    body = "".join(
        f"<tr{' class=chosen' if number in emphasised else ''}>"
        + "".join(f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(row, classes, strict=True))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f"<div class='scroll' tabindex='0'><table>{header}<tbody>{body}</tbody></table></div>"


def _text(value: Any) -> str:
    """Escaped text; a number and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=(?:%|ms|s|min|[kMG])(?!\w))", "&nbsp;", html.escape(str(value)))
