"""The page that puts several runs side by side: figures, widths, and the settings that they differ in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from entprune.report.pieces import bullets, chart, plain, render_shell, section, table, text
from entprune.report.wording import (
    describe_budget,
    format_accuracy,
    format_count,
    format_fraction,
    format_milliseconds,
    format_points,
    model_name,
    result_of,
    speed_up,
)

_BATCH = "64"
_KINDS = {
    "plain": {"label": "without fine-tuning", "shape": "circle", "size": 6},
    "tuned": {"label": "fine-tuned", "shape": "triangle", "size": 6},
}
_AXES = {
    "parameters": ("Accuracy and parameters", "parameters removed, %"),
    "macs": ("Accuracy and MACs", "multiply-accumulates removed, %"),
    "latency": ("Accuracy and time", f"time saved for {_BATCH} images, %"),
}
_NOTE = (
    "Each mark is the network of one run, with the run's number; the further to the right and the lower, the better. "
    "Accuracy is that on the test images; a loss below zero is a gain."
)
_WIDTHS_NOTE = "Channels kept in each group; the bar is the part that is left of the group's channels."
_SETTINGS_NOTE = "Everything that was asked for or set differently. What is not listed is the same in all runs."

Runs = Sequence[tuple[str, Mapping[str, Any]]]


def render_comparison(runs: Runs) -> str:
    """Return the whole page.

    Args:
        runs: a name for each run and its report (schema version 1), at least two.
    """
    sections = (
        f"<header>\n<p class='quiet small'>entprune comparison</p>\n<h1>{len(runs)} runs side by side</h1>\n</header>",
        bullets("Know before you compare", list(collect_differences(runs))),
        _figures(runs),
        _charts(runs),
        *_widths(runs),
        _settings(runs),
    )
    return render_shell(f"{len(runs)} pruning runs compared", sections, is_drawn=True)


def collect_differences(runs: Runs) -> Iterator[str]:
    """What makes figures of these runs hard to compare, in sentences."""
    reports = [report for _, report in runs]
    if len({model_name(report) for report in reports}) > 1:
        yield "The runs pruned different networks: compare what was removed, not what is left."
    elif len({(report.get("lineage") or {}).get("checkpoint_sha256") for report in reports}) > 1:
        yield "The runs started from different checkpoints of the network."
    if len({report["data"].get("sha256") for report in reports}) > 1:
        yield "The runs were measured on different images: their accuracies do not compare, their losses hardly."
    if len({_machine(report) for report in reports}) > 1:
        yield "The runs were measured on different machines or threads: milliseconds do not compare."
    for number, (name, report) in enumerate(runs, 1):
        certificate = report.get("certificate")
        if certificate and not certificate["passed"]:
            yield f"The certificate of #{number} ({name}) failed: do not use its network."
        if not report.get("budget_met", True):
            yield f"#{number} ({name}) did not meet its budget."


def _machine(report: Mapping[str, Any]) -> tuple[Any, ...]:
    surroundings = report.get("environment") or {}
    return tuple(surroundings.get(name) for name in ("platform", "cpu", "cpus", "gpu", "threads"))


def _figures(runs: Runs) -> str:
    columns = [_column(report) for _, report in runs]
    rows = [[title, *(column[title] for column in columns)] for title in columns[0]]
    listed = table(_heads(runs), rows, kinds="t" + "s" * len(runs))
    return section("Figures", f"<div class='card'>{listed}</div>")


def _heads(runs: Runs) -> list[str]:
    return ["", *(f"#{number} {name}" for number, (name, _) in enumerate(runs, 1))]


def _column(report: Mapping[str, Any]) -> dict[str, str]:
    """What is told of one run."""
    dense, result, certificate = report["dense"], result_of(report), report.get("certificate")
    times = [(figures.get("latency_ms") or {}).get(_BATCH) for figures in (dense, result)]
    return {
        "network": model_name(report),
        "data": str(report["data"].get("spec") or "in process"),
        "asked for": describe_budget(report["budget"]),
        "afterwards": "fine-tuned" if report.get("fine_tuned") else "no training step",
        "test accuracy": f"{format_accuracy(dense.get('accuracy'))} → {format_accuracy(result.get('accuracy'))}",
        "change": format_points(result.get("accuracy_drop")),
        "parameters removed": format_fraction(result["parameters_removed"]),
        "parameters": f"{format_count(dense['parameters'])} → {format_count(result['parameters'])}",
        "MACs removed": format_fraction(result["macs_removed"]),
        "MACs": f"{format_count(dense['macs'])} → {format_count(result['macs'])}",
        f"time, {_BATCH} images": f"{format_milliseconds(times[0])} → {format_milliseconds(times[1])}",
        "speed-up": speed_up(dense, result, _BATCH),
        "certificate": "not made" if not certificate else "passed" if certificate["passed"] else "FAILED",
    }


def _charts(runs: Runs) -> str:
    points = [_point(number, name, report) for number, (name, report) in enumerate(runs, 1)]
    budgets = {report["budget"].get("max_accuracy_drop") for _, report in runs}
    guides = [
        {"y": drop, "text": f"budget: {drop:g} points"} for drop in budgets if drop is not None and len(budgets) == 1
    ]
    figures = [
        chart(
            "scatter", axis,
            {"axes": {axis: {"title": title, "log": False}}, "y": "accuracy lost, points", "kinds": _KINDS,
             "points": points, "guides": guides},
            heading=heading, instead="The drawing needs scripts; the table above holds its figures.",
        )
        for axis, (heading, title) in _AXES.items()
    ]  # fmt: skip
    return section("Accuracy against size", f"<div class='figures'>{''.join(figures)}</div>", note=_NOTE)


def _point(number: int, name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    dense, result = report["dense"], result_of(report)
    before, after = ((figures.get("latency_ms") or {}).get(_BATCH) for figures in (dense, result))
    return {
        "kind": "tuned" if report.get("fine_tuned") else "plain",
        "label": f"#{number}",
        "x": {
            "parameters": 100.0 * result["parameters_removed"],
            "macs": 100.0 * result["macs_removed"],
            "latency": 100.0 * (1.0 - after / before) if before and after else None,
        },
        "y": result.get("accuracy_drop"),
        "bound": None,
        "lines": [
            f"#{number} {name}",
            f"{model_name(report)}, {format_points(result.get('accuracy_drop'))}",
            f"{format_fraction(result['parameters_removed'])} of the parameters removed",
            f"{format_fraction(result['macs_removed'])} of the MACs removed",
            f"{format_milliseconds(before)} → {format_milliseconds(after)} for {_BATCH} images",
        ],
    }


def _widths(runs: Runs) -> Iterator[str]:
    """One table for each network: runs of the same groups stand side by side."""
    families: dict[tuple[Any, ...], list[int]] = {}
    for number, (_, report) in enumerate(runs):
        shape = tuple((entry["name"], entry["channels"]) for entry in report["groups"])
        families.setdefault((model_name(report), shape), []).append(number)
    for (model, shape), members in families.items():
        if not shape:
            continue
        head = "".join(f"<th scope='col'>#{number + 1} {text(runs[number][0])}</th>" for number in members)
        rows = "".join(
            f"<tr><th scope='row' class='name'>{text(name)}</th><td class='number'>{channels}</td>"
            + "".join(_width_cell(runs[number][1]["groups"][place]) for number in members)
            + "</tr>"
            for place, (name, channels) in enumerate(shape)
        )
        body = (
            "<div class='card'><div class='scroll' tabindex='0'><table class='beside'><thead><tr>"
            f"<th scope='col'>group</th><th scope='col' class='number'>before</th>{head}"
            f"</tr></thead><tbody>{rows}</tbody></table></div></div>"
        )
        yield section(f"Widths of {model}", body, note=_WIDTHS_NOTE)


def _width_cell(entry: Mapping[str, Any]) -> str:
    share = 100.0 * entry["kept"] / entry["channels"]
    return (
        f"<td><div class='row'><b>{entry['kept']}</b><div class='track'><i class='was' style='width:100%'></i>"
        f"<i class='is' style='width:{share:.2f}%'></i></div></div></td>"
    )


def _settings(runs: Runs) -> str:
    flat = [dict(_flatten(asked_for(report))) for _, report in runs]
    names = list(dict.fromkeys(name for entry in flat for name in entry))
    values = {name: [plain(entry.get(name)) for entry in flat] for name in names}
    rows = [[name.replace("_", " "), *cells] for name, cells in values.items() if len(set(cells)) > 1]
    if not rows:
        return section("Settings that differ", "<p>None: all runs were asked for the same.</p>")
    listed = table(_heads(runs), rows, kinds="t" + "v" * len(runs))
    return section("Settings that differ", f"<div class='card'>{listed}</div>", note=_SETTINGS_NOTE)


def asked_for(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was given: network, data, budget, seed, settings, code and versions."""
    model, data, lineage = report["model"], report["data"], report.get("lineage") or {}
    return {
        "network": model.get("spec"),
        "data": data.get("spec"),
        "data sha256": (data.get("sha256") or "")[:12],
        "checkpoint sha256": (lineage.get("checkpoint_sha256") or "")[:12],
        "code": lineage.get("code_version"),
        "seed": report.get("seed"),
        "budget": report["budget"],
        "fine-tuned": bool(report.get("fine_tuned")),
        "rounds": len(report.get("rounds") or ()),
        "settings": report.get("settings") or {},
        "environment": report.get("environment") or {},
    }


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        place = name if prefix in ("", "settings: ") else f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{place}: ")
        else:
            yield place, value
