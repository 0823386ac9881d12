"""Published figures beside ours at the nearest size: other networks' trainings, other recipes, so no contest.

The published ones lie in published.json as their papers and tools give them; ours come from the stored records.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.benchmark.records import HERE, all_records
from infra.benchmark.tables import table

PUBLISHED = HERE / "published.json"
_TOLERANCE = 0.005  # of the fraction removed: published ones are rounded
_HEAD = (
    "network", "published", "accuracy", "drop", "parameters removed", "MACs removed", "entprune: accuracy", "drop",
    "parameters removed", "MACs removed", "seeds",
)  # fmt: skip
_NOTE = """\
Beside each published network stands the one of ours that removes least of those that remove at least as much, to half a
percent: of the parameters, or of the MACs where the other states those alone; medians over the seeds; `-` where no
record is so small (LeNet's fine-tuned one is in the project's README). The abstract gives ranges of sparsity and
accuracy lost, whose ends are read here as pairs. The unpruned networks differ, and so do training, number of epochs
and what counts as removed: it shows where the field stands, and is no contest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One network of ours.

    Attributes:
        network: name.
        place: what it has in common with other seeds: part, budget and recipe.
        seed: its own.
        tuned: whether after fine-tuning.
        dense, accuracy: of the unpruned network and of this one on the test images, percent.
        parameters, macs: fractions removed.
        left: parameters left.
    """

    network: str
    place: str
    seed: int
    tuned: bool
    dense: float
    accuracy: float
    parameters: float
    macs: float
    left: int


def published_section(results: Path, published: Path = PUBLISHED) -> list[str]:
    """Two tables, before and after any gradient step."""
    entries = json.loads(published.read_text(encoding="utf-8"))
    ours = list(measured_networks(results))
    lines = [_NOTE]
    for title, tuned in (("Without a gradient step", False), ("Trained or fine-tuned", True)):
        rows = [_row(entry, ours) for entry in entries if entry["tuned"] == tuned]
        lines += ["", f"**{title}**", "", table(_HEAD, rows)]
    return lines


def measured_networks(results: Path) -> Iterator[Measured]:
    """All that was measured with our choice, our widths and the refit."""
    for record in all_records("selection", results):
        for cell in record["cells"]:
            if cell["key"] == {"method": "ours", "weights": "refit", "widths": "allocated"}:
                yield _measured(record, cell, record["facts"]["dense"], cell["values"], "accuracy")
    for record in all_records("budgets", results):
        for cell in record["cells"]:
            yield _measured(record, cell, cell["values"]["dense"], cell["values"]["one_shot"], "accuracy")
    for record in all_records("tuned", results):
        for cell in record["cells"]:
            if cell["key"].get("rounds", 1) == 1:  # what was pruned once is of the size that was tuned
                yield _measured(record, cell, cell["values"]["dense"], cell["values"], "one_shot_accuracy")
            yield _measured(record, cell, cell["values"]["dense"], cell["values"], "tuned_accuracy")


def _measured(
    record: Mapping[str, Any], cell: Mapping[str, Any], dense: Mapping[str, Any], values: Mapping[str, Any], name: str
) -> Measured:
    return Measured(
        network=record["network"],
        place=f"{record['part']} {record['budget']} {json.dumps(cell['key'], sort_keys=True)}",
        seed=record["seed"],
        tuned=name == "tuned_accuracy",
        dense=dense["accuracy"],
        accuracy=values[name],
        parameters=1.0 - values["parameters"] / dense["parameters"],
        macs=1.0 - values["macs"] / dense["macs"],
        left=values["parameters"],
    )


def nearest(entry: Mapping[str, Any], ours: Iterable[Measured]) -> list[Measured]:
    """The seeds of our network that removes least of those that remove enough; empty if none does."""
    groups: dict[str, list[Measured]] = {}
    for network in ours:
        if (network.network, network.tuned) == (entry["network"], entry["tuned"]):
            groups.setdefault(network.place, []).append(network)
    surpluses = {place: min(_surplus(entry, network) for network in group) for place, group in groups.items()}
    enough = {place: surplus for place, surplus in surpluses.items() if surplus >= -_TOLERANCE}
    return groups[min(enough, key=lambda place: enough[place])] if enough else []


def _surplus(entry: Mapping[str, Any], network: Measured) -> float:
    """Fraction removed beyond what is published, of the parameters where those are given."""
    if "parameters_left" in entry:
        return (entry["parameters_left"] - network.left) * (1.0 - network.parameters) / network.left
    if "parameters_removed" in entry:
        return network.parameters - float(entry["parameters_removed"])
    return network.macs - float(entry["macs_removed"])


def _row(entry: Mapping[str, Any], ours: Sequence[Measured]) -> list[str]:
    pair = f"{entry['dense']:.2f} → {entry['accuracy']:.2f}" if "dense" in entry else "-"
    drop = entry["drop"] if "drop" in entry else entry["dense"] - entry["accuracy"]
    removed = [f"{entry[name]:.1%}" if name in entry else "-" for name in ("parameters_removed", "macs_removed")]
    if "parameters_left" in entry:
        removed[0] = f"all but {entry['parameters_left']:,}"
    found = nearest(entry, ours)
    theirs = [entry["network"], entry["method"], pair, f"{drop:.2f}", *removed]
    if not found:
        return [*theirs, *["-"] * 5]
    dense, accuracy, parameters, macs = (
        statistics.median(getattr(network, name) for network in found)
        for name in ("dense", "accuracy", "parameters", "macs")
    )
    seeds = ", ".join(str(seed) for seed in sorted(network.seed for network in found))
    ours_pair = f"{dense:.2f} → {accuracy:.2f}"
    return [*theirs, ours_pair, f"{dense - accuracy:.2f}", f"{parameters:.1%}", f"{macs:.1%}", seeds]
