"""Writes README.md from faults.json, which `make faults` leaves beside it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

_INTRODUCTION = """# Faults

Written by `render.py` from `faults.json`; `make faults` repeats it. A small network is pruned on scikit-learn's digits
while something is killed at a seeded moment: actors and nodes by SIGKILL under a run that has to finish by itself;
drivers by SIGKILL, Ctrl-C and SIGTERM, after which the command is given again; MLflow's and Prefect's servers by
SIGKILL before and during a run. Several kills share a run, or follow each other until one driver comes through. A row
is one kill.

*In flight* are units that had been handed to a worker and whose result was not on disk: for a killed actor or node its
own unit; for a driver what its workers had, and what was being written when it died (at most {bound}). *Redone* are
units that were handed out again. For drivers that is counted over each chain of them and checked against the sum of
what was in flight, which is what their rows show. Loading, certificate, latency, report and tracking are no units: they
take place in the driver and are done again by the next one. After each kill of a driver its actors were gone before the
next one started. What MLflow missed was recorded afterwards by what `entprune log` calls, and once.
"""


def main() -> None:
    """Write the page."""
    content = json.loads((HERE / "faults.json").read_text(encoding="utf-8"))
    parts = [_INTRODUCTION.format(bound=content["bound_in_flight"]), _summary(content), _table(content["rows"])]
    (HERE / "README.md").write_text("\n".join(parts), encoding="utf-8")


def _summary(content: dict[str, Any]) -> str:
    rows, versions = content["rows"], ", ".join(f"{name} {value}" for name, value in content["versions"].items())
    same, redone, in_flight = (sum(row[name] for row in rows) for name in ("same_plan", "redone", "in_flight"))
    kinds = Counter(row["died"].split(",")[0].split(" (")[0] for row in rows)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return (
        f"**{same} of {len(rows)} ended in the plan of the undisturbed run** ({listed}); {redone} "
        f"units were redone, {in_flight} had been in flight.\n\n"
        f"{content['workers']} workers, {content['cpus']} CPUs, {versions}, Python {content['python']}; "
        f"{content['seconds']} s in all.\n"
    )


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what died | when | outcome | same plan | in flight | redone | s to the end |", "| --- " * 7 + "|"]
    lines += [
        f"| {row['died']} | {row['point']} | {row['outcome']} | {'yes' if row['same_plan'] else '**no**'} | "
        f"{row['in_flight']} | {row['redone']} | {row['seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
