"""Pieces that all pages are made of: the shell, tables, folded parts, text that cannot break out of its place."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from entprune.report.style import style_sheet
from entprune.report.wording import UNKNOWN

_CLASSES = {
    "t": " class='text'",
    "n": " class='number'",
    "c": " class='name'",
    "v": " class='code'",
    "s": " class='short'",
}


def render_shell(title: str, sections: Iterable[str], *, is_drawn: bool) -> str:
    """Return a whole page.

    The browser is told to fetch nothing and to run no script but our own, so whatever a name or a warning holds, it
    stays text.

    Args:
        title: of the page, not yet escaped.
        sections: HTML; empty ones are left out.
        is_drawn: whether the page holds charts and so needs the script.
    """
    drawing = f"<script>{_script()}</script>\n" if is_drawn else ""
    allowed = f" script-src 'sha256-{_script_digest()}';" if is_drawn else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline';"
        f'{allowed}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{style_sheet()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n{drawing}</body>\n</html>\n"
    )


def embed(identifier: str, data: Any) -> str:
    """Data for the script as an element that shows nothing; no string in it can end the element.

    Raises:
        ValueError: `data` holds NaN or infinity.
    """
    escaped = json.dumps(data, allow_nan=False)  # in ASCII
    for sign in "<>&":
        escaped = escaped.replace(sign, f"\\u{ord(sign):04x}")
    return f"<script type='application/json' id='{identifier}'>{escaped}</script>"


def chart(
    kind: str,
    name: str,
    data: Mapping[str, Any],
    *,
    heading: str = "",
    caption: str = "",
    instead: str = "The drawing needs scripts; the table below holds its figures.",
) -> str:
    """A figure that the page's script fills.

    Args:
        kind: "scatter" or "bars", as in ``chart.js``.
        name: unique in the page.
        data: of the chart; more than one entry in its `axes` makes a choice between them.
        heading, caption: of the figure.
        instead: shown where scripts do not run.
    """
    axes = data.get("axes") or {}
    choice = "".join(
        f"<label><input type='radio' name='{name}-axis' value='{axis}'{' checked' if number == 0 else ''}> "
        f"{text(entry.get('short') or entry['title'])}</label>"
        for number, (axis, entry) in enumerate(axes.items())
    )
    control = {
        "scatter": f"<fieldset class='axes'><legend>Against</legend>{choice}</fieldset>" if len(axes) > 1 else "",
        "bars": f"<label class='chooser'>Group <select aria-label='{text(heading)}'></select></label>",
    }[kind]
    return (
        f"<figure class='card chart' data-chart='{kind}' data-plot='{name}' data-source='{name}-data'>"
        f"{f'<h3>{text(heading)}</h3>' if heading else ''}{control}<div class='plot'></div>"
        f"<noscript><p>{text(instead)}</p></noscript>"
        f"<p class='{'legend' if kind == 'scatter' else 'said'} small'></p>"
        f"{f'<figcaption>{text(caption)}</figcaption>' if caption else ''}</figure>\n{embed(f'{name}-data', data)}"
    )


def table(
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
        kinds: one letter for each column: t text, n number, c code on one line, v code that may be broken, s few words.
        emphasised: numbers of rows to stress.
    """
    classes = [_CLASSES[kind] for kind in kinds]
    header = ""
    if any(head):
        titles = "".join(f"<th scope='col'{kind}>{text(name)}</th>" for name, kind in zip(head, classes, strict=True))
        header = f"<thead><tr>{titles}</tr></thead>"
    body = "".join(
        f"<tr{' class=chosen' if number in emphasised else ''}>"
        + "".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(row, classes, strict=True))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f"<div class='scroll' tabindex='0'><table>{header}<tbody>{body}</tbody></table></div>"


def section(heading: str, *parts: str, note: str = "") -> str:
    """A part of the page under its heading."""
    lines = [f"<h2>{text(heading)}</h2>", f"<p class='quiet small'>{text(note)}</p>" if note else "", *parts]
    return "<section>\n" + "\n".join(line for line in lines if line) + "\n</section>"


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Headline figures, each with its name and what stands behind it."""
    cards = "".join(
        f"<div class='card'><dt>{text(name)}</dt><dd>{text(value)}<small>{text(detail)}</small></dd></div>"
        for name, value, detail in entries
    )
    return f"<dl class='tiles'>{cards}</dl>"


def bullets(heading: str, sentences: Sequence[str]) -> str:
    """What a reader must not overlook; nothing without sentences."""
    if not sentences:
        return ""
    items = "\n".join(f"<li>{text(sentence)}</li>" for sentence in sentences)
    return f"<section class='card warnings' role='note'>\n<h3>{text(heading)}</h3>\n<ul>\n{items}\n</ul>\n</section>"


def folded(summary: str, body: str) -> str:
    """A part that opens on demand."""
    return f"<details class='card'><summary>{text(summary)}</summary>{body}</details>"


def pairs(content: Mapping[str, Any]) -> str:
    """Names and values as a table without a head."""
    return table(["", ""], [[str(key).replace("_", " "), plain(value)] for key, value in content.items()], kinds="tv")


def plain(value: Any) -> str:
    """A setting's value in words or JSON."""
    if value is None or value in ([], {}):
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def text(value: Any) -> str:
    """Escaped text; a number and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=(?:%|ms|s|min|[kMG])(?!\w))", "&nbsp;", html.escape(str(value)))


@cache
def _script() -> str:
    return (resources.files("entprune.report") / "chart.js").read_text(encoding="utf-8")


@cache
def _script_digest() -> str:
    return base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
