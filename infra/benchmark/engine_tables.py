"""Tables of the parts `actors` and `engine`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from infra.benchmark.tables import Records, commits_line, table


def actors_section(records: Records) -> list[str]:
    """What a second actor is worth."""
    head = (
        "network",
        "units",
        "one actor, s",
        "two actors, s",
        "speed-up, median of the pairs",
        "pairs",
        "threads each",
    )
    rows = []
    for record in records:
        values = _values(record)
        times = [median(entry["seconds"][count] for entry in values) for count in ("1", "2")]
        gain = median(entry["speed_up"] for entry in values)
        least, most = (bound(entry["speed_up"] for entry in values) for bound in (min, max))
        rows.append(
            (record["network"], str(record["facts"]["units"]), *(f"{seconds:.1f}" for seconds in times),
             f"**{gain:.2f}** ({least:.2f} to {most:.2f})", str(len(values)), str(values[0]["threads"]))
        )  # fmt: skip
    return [table(head, rows), "", commits_line(records)]


def engine_section(records: Records) -> list[str]:
    """What the flow adds to the library."""
    head = ("network", "library in process, s", "`entprune prune`, s", "added, s, median of the pairs", "pairs")
    rows = []
    for record in records:
        values = _values(record)
        times = [median(entry["seconds"][name] for entry in values) for name in ("library", "flow")]
        added = median(entry["overhead_seconds"] for entry in values)
        rows.append((record["network"], *(f"{seconds:.1f}" for seconds in times), f"**{added:.1f}**", str(len(values))))
    return [table(head, rows), "", commits_line(records)]


def _values(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return [cell["values"] for cell in record["cells"]]
