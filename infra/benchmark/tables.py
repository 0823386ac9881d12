"""Tables of the benchmark in Markdown, made from the stored figures alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from infra.benchmark.outcomes import paired_error

Records = Sequence[Mapping[str, Any]]
Values = Sequence[Mapping[str, Any]]  # of one cell, an entry for each seed
METHOD_NAMES = {
    "ours": "entprune",
    "block_obs": "block OBS",
    "l1": "L1 norm",
    "fpgm": "FPGM",
    "lasso": "LASSO",
    "taylor": "Taylor",
    "random": "random",
}
VARIANT_NAMES = {
    ("refit", "allocated"): "refit, our widths",
    ("plain", "uniform"): "plain, uniform widths",
    ("refit", "uniform"): "refit, uniform widths",
    ("plain", "allocated"): "plain, our widths",
}
LEVEL = " ≈"
LEGEND = """\
The best of a column is **bold**; `≈` marks what is level with it: behind by no more than the paired standard error of
the difference, √(Σ xᵢ²) / n, with xᵢ the difference of the two outcomes (right 1, wrong 0; means over seeds) on image i
of the n test images: 0.3 points on 10,000 images where 9 % of them are right in one and wrong in the other. Cells
without stored outcomes take the largest that it can be, √((a + b) / n) for error rates a and b."""
SHORT_LEGEND = (
    "Accuracy in percent on the test split, no gradient step; the best of a row is **bold**, `≈` marks what is within "
    "one paired standard error of it."
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def budget_name(label: str) -> str:
    """Words for "parameters_removed-0.92"."""
    kind, _, value = label.partition("-")
    percent = f"{100 * float(value):.1f}".removesuffix(".0")
    return f"{percent}% of the {'MACs' if kind == 'macs_removed' else 'parameters'}"


def by_network(records: Records) -> dict[str, list[Mapping[str, Any]]]:
    """Records of each network, in the order in which they come."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(record["network"], []).append(record)
    return found


def collect_cells(records: Records) -> dict[tuple[str, str, str, str], list[Mapping[str, Any]]]:
    """Values of all seeds by (budget, method, weights, widths)."""
    found: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        for cell in record["cells"]:
            key = cell["key"]
            place = (record["budget"], key["method"], key["weights"], key["widths"])
            found.setdefault(place, []).append(cell["values"])
    return found


def budgets_of(records: Records) -> list[str]:
    """Labels of the budgets, parameters before MACs."""
    return sorted({record["budget"] for record in records}, key=lambda label: (label[0] != "p", label))


def mean_accuracy(values: Values) -> float:
    """Mean over seeds, percent."""
    return statistics.mean(entry["accuracy"] for entry in values)


def spread(values: Values) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    if not values:
        return "-"
    mean = f"{mean_accuracy(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(entry['accuracy'] for entry in values):.2f}"


def compare(rivals: Sequence[Values], count: int) -> list[str]:
    """Texts of the cells that compete: the best one bold, those within the noise of it marked.

    Args:
        rivals: cells of one budget and variant, empty where not measured.
        count: test images.
    """
    measured = [values for values in rivals if values]
    if len(measured) < 2:
        return [spread(values) for values in rivals]
    best = max(measured, key=mean_accuracy)

    def text(values: Values) -> str:
        if values is best:
            return f"**{spread(values)}**"
        behind = mean_accuracy(best) - mean_accuracy(values) if values else math.inf
        is_level = bool(values) and behind <= paired_error(best, values, count) + 1e-9
        return spread(values) + LEVEL * is_level

    return [text(values) for values in rivals]


def selection_section(network: str, records: Records) -> list[str]:
    """Accuracy of every method at every budget: one table for each way of slicing, methods in rows."""
    cells, budgets = collect_cells(records), budgets_of(records)
    lines = [f"### {network}\n", conditions_line(records)]
    for variant, title in VARIANT_NAMES.items():
        columns = [
            compare([cells.get((budget, method, *variant), []) for method in METHOD_NAMES], image_count(records))
            for budget in budgets
        ]
        rows = [
            [name, *texts] for name, *texts in zip(METHOD_NAMES.values(), *columns, strict=True) if set(texts) != {"-"}
        ]
        if rows:
            lines += [
                f"**{title[0].upper()}{title[1:]}**\n",
                table(("chosen by, at", *map(budget_name, budgets)), rows),
                "",
            ]
    return [*lines, sizes_line(records), commits_line(records)]


def standing(networks: Mapping[str, Records]) -> list[str]:
    """How often this project's choice is first or level with the first, and how far its networks are ahead of others'.

    Args:
        networks: records of the part `selection` by network.
    """
    counts: dict[tuple[str, str], list[bool]] = {}
    margins: list[float] = []
    for records in networks.values():
        cells = collect_cells(records)
        for budget in budgets_of(records):
            for variant in _WITH_REFIT:
                rivals = [cells.get((budget, method, *variant), []) for method in METHOD_NAMES]
                if rivals[0] and any(rivals[1:]):
                    own = compare(rivals, image_count(records))[0]
                    counts.setdefault(variant, []).append(own.startswith("**") or own.endswith(LEVEL))
            own_network = cells.get((budget, "ours", *_WITH_REFIT[0]), [])
            others = [cells.get((budget, method, *_AS_USED), []) for method in METHOD_NAMES if method != "ours"]
            if own_network and any(others):
                best = max(mean_accuracy(values) for values in others if values)
                margins.append(mean_accuracy(own_network) - best)
    if not counts or not margins:
        return []
    told = [f"{sum(firsts)} of {len(firsts)} cells with {VARIANT_NAMES[variant]}" for variant, firsts in counts.items()]
    firsts = [is_first for column in counts.values() for is_first in column]
    text = (
        f"entprune's choice is first or level with the first in {' and in '.join(told)}: **{sum(firsts)} of "
        f"{len(firsts)}**. Beside the best of the others as their users run them (plain, uniform widths) its network "
        f"(refit, its widths) is {min(margins):.1f} points ahead at the least and {statistics.median(margins):.1f} in "
        f"the median of {len(margins)} cells.\n"
    )
    return [text]


_WITH_REFIT = (("refit", "allocated"), ("refit", "uniform"))
_AS_USED = ("plain", "uniform")


def image_count(records: Records) -> int:
    """Number of images behind each accuracy."""
    return int(records[0]["facts"]["test_samples"])


def conditions_line(records: Records) -> str:
    """The unpruned network, images and seeds."""
    facts, seeds = records[0]["facts"], sorted({record["seed"] for record in records})
    dense = facts["dense"]
    images = sorted({record["facts"]["calibration_samples"] for record in records})
    drawn = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean ± standard deviation over the seeds {seeds}"
    return (
        f"Unpruned: {dense['accuracy']:.2f} %, {dense['parameters']:,} parameters, {dense['macs']:,} multiply-"
        f"accumulates. Accuracy in percent on {facts['test_samples']:,} test images; {drawn}; "
        f"{' or '.join(f'{count:,}' for count in images)} calibration images.\n"
    )


def sizes_line(records: Records) -> str:
    """What the widths of each kind really remove."""
    parts = []
    for record in records:
        if record["seed"] != min(entry["seed"] for entry in records):
            continue
        objective = "macs" if record["budget"].startswith("macs") else "parameters"
        dense = record["facts"]["dense"][objective]
        removed = {cell["key"]["widths"]: 1 - cell["values"][objective] / dense for cell in record["cells"]}
        shares = ", ".join(f"{value:.2%} with {_WIDTHS[name]}" for name, value in removed.items())
        parts.append(f"{budget_name(record['budget'])}: {shares}")
    return "Really removed: " + "; ".join(parts) + ".\n"


_WIDTHS = {"uniform": "uniform widths", "allocated": "ours"}


def commits_line(records: Records) -> str:
    """Code, versions, processors where they are known, and threads behind a table's cells."""
    runs = [record["runs"][number] for record in records for number in sorted({c["run"] for c in record["cells"]})]
    commits = sorted({str(run["code_commit"])[:10] for run in runs})
    threads = sorted({run["environment"]["threads"] for run in runs})
    torches = sorted({run["environment"]["torch"] for run in runs})
    commands = sorted({run["command"] for run in runs})
    processors = sorted({run["environment"].get("cpu", "") for run in runs} - {""})
    on = f"on {', '.join(processors)}; " if processors else ""
    return (
        f"<sub>Commit {', '.join(commits)}; torch {', '.join(torches)}; {on}threads {', '.join(map(str, threads))}; "
        f"`{'`, `'.join(commands)}`</sub>\n"
    )


def budgets_section(records: Records) -> list[str]:
    """Whole runs by accuracy budget, and their medians over the seeds."""
    head = ("network", "budget, points", "seed", "accuracy", "drop", "drop estimated (upper bound)",
            "parameters removed", "MACs removed", "candidates",
            "seconds: " + ", ".join(_STAGES), "threads")  # fmt: skip
    runs: dict[tuple[str, float], list[tuple[int, Mapping[str, Any]]]] = {}
    for record in records:
        for cell in record["cells"]:
            place = record["network"], cell["key"]["max_accuracy_drop"]
            runs.setdefault(place, []).append((record["seed"], cell["values"]))
    rows = []
    for network, points in sorted(runs, key=lambda place: (place[0], -place[1])):
        found = sorted(runs[network, points], key=lambda run: run[0])
        rows += [[network, f"{points:g}", *_budget_row(seed, values)] for seed, values in found]
        if len(found) > 1:
            rows.append([network, f"{points:g}", *_median_row([values["one_shot"] for _, values in found])])
    budgets = sorted({points for _, points in runs}, reverse=True)
    kept = [
        _budget_kept(points, [run[1] for place in runs if place[1] == points for run in runs[place]])
        for points in budgets
    ]
    return [table(head, rows), "", *kept, "", commits_line(records)]


def _budget_kept(points: float, found: Values) -> str:
    """What was estimated beside what came, over all runs by one budget."""
    drops = [values["one_shot"]["accuracy_drop"] for values in found]
    estimates = [_chosen(values)["validation_drop"] for values in found]
    within = sum(drop <= points for drop in drops)
    estimated, lost = statistics.mean(estimates), statistics.mean(drops)
    return (
        f"- All {len(found)} runs by {points:g} points: a drop of {estimated:.2f} was estimated in the mean, and on "
        f"the test images it is {lost:.2f} ({min(drops):.2f} to {max(drops):.2f}); {within} of {len(found)} are within "
        "the budget there."
    )


def _chosen(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(candidate for candidate in values["candidates"] if candidate["chosen"])


def estimates_section(records: Records) -> list[str]:
    """One row for each network and size: what each kind of image says about the drop."""
    head = (
        "network, removed", "seed", "unpruned, training images", "training images", "perturbed", "a quarter perturbed",
        "test images by posterior", "**test images**", "answers that change: training, perturbed, test",
    )  # fmt: skip
    rows = [
        [
            f"{record['network']}, {budget_name(cell['key']['budget'])}",
            str(record["seed"]),
            *_estimate_row(cell["values"]),
        ]
        for record in records
        for cell in record["cells"]
    ]
    return [table(head, rows), "", commits_line(records)]


def _estimate_row(values: Mapping[str, Any]) -> list[str]:
    plain, perturbed, compared, test = (values[name] for name in ("plain", "perturbed", "compared", "test"))
    return [
        f"{plain['dense_accuracy']:.2f}",
        *(f"{entry['posterior']:.2f} ± {entry['posterior_error']:.2f}" for entry in (plain, perturbed, compared, test)),
        f"**{test['labels']:.2f}** ± {test['labels_error']:.2f}",
        ", ".join(f"{entry['disagreement']:.2f}" for entry in (plain, perturbed, test)),
    ]


_STAGES = ("analyse", "calibrate", "solve", "search", "certify")


def _budget_row(seed: int, values: Mapping[str, Any]) -> list[str]:
    dense, small, seconds = values["dense"], values["one_shot"], values["timings_seconds"]
    verdict, chosen = "" if values["budget_met"] else " (budget not met)", _chosen(values)
    return [
        str(seed), f"{dense['accuracy']:.2f} → {small['accuracy']:.2f}",
        f"{small['accuracy_drop']:.2f}" + _within(small.get("accuracy_drop_interval")) + verdict,
        f"{chosen['validation_drop']:.2f} ({chosen['drop_upper_bound']:.2f})",
        f"{small['parameters_removed']:.1%}", f"{small['macs_removed']:.1%}", str(len(values["candidates"])),
        ", ".join(f"{seconds.get(stage, 0.0):.1f}" for stage in _STAGES), str(values["threads"]),
    ]  # fmt: skip


def _within(interval: Mapping[str, float] | None) -> str:
    """Ends of a drop's interval, which records of earlier versions lack."""
    return "" if interval is None else f" ({interval['low']:.2f} to {interval['high']:.2f})"


def _median_row(found: Sequence[Mapping[str, Any]]) -> list[str]:
    drop, parameters, macs = (
        statistics.median(entry[name] for entry in found)
        for name in ("accuracy_drop", "parameters_removed", "macs_removed")
    )
    return ["**median**", "", f"**{drop:.2f}**", "", f"**{parameters:.1%}**", f"**{macs:.1%}**", "", "", ""]


def epoch_section(records: Records) -> list[str]:
    """Pruning time in training epochs."""
    head = ("network", "one-shot prune, s", "one epoch, s", "prune / epoch", "candidates", "threads")
    rows = []
    for record in records:
        for values in (cell["values"] for cell in record["cells"]):
            epochs = ", ".join(
                f"{seconds:.0f} ({name}; {values['epoch_seconds_before'][name]:.0f} before, "
                f"{values['epoch_seconds_after'][name]:.0f} after)"
                for name, seconds in values["epoch_seconds"].items()
            )
            rows.append([
                record["network"], f"{values['prune_seconds']:.1f}", epochs, f"{values['ratio']:.2f}",
                str(values["candidates"]), str(values["threads"]),
            ])  # fmt: skip
    first = records[0]["cells"][0]["values"]
    note = (
        f"An epoch is {first['steps_timed']} timed steps of this project's training loop before the pruning and as "
        "many after it, both after a warm-up, scaled to all of them; this machine computes bfloat16 "
        f"{'natively' if first['bfloat16_is_native'] else 'by emulation'}. "
        "Pruning is analyse, calibrate, solve, search with its assemblies, and certify, by the accuracy budget of 0.5 "
        "points; the ratio is to the faster format.\n"
    )
    return [note, table(head, rows), "", commits_line(records)]


def latency_section(records: Records) -> list[str]:
    """What removed multiply-accumulates buy in time."""
    times_of = ("batch 1: ms", "time left", "batch 64: ms", "time left")
    head = ("network", "removed", "widths", "MACs left", *times_of, "speed-up / MAC ratio")
    rows = []
    for record in records:
        for cell in record["cells"]:
            values = cell["values"]
            dense = values["latency_ms"]["dense"]
            for name, multiple in values["multiples"].items():
                small = values["latency_ms"][name]
                times = [(f"{dense[b]:.2f} → {small[b]:.2f}", f"{small[b] / dense[b]:.0%}") for b in ("1", "64")]
                share = values["macs"][name] / values["macs"]["dense"]
                rows.append([
                    record["network"], budget_name(cell["key"]["budget"]),
                    "any" if multiple == 1 else f"multiples of {multiple}", f"{share:.0%}", *times[0], *times[1],
                    f"**{dense['64'] / small['64'] * share:.2f}**",
                ])  # fmt: skip
    note = (
        "Each network in the faster of torch's two memory formats; pruned ones are mostly faster with weights in "
        "`channels_last`. The last column is for batch 64.\n"
    )
    return [note, table(head, rows), "", commits_line(records)]


def sweep_section(records: Records) -> list[str]:
    """What a sweep's solve stage costs."""
    head = ("network", "12 settings", "one setting, s", "all, s", "all / one", "continuations of a group")
    rows = []
    for record in records:
        for cell in record["cells"]:
            values = cell["values"]
            rows.append([
                record["network"], cell["key"]["settings"], f"{values['one_setting_seconds']:.2f}",
                f"{values['sweep_seconds']:.2f}", f"{values['ratio']:.2f}", str(values["continuations_per_group"]),
            ])  # fmt: skip
    note = "Processor seconds of the solve stage on shared moments; medians of runs in turns.\n"
    return [note, table(head, rows), "", commits_line(records)]


def scaling_section(records: Records) -> list[str]:
    """Exponents and rates."""
    cells = [cell for record in records for cell in record["cells"]]
    lines = []
    for name, quantity, field, stage in _CURVES:
        points = curve(cells, quantity, field, stage)
        if len(points) > 1:
            figures = ", ".join(f"{value:.4g} at {images:,}" for images, value in points)
            lines.append(f"- {name}: {figures} images; fitted exponent **{exponent(points):.3f}**.")
    for cell in cells:
        if cell["key"]["quantity"] == "moments":
            values = cell["values"]
            share = values["moments_gflops"] / values["matmul_gflops"]
            lines.append(
                f"- moments of 512x3x3 inputs: {values['moments_gflops']:.1f} GFLOP/s, counting only the half of the "
                f"symmetric product that is needed ({values['moments_gflops_if_full']:.1f} counting all of it); "
                f"`torch.mm` of the same shapes in float32: {values['matmul_gflops']:.1f}; needed operations at "
                f"**{share:.0%}** of its rate (threads: {values['threads']})."
            )
    return [*lines, "", commits_line(records)]


_CURVES = (
    ("solving one 512-channel 3x3 group, one setting, s", "solve", "solve_seconds", None),
    ("peak memory of calibrate and solve, MiB", "memory", "peak_mib", "solve"),
    ("peak memory with assembly, MiB", "memory", "peak_mib", "assemble"),
)


def curve(cells: Sequence[Mapping[str, Any]], quantity: str, field: str, stage: str | None) -> list[tuple[int, float]]:
    """(images, value) in rising order."""
    found = [
        (int(cell["key"]["images"]), float(cell["values"][field]))
        for cell in cells
        if cell["key"]["quantity"] == quantity and cell["key"].get("stage") == stage
    ]
    return sorted(found)


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Slope of log(value) over log(images): 0 where the cost does not depend on them, 1 where it is proportional."""
    images, values = np.log(np.array(points, dtype=float).T)
    return round(float(np.polyfit(images, values, 1)[0]), 4) + 0.0  # no negative zero
