"""The page ``report.html``: what was asked, what came of it, and why, for a reader who did not watch the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from entprune.report.chart_data import candidate_chart, probability_chart
from entprune.report.drawing import before_and_after, draw_network
from entprune.report.pieces import bullets, chart, folded, pairs, render_shell, section, table, text, tiles
from entprune.report.style import inline_plot
from entprune.report.wording import (
    UNKNOWN,
    describe_budget,
    describe_certificate,
    describe_outcome,
    describe_perturbed,
    format_accuracy,
    format_change,
    format_count,
    format_fraction,
    format_interval,
    format_milliseconds,
    format_number,
    format_points,
    format_seconds,
    model_name,
    result_of,
    speed_up,
)

_OPEN_LAYERS = 12  # longer lists are folded away

_FIGURES_NOTE = (
    "Accuracy is top-1 on the test images, by which nothing was chosen. One shot: channels were removed and the "
    "remaining weights computed anew from the calibration images, without a single training step. MACs: "
    "multiply-accumulates, the work for one image. On new images: where the change lies with 95 % confidence, from the "
    "test images that one network alone classifies correctly. Hatched bars are the unpruned network."
)
_ROUNDS_NOTE = (
    "Each round prunes the network that the one before it left, and tunes it; its figures are of the tuned network, "
    "against the unpruned one. Without a validation accuracy, it learnt from those images, too. Networks tried and "
    "curves further down are those of the first round."
)
_NETWORK_NOTE = (
    "From the input at the top to the output at the bottom. A group is a set of channels that can only be kept or "
    "removed together; it is named after the first layer that computes it. Hatched: before; solid: after. "
    "Parameters and MACs are those of the layers that compute the group, as shares of the unpruned network. Output "
    "lost: how much of the variance of what the next layers compute cannot be had from the kept channels."
)
_SEARCH_NOTE = (
    "Each mark is one smaller network: how small it is, and how much accuracy it lost on the validation images. The "
    "line above a mark ends at the upper confidence bound, by which it is judged: it has to stay below the budget. A "
    "mark at the upper edge with an arrow lost more than fits. Point at a mark, or tap it, for its figures."
)
_GROUPS_NOTE = (
    "Solving gives every channel of a group a probability w, and those that fall to zero can be removed. "
    "Effective channels: exp H(w), the number of equally important channels that would have the same entropy H."
)
_PROBABILITY_CAPTION = "Probabilities at the point of the solver's path nearest to the chosen width."
_ERROR_CAPTION = (
    "Output lost against channels kept, for every setting of the solver and the best of them; both scales are "
    "logarithmic. The circle is the width that was chosen."
)


def render_page(report: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    """Return the whole page.

    Args:
        report: schema version 1.
        plots: from :func:`entprune.report.plots.draw_plots`.
    """
    candidates, probabilities = candidate_chart(report), probability_chart(report)
    sections = (
        _headline(report),
        bullets("Know before you use it", report["warnings"]),
        _figures(report),
        _rounds(report),
        _network(report),
        _candidates(report["candidates"], candidates),
        _inside(report["groups"], probabilities, plots),
        _low_rank(report.get("low_rank") or ()),
        _unprunable(report["unprunable"]),
        _background(report),
    )
    title = f"{model_name(report)} pruned: entprune report"
    return render_shell(title, sections, is_drawn=bool(candidates or probabilities))


# --- sections -------------------------------------------------------------------------------------------------------


def _origin(data: Mapping[str, Any]) -> str:
    """Where the images to choose by are from, if that is known."""
    split = data.get("validation_split")
    return f" of the {split} split" if split else ""


def _headline(report: Mapping[str, Any]) -> str:
    data, budget, certificate = report["data"], report["budget"], report.get("certificate")
    channels, height, width = report["model"]["input_shape"]
    facts = (
        f"Data: {data.get('spec') or 'images passed in process'}, {channels} × {height} × {width} pixels, "
        f"{report['model']['num_classes']} classes; {data['calibration_samples']:,} images to calibrate, "
        f"{data['validation_samples']:,}{_origin(data)} to choose{describe_perturbed(report)}, "
        f"{data['test_samples']:,} to test."
    )
    verdicts = (
        _verdict(report.get("budget_met"), f"Asked: {describe_budget(budget)}. {describe_outcome(report)}"),
        _verdict(bool(certificate and certificate["passed"]), describe_certificate(certificate)),
    )
    return (
        f"<header>\n<p class='quiet small'>entprune report, seed {text(report.get('seed'))}</p>\n"
        f"<h1>{text(model_name(report))}, pruned</h1>\n<p class='quiet'>{text(facts)}</p>\n{_tiles(report)}\n"
        f"<ul class='verdicts'>\n{''.join(verdicts)}</ul>\n</header>"
    )


def _tiles(report: Mapping[str, Any]) -> str:
    dense, result = report["dense"], result_of(report)
    accuracy = f"{format_accuracy(dense.get('accuracy'))} → {format_accuracy(result.get('accuracy'))}"
    how = "after fine-tuning" if report.get("fine_tuned") else "without fine-tuning"
    sizes = {key: f"{format_count(dense[key])} → {format_count(result[key])}" for key in ("parameters", "macs")}
    times = (
        f"{format_milliseconds(_latency(dense, '64'))} → {format_milliseconds(_latency(result, '64'))}"
        if _latency(dense, "64") is not None
        else "not measured"
    )
    return tiles(
        (
            ("Parameters removed", format_fraction(result["parameters_removed"]), sizes["parameters"]),
            ("MACs removed", format_fraction(result["macs_removed"]), sizes["macs"]),
            ("Change in test accuracy", format_points(result.get("accuracy_drop")), f"{accuracy}, {how}"),
            ("Speed-up, 64 images", speed_up(dense, result), times),
        )
    )


def _verdict(is_good: bool | None, sentence: str) -> str:
    sign, kind = ("✓", "good") if is_good else ("✗", "bad")
    return f"<li class='{kind}'><span aria-hidden='true'>{sign}</span><span>{text(sentence)}</span></li>\n"


def _figures(report: Mapping[str, Any]) -> str:
    columns = [("unpruned", report["dense"]), ("one shot", report["one_shot"])]
    if report.get("fine_tuned"):
        columns.append(("fine-tuned", report["fine_tuned"]))
    columns += [(str(entry["name"]), entry) for entry in report.get("baselines") or ()]
    figures = [entry for _, entry in columns]
    rows = [
        ["accuracy", *(format_accuracy(entry.get("accuracy")) for entry in figures)],
        ["change, points", *(format_change(entry.get("accuracy_drop")) for entry in figures)],
        ["… on new images", *(format_interval(entry.get("accuracy_drop_interval")) for entry in figures)],
        ["parameters", *(format_count(entry.get("parameters")) for entry in figures)],
        ["… removed", *(format_fraction(entry.get("parameters_removed")) for entry in figures)],
        ["MACs", *(format_count(entry.get("macs")) for entry in figures)],
        ["… removed", *(format_fraction(entry.get("macs_removed")) for entry in figures)],
        ["time, 1 image", *(format_milliseconds(_latency(entry, "1")) for entry in figures)],
        ["time, 64 images", *(format_milliseconds(_latency(entry, "64")) for entry in figures)],
    ]
    listed = table(["", *(name for name, _ in columns)], rows, kinds="t" + "n" * len(columns))
    return section(
        "Before and after", before_and_after(columns), folded("The same as a table", listed), note=_FIGURES_NOTE
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
    listed = table(head, rows, kinds="nnnnnnnnt", emphasised=chosen)
    return section("Rounds of pruning and tuning", f"<div class='card'>{listed}</div>", note=_ROUNDS_NOTE)


def _network(report: Mapping[str, Any]) -> str:
    groups = report["groups"]
    if not groups:
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
        for entry in groups
    ]
    head = ["group", "before", "after", "kept", "output lost", "effective channels", "entropy, nats", "setting", "note"]
    listed = folded("All groups as a table", table(head, rows, kinds="cnnnnnntt"))
    return section("The network, group by group", draw_network(report), listed, note=_NETWORK_NOTE)


def _candidates(candidates: Sequence[Mapping[str, Any]], drawn: Mapping[str, Any] | None) -> str:
    if not candidates:
        return ""
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
    head = ["round", "parameters", "removed", "MACs removed", "validation accuracy", "change", "at worst", "images",
            "judgement"]  # fmt: skip
    chosen = {number for number, entry in enumerate(candidates) if entry["chosen"]}
    listed = folded("All of them as a table", table(head, rows, kinds="nnnnnnnnt", emphasised=chosen))
    figure = "" if drawn is None else chart("scatter", "candidates", drawn)
    heading = (
        f"{len(candidates)} smaller networks were tried" if len(candidates) > 1 else "One smaller network was tried"
    )
    return section(heading, figure, listed, note=_SEARCH_NOTE if figure else "")


def _judgement(entry: Mapping[str, Any]) -> str:
    verdict = "within the budget" if entry["accepted"] else "not within the budget"
    return f"{verdict}, chosen" if entry["chosen"] else verdict


def _inside(groups: Sequence[Mapping[str, Any]], drawn: Mapping[str, Any] | None, plots: Mapping[str, str]) -> str:
    """One group at a time: how the probabilities lie at the chosen width, and what any other width would cost."""
    curves = "".join(
        _curve(number, entry["name"], plots[f"error-{number:03d}"])
        for number, entry in enumerate(groups)
        if f"error-{number:03d}" in plots
    )
    bars = "" if drawn is None else chart(
        "bars", "probability", drawn, heading="How important each channel is", caption=_PROBABILITY_CAPTION,
        instead="The drawing needs scripts; the table of groups holds its entropies.",
    )  # fmt: skip
    if not curves and not bars:
        return ""
    return section("Inside one group", f"<div class='figures wide'>{bars}{curves}</div>", note=_GROUPS_NOTE)


def _curve(number: int, name: str, svg: str) -> str:
    heading = "What each width costs"
    drawing = inline_plot(f"error-{number:03d}", svg, f"{heading}: {name}")
    return (
        f"<figure class='card' data-plot='error-{number:03d}' data-group='{number}'><h3>{heading}</h3>{drawing}"
        f"<figcaption>{_ERROR_CAPTION}</figcaption></figure>"
    )


def _low_rank(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return ""
    listed = table(["layer", "rank"], [[entry["layer"], f"{entry['rank']}"] for entry in entries], kinds="cn")
    return section("Layers that became two thin ones", f"<div class='card'>{listed}</div>")


def _unprunable(entries: Sequence[Mapping[str, Any]]) -> str:
    if not entries:
        return ""
    rows = [[entry["layer"], entry["reason"]] for entry in entries]
    listed = table(["layer", "why it was left alone"], rows, kinds="ct")
    body = (
        f"<div class='card'>{listed}</div>"
        if len(entries) <= _OPEN_LAYERS
        else folded(f"{len(entries)} layers", listed)
    )
    return section("Layers whose outputs were left alone", body)


def _background(report: Mapping[str, Any]) -> str:
    timings = report.get("timings_seconds") or {}
    total = timings.get("total")
    blocks = (
        (
            f"Time: {format_seconds(total)}" if total is not None else "Time",
            {name: format_seconds(value) for name, value in timings.items()},
        ),
        ("Data", report["data"]),
        ("Lineage: where it came from and where it went", report.get("lineage") or {}),
        ("Settings", report.get("settings") or {}),
        ("Environment", report.get("environment") or {}),
    )
    return section("To do it again", *(folded(name, pairs(content)) for name, content in blocks if content))


def _latency(figures: Mapping[str, Any], batch_size: str) -> float | None:
    value = (figures.get("latency_ms") or {}).get(batch_size)
    return None if value is None else float(value)
