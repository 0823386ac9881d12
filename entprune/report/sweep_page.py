"""The page ``sweep.html``: what every setting of a sweep reached, as a plot to look into and a table to read.

The plot is drawn by a script inside the page; without scripts the table holds the same figures.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

from entprune.report.style import style_sheet
from entprune.report.wording import (
    format_accuracy,
    format_change,
    format_count,
    format_fraction,
    format_milliseconds,
)

_AXES = {"parameters": "Parameters", "macs": "MACs", "latency": "Latency, batch 64"}
_BATCH = "64"

_RULES = """
.axes { display: flex; flex-wrap: wrap; gap: .5rem; border: 0; padding: 0; margin: .75rem 0; }
.axes legend { float: left; margin-right: .5rem; padding: .3rem 0; }
.axes label { border: 1px solid var(--grid); border-radius: .4rem; padding: .3rem .7rem; cursor: pointer; }
.axes label:has(:checked) { border-color: var(--kept); background: var(--page); font-weight: 600; }
#plot { position: relative; } #plot svg { display: block; width: 100%; height: auto; }
#plot text { fill: var(--muted); font-size: 13px; font-family: system-ui, sans-serif; }
#plot .line { stroke: var(--grid); } #plot .front { fill: none; stroke: var(--kept); stroke-width: 2; }
#plot .tried { fill: var(--removed); } #plot .result { fill: var(--kept); stroke: var(--surface); stroke-width: 1.5; }
#plot .stopped { fill: var(--surface); stroke: var(--warm); stroke-width: 2; }
#plot .chosen { fill: var(--good); stroke: var(--ink); stroke-width: 2; }
#plot [tabindex] { cursor: pointer; }
#tip { position: absolute; pointer-events: none; background: var(--surface); border: 1px solid var(--muted);
  border-radius: .4rem; padding: .4rem .6rem; font-size: .85rem; max-width: 20rem; visibility: hidden; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; margin: 0 .3rem 0 .8rem;
  vertical-align: -1px; }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById('points').textContent);
const plot = document.getElementById('plot'), tip = document.getElementById('tip');
const W = 760, H = 430, L = 64, R = 16, T = 16, B = 48, NS = 'http://www.w3.org/2000/svg';
function node(parent, name, attributes, text) {
  const made = document.createElementNS(NS, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}
function ticks(low, high) {
  const step = Math.pow(10, Math.floor(Math.log10((high - low) / 4))), span = (high - low) / step;
  const wide = step * (span > 20 ? 5 : span > 8 ? 2 : 1), found = [];
  for (let at = Math.ceil(low / wide) * wide; at <= high; at += wide) found.push(at);
  return found;
}
function short(value) {
  if (Math.abs(value) >= 1e6) return +(value / 1e6).toPrecision(3) + ' M';
  if (Math.abs(value) >= 1e3) return +(value / 1e3).toPrecision(3) + ' k';
  return String(+value.toPrecision(3));
}
function show(mark, point) {
  tip.replaceChildren(...point.lines.map((line, number) => {
    const row = document.createElement(number ? 'div' : 'strong'); row.textContent = line; return row; }));
  const box = plot.getBoundingClientRect(), at = mark.getBoundingClientRect();
  tip.style.visibility = 'visible';
  tip.style.left = Math.max(0, Math.min(at.left - box.left + 12, box.width - tip.offsetWidth)) + 'px';
  tip.style.top = Math.max(0, at.top - box.top - tip.offsetHeight - 8) + 'px';
}
function hide() { tip.style.visibility = 'hidden'; }
function draw(axis) {
  hide();
  const old = plot.querySelector('svg'); if (old) old.remove();
  const points = data.points.filter(point => point[axis] !== null && point.drop !== null);
  const svg = node(plot, 'svg', {viewBox: `0 0 ${W} ${H}`, role: 'img', 'aria-label': data.titles[axis]});
  if (!points.length) { node(svg, 'text', {x: L, y: H / 2}, 'nothing is known here'); return; }
  const key = points.filter(point => point.kind !== 'tried');
  const top = Math.max(...key.map(point => point.drop)), bottom = Math.min(0, ...points.map(point => point.drop));
  const high = top + 0.6 * Math.max(top - bottom, 0.1), most = Math.max(...key.map(point => point[axis])) * 1.25;
  const x = value => L + (W - L - R) * value / most;
  const y = value => H - B - (H - T - B) * (value - bottom) / (high - bottom);
  const inside = point => point.drop <= high && point[axis] <= most;
  for (const at of ticks(0, most)) {
    node(svg, 'line', {class: 'line', x1: x(at), x2: x(at), y1: T, y2: H - B});
    node(svg, 'text', {x: x(at), y: H - B + 18, 'text-anchor': 'middle'}, short(at));
  }
  for (const at of ticks(bottom, high)) {
    node(svg, 'line', {class: 'line', x1: L, x2: W - R, y1: y(at), y2: y(at)});
    node(svg, 'text', {x: L - 8, y: y(at) + 4, 'text-anchor': 'end'}, short(at));
  }
  node(svg, 'text', {x: (L + W - R) / 2, y: H - 8, 'text-anchor': 'middle'}, data.titles[axis]);
  node(svg, 'text', {x: 14, y: H / 2, 'text-anchor': 'middle', transform: `rotate(-90 14 ${H / 2})`},
    'accuracy drop on validation images, points');
  const front = data.fronts[axis].filter(step => step.drop <= high && step.cost <= most);
  node(svg, 'polyline', {class: 'front', points: front.map(step => `${x(step.cost)},${y(step.drop)}`).join(' ')});
  for (const kind of ['tried', 'stopped', 'result', 'chosen'])
    for (const point of points.filter(point => point.kind === kind && inside(point))) {
      const mark = node(svg, 'circle', {class: kind, cx: x(point[axis]), cy: y(point.drop), r: kind === 'tried' ? 3.5
        : kind === 'chosen' ? 8 : 6, ...(kind === 'tried' ? {} : {tabindex: 0, 'aria-label': point.lines.join(', ')})});
      for (const event of ['mouseenter', 'focus', 'click']) mark.addEventListener(event, () => show(mark, point));
      for (const event of ['mouseleave', 'blur']) mark.addEventListener(event, hide);
    }
}
for (const button of document.querySelectorAll('[name=axis]'))
  button.addEventListener('change', () => draw(button.value));
draw(document.querySelector('[name=axis]:checked').value);
"""


def render_sweep(content: Mapping[str, Any]) -> str:
    """Return the whole page.

    Args:
        content: of ``sweep.json``, schema version 1.
    """
    title = f"{content['model']['spec']}: sweep of {len(content['settings'])} settings"
    sections = (_headline(content, title), _plot(content), _table(content), _background(content))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style_sheet()}{_RULES}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + f"\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _headline(content: Mapping[str, Any], title: str) -> str:
    chosen, data = content["chosen"], content["data"]
    setting = content["settings"][chosen["number"]]
    figures = chosen["fine_tuned"] or chosen["one_shot"]
    how = "fine-tuned" if chosen["fine_tuned"] else "without fine-tuning"
    tiles = (
        ("Chosen setting", f"#{setting['number']}", setting["label"]),
        ("Parameters removed", format_fraction(figures["parameters_removed"]), format_count(figures["parameters"])),
        ("MACs removed", format_fraction(figures["macs_removed"]), format_count(figures["macs"])),
        ("Test accuracy, points", format_change(figures["accuracy_drop"]),
         f"{format_accuracy(content['dense']['accuracy'])} → {format_accuracy(figures['accuracy'])}, {how}"),
    )  # fmt: skip
    listed = "".join(
        f"<div class='card'><dt>{_text(name)}</dt><dd>{_text(value)}<small>{_text(note)}</small></dd></div>"
        for name, value, note in tiles
    )
    met = "" if chosen["budget_met"] else " No setting met the budget."
    return (
        f"<header>\n<p class='quiet small'>entprune sweep over {_text(', '.join(content['swept']))}</p>\n"
        f"<h1>{_text(title)}</h1>\n<dl class='tiles'>{listed}</dl>\n"
        f"<p>Chosen: {_text(chosen['rule'])}.{met} Settings were compared on {data['validation_samples']:,} validation "
        f"images; the {data['test_samples']:,} test images were used for the chosen network and the dense one alone."
        "</p>\n</header>"
    )


def _plot(content: Mapping[str, Any]) -> str:
    points = json.dumps(
        {"points": _points(content), "fronts": content["fronts"], "titles": _AXES}, allow_nan=False
    ).replace("<", "\\u003c")
    buttons = "".join(
        f"<label><input type='radio' name='axis' value='{axis}'{' checked' if axis == 'parameters' else ''}> {title}"
        "</label>"
        for axis, title in _AXES.items()
    )
    keys = (("--good", "chosen"), ("--kept", "result of a setting"), ("--removed", "tried on the way"))
    legend = "".join(f"<span class='key' style='background: var({colour})'></span>{name}" for colour, name in keys)
    legend += "<span class='key' style='border: 2px solid var(--warm)'></span>stopped early"
    return (
        "<h2>What each setting reaches</h2>\n<figure class='card'>\n"
        f"<fieldset class='axes'><legend>Against</legend>{buttons}</fieldset>\n"
        "<div id='plot'><div id='tip' role='status'></div><noscript>The plot needs scripts; the table below holds its "
        f"figures.</noscript></div>\n<figcaption>{legend}. The line joins the networks that no other beats in both. "
        "Latency is known of results alone.</figcaption>\n</figure>\n"
        f"<script type='application/json' id='points'>{points}</script>"
    )


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
    lines = [
        f"#{setting['number']} {setting['label']}",
        f"{kind}: {format_count(figures['parameters'])} parameters, {format_count(figures['macs'])} MACs",
        f"{format_change(figures['validation_drop'])} points on {figures['images']:,} validation images",
    ]
    if latency is not None:
        lines.append(f"{format_milliseconds(latency)} for a batch of {_BATCH}")
    return {
        "kind": kind, "parameters": figures["parameters"], "macs": figures["macs"], "latency": latency,
        "drop": figures["validation_drop"], "lines": lines,
    }  # fmt: skip


def _table(content: Mapping[str, Any]) -> str:
    head = ("", "setting", "parameters removed", "MACs removed", "latency, batch 64", "accuracy, points", "bound",
            "on the front", "search")  # fmt: skip
    titles = "".join(f"<th{'' if number == 1 else ' class=number'}>{title}</th>" for number, title in enumerate(head))
    rows = []
    for setting in content["settings"]:
        result = setting["result"]
        cells = (
            format_fraction(result["parameters_removed"]),
            format_fraction(result["macs_removed"]),
            format_milliseconds(result["latency_ms"][_BATCH]),
            format_change(result["validation_drop"]),
            format_change(result["drop_upper_bound"]),
            ", ".join(fronts_of(content, setting["number"])) or "none",
            describe_search(setting),
        )
        chosen = " class='chosen'" if setting["number"] == content["chosen"]["number"] else ""
        numbers = "".join(f"<td class='number'>{_text(cell)}</td>" for cell in cells)
        rows.append(
            f"<tr{chosen}><td class='number'>{setting['number']}</td><td class='text'>{_text(setting['label'])}</td>"
            f"{numbers}</tr>"
        )
    return (
        "<h2>Settings</h2>\n<div class='card scroll'><table><thead><tr>"
        f"{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>\n"
        "<p class='quiet small'>The chosen setting is in bold. Points of accuracy gained (+) or lost (−) on the "
        "validation images, and the confidence bound by which networks are accepted.</p>"
    )


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
    solve, seconds = content["solve"], content["timings_seconds"]
    stages = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    return (
        "<h2>Work</h2>\n<p>"
        f"{solve['pairs_asked']} continuations were asked for, {solve['pairs_distinct']} of them are distinct, and "
        f"{solve['pairs_solved']} were solved now; the calibration images went through the network "
        f"{solve['calibrations']} time{'s' if solve['calibrations'] != 1 else ''}. On {solve['workers']} "
        f"worker{'s' if solve['workers'] != 1 else ''}: {_text(stages)}.</p>\n"
        "<p class='quiet small'>The chosen network and its report are in the folder <code>chosen</code>.</p>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))
