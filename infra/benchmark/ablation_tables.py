"""Table of the part `ablation` in Markdown, made from the stored figures alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from infra.benchmark.ablation import VARIANTS
from infra.benchmark.tables import (
    Records,
    Values,
    budget_name,
    by_network,
    commits_line,
    compare,
    conditions_line,
    image_count,
    table,
)

LEGEND = """\
How to read it: every row changes one thing of the defaults, so compare it with the first row; the rows under *schedule*
change `entropy +1`, so compare them with that one. Lower KL is better, and KL tells rows apart that the accuracy
cannot: it is the mean over the validation images of KL(dense ‖ pruned), in 1/1000 nat. A difference counts if it is
larger than the standard deviations over the seeds (behind the ±). The best of a column is **bold**; `≈` marks
accuracies that are level with the best one, as above. Seconds are processor seconds, each setting of the paths solved
alone; those of the assembly are the mean over the budgets."""


def ablation_page(records: Records) -> str:
    """Legend, and a table for each network."""
    lines = [f"{LEGEND}\n"]
    for network, found in by_network(records).items():
        lines += [f"### {network}\n", conditions_line(found), network_table(found), "", _sizes_line(found)]
        lines.append(commits_line(found))
    return "\n".join(lines)


def network_table(records: Records) -> str:
    """Variants in rows; KL and accuracy of each budget, and seconds, in columns."""
    cells: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in _cells(records):
        cells.setdefault((cell["key"]["variant"], cell["key"]["budget"]), []).append(cell["values"])
    budgets = sorted({budget for _, budget in cells})
    shown = [variant for variant in VARIANTS if any((variant.name, budget) in cells for budget in budgets)]
    head, columns = ["changed", "variant"], []
    for budget in budgets:
        rivals: list[Values] = [cells.get((variant.name, budget), []) for variant in shown]
        head += [f"KL, {budget_name(budget)}", f"accuracy, {budget_name(budget)}"]
        columns += [_least(rivals, "kl", 1000.0, 2), compare(rivals, image_count(records))]
    whole: list[Values] = [
        [values for budget in budgets for values in cells.get((variant.name, budget), [])] for variant in shown
    ]
    head += ["solve, s", "assembly, s"]
    columns += [_least(whole, name, 1.0, 1, with_spread=False) for name in ("solve_seconds", "assembly_seconds")]
    firsts = {variant.family: variant for variant in reversed(shown)}
    families = [variant.family if variant is firsts[variant.family] else "" for variant in shown]
    return table(head, zip(families, (variant.name for variant in shown), *columns, strict=True))


def _cells(records: Records) -> list[Mapping[str, Any]]:
    return [cell for record in records for cell in record["cells"]]


def _least(rivals: Sequence[Values], name: str, unit: float, digits: int, *, with_spread: bool = True) -> list[str]:
    """Texts of a column whose smallest mean is the best, "-" where there is no figure."""
    found = [[unit * values[name] for values in cell if values[name] is not None] for cell in rivals]
    means = [statistics.mean(figures) if figures else float("inf") for figures in found]
    texts = []
    for figures, mean in zip(found, means, strict=True):
        text = f"{mean:.{digits}f}" if figures else "-"
        if with_spread and len(figures) > 1:
            text += f" ± {statistics.stdev(figures):.{digits}f}"
        texts.append(f"**{text}**" if figures and mean == min(means) else text)
    return texts


def _sizes_line(records: Records) -> str:
    """What the variants really remove, over all of them and all seeds."""
    dense = records[0]["facts"]["dense"]
    removed: dict[str, list[float]] = {}
    for cell in _cells(records):
        budget = cell["key"]["budget"]
        objective = "macs" if budget.startswith("macs") else "parameters"
        removed.setdefault(budget, []).append(1.0 - cell["values"][objective] / dense[objective])
    ranges = (
        f"{budget_name(name)}: {min(shares):.2%} to {max(shares):.2%}" for name, shares in sorted(removed.items())
    )
    return "Really removed: " + "; ".join(ranges) + ".\n"
