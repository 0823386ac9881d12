"""Colours and style sheet of the page, and how a plot takes them on.

Plots are drawn in the light colours. Inside the page each colour becomes a CSS variable of the same name, so that one
drawing serves light and dark. Nothing is told by colour alone: marks, dashes, hatches and words differ too.
"""

from __future__ import annotations

import html
import re
from functools import cache
from importlib import resources

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


def style_sheet() -> str:
    """The page's CSS."""
    light = "".join(f"--{name}: {value}; " for name, value in LIGHT.items())
    dark = "".join(f"--{name}: {value}; " for name, value in _DARK.items())
    return (
        f":root {{ color-scheme: light dark; {light}}}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"
        f"{_rules()}"
    )


@cache
def _rules() -> str:
    return (resources.files("entprune.report") / "page.css").read_text(encoding="utf-8")


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
