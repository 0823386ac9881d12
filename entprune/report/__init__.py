"""Evidence of a pruning run: ``report.json`` for programs, ``report.html`` and its plots for people.

The page stands alone: no script, no font and no image comes from elsewhere.
"""

from __future__ import annotations

from entprune.report.wording import collect_warnings
from entprune.report.writing import environment, render_html, write_report

__all__ = ["collect_warnings", "environment", "render_html", "write_report"]
