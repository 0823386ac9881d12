"""The table of fine-tuned networks in Markdown, made from the stored figures alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from infra.benchmark.tables import Records, budget_name, commits_line, table

_HEAD = (
    "network, removed", "seed", "unpruned", "one-shot", "drop", "fine-tuned", "drop", "parameters left", "MACs left",
    "epochs", "peak learning rate", "weight of the unpruned network", "seconds of an epoch", "threads",
)  # fmt: skip


def tuned_section(records: Records) -> list[str]:
    """One row for each network, recipe and seed, and medians over the seeds."""
    runs: dict[tuple[Any, ...], list[tuple[int, Mapping[str, Any]]]] = {}
    for record in records:
        for cell in record["cells"]:
            place = (record["network"], *cell["key"].values())
            runs.setdefault(place, []).append((record["seed"], cell["values"]))
    rows = []
    for (network, budget, *recipe), found in sorted(runs.items()):
        found.sort(key=lambda run: run[0])
        title = f"{network}, {budget_name(budget)}"
        rows += [[title, *_row(seed, values, recipe)] for seed, values in found]
        if len(found) > 1:
            rows.append([title, *_median_row([values for _, values in found])])
    return [table(_HEAD, rows), "", commits_line(records)]


def _row(seed: int, values: Mapping[str, Any], recipe: Sequence[Any]) -> list[str]:
    dense, epochs, rate, weight = values["dense"]["accuracy"], *recipe
    shots = [f"{figure:.2f}" for name in _ACCURACIES for figure in (values[name], dense - values[name])]
    sizes = [f"{values[name]:,}" for name in ("parameters", "macs")]
    costs = [f"{values['epoch_seconds']:.0f}", str(values["threads"])]
    return [str(seed), f"{dense:.2f}", *shots, *sizes, str(epochs), f"{rate:g}", f"{weight:g}", *costs]


def _median_row(found: Sequence[Mapping[str, Any]]) -> list[str]:
    drops = [
        f"**{statistics.median(values['dense']['accuracy'] - values[name] for values in found):.2f}**"
        for name in _ACCURACIES
    ]
    return ["**median**", "", "", drops[0], "", drops[1], *[""] * 7]


_ACCURACIES = ("one_shot_accuracy", "tuned_accuracy")
