"""Colours and style sheet of the page, and how a plot takes them on.

Plots are drawn in the light colours. Inside the page each colour becomes a CSS variable of the same name, so that one
drawing serves light and dark. Nothing is told by colour alone: marks, dashes, hatches and words differ too.
"""

from __future__ import annotations

import html
import re

LIGHT = {
    "ink": "#1b1f24",
    "muted": "#57606a",
    "grid": "#d8dee4",
    "surface": "#ffffff",
    "page": "#f5f6f8",
    "kept": "#1f5fa8",
    "removed": "#c3cedb",
    "warm": "#b4500f",
    "good": "#1a7f4f",
    "bad": "#b42319",
    "violet": "#75509a",
    "olive": "#7d6608",
}
_DARK = {
    "ink": "#e8ebef",
    "muted": "#a3adb8",
    "grid": "#3a424c",
    "surface": "#1a1f26",
    "page": "#101419",
    "kept": "#79b4f7",
    "removed": "#4a5665",
    "warm": "#f2a46c",
    "good": "#5fd39a",
    "bad": "#ff8f85",
    "violet": "#c7a6ec",
    "olive": "#dcc55c",
}

_RULES = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; -webkit-text-size-adjust: 100%;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 46rem; }
.quiet { color: var(--muted); }
.small { font-size: .875rem; }
.card { background: var(--surface); border: 1px solid var(--grid); border-radius: .6rem; padding: 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.tiles dt { color: var(--muted); font-size: .875rem; }
.tiles dd { margin: 0; font-size: 1.6rem; font-weight: 650; line-height: 1.25; }
.tiles dd small { display: block; font-size: .8125rem; font-weight: 400; color: var(--muted); }
.verdicts { list-style: none; padding: 0; margin: 1rem 0; display: grid; gap: .5rem; }
.verdicts li { display: grid; grid-template-columns: 1.5rem 1fr; gap: .25rem; }
.verdicts li > :first-child { font-weight: 700; }
.good > :first-child { color: var(--good); }
.bad > :first-child { color: var(--bad); }
.warnings { border-left: .3rem solid var(--warm); }
.warnings ul { margin: .25rem 0 0; padding-left: 1.2rem; }
.warnings li { margin: .3rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--grid); vertical-align: top; }
th { font-weight: 600; } thead th { color: var(--muted); font-size: .8125rem; vertical-align: bottom; }
td.number, th.number { text-align: right; } td.number { white-space: nowrap; }
td.number + td.text, td.text + td.text { min-width: 11rem; }
tbody tr:last-child > * { border-bottom: 0; }
tr.chosen > * { font-weight: 650; }
td.name, td.code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .85em; }
td.code { overflow-wrap: anywhere; } td.name { white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: .75rem;
  margin: .75rem 0; align-items: start; }
.figures.wide { grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); }
.card > h3 { margin-top: 0; }
figure { margin: 0; padding: .75rem; }
figure svg { display: block; width: 100%; height: auto; max-width: 38rem; margin: 0 auto; }
figure svg text {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif !important; }
figcaption { font-size: .875rem; color: var(--muted); margin-top: .25rem; }
details { margin: .75rem 0; } details.card { padding: 0; }
summary { cursor: pointer; font-weight: 600; padding: .75rem 1rem; }
details.card > :not(summary) { margin: 0 1rem 1rem; }
:focus-visible { outline: 2px solid var(--kept); outline-offset: 2px; }
@media (max-width: 32rem) { main { padding: 1rem .75rem 3rem; } h1 { font-size: 1.4rem; } table { font-size: .84rem; }
  th, td { padding: .35rem .3rem; }
  .card { padding: .75rem; }
  .tiles { grid-template-columns: 1fr 1fr; } .tiles dd { font-size: 1.35rem; } }
@media print { body { background: none; } .card { break-inside: avoid; } }
"""


def style_sheet() -> str:
    """The page's CSS."""
    light = "".join(f"--{name}: {value}; " for name, value in LIGHT.items())
    dark = "".join(f"--{name}: {value}; " for name, value in _DARK.items())
    return (
        f":root {{ color-scheme: light dark; {light}}}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"
        f"{_RULES}"
    )


def inline_plot(name: str, svg: str, label: str) -> str:
    """Turn a stand-alone drawing into a part of the page.

    Args:
        name: of the plot, unique in the page; its identifiers get it as a prefix.
        svg: file content.
        label: what the drawing shows, for those who cannot see it.
    """
    drawing = svg[svg.index("<svg") :]
    drawing = re.sub(r'(\bid="|url\(#|href="#)', lambda match: f"{match[1]}{name}-", drawing)
    drawing = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawing, count=1)
    drawing = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", drawing, count=1)
    drawing = drawing.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
    for variable, colour in LIGHT.items():
        drawing = drawing.replace(colour, f"var(--{variable})")
    return drawing
