"""Tables of fine-tuned networks in Markdown, made from the stored figures alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from infra.benchmark.tables import (
    METHOD_NAMES,
    VARIANT_NAMES,
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

_HEAD = (
    "network, removed", "seed", "unpruned", "one-shot", "drop", "fine-tuned", "drop", "parameters left", "MACs left",
    "epochs", "peak learning rate", "weight of the unpruned network", "gradients cut to", "tuned on",
    "seconds of an epoch", "machine",
)  # fmt: skip
_BEFORE_ALL = "all but validation images"  # what the command trained on until it learnt from all where it can


def tuned_section(records: Records) -> list[str]:
    """One row for each network, recipe and seed, and medians over the seeds."""
    runs: dict[tuple[Any, ...], list[tuple[int, Mapping[str, Any]]]] = {}
    for record in records:
        for cell in record["cells"]:
            key = {"rounds": 1, "low_rank": False, "images": _BEFORE_ALL, "clip_norm": 0.0, **cell["key"]}
            names = (
                "budget",
                "low_rank",
                "epochs",
                "learning_rate",
                "distillation_weight",
                "clip_norm",
                "images",
                "rounds",
            )
            place = (record["network"], *(key[name] for name in names))
            values = {**cell["values"], "machine": _machine(record, cell)}
            runs.setdefault(place, []).append((record["seed"], values))
    rows = []
    for (network, budget, low_rank, *recipe), found in sorted(runs.items()):
        found.sort(key=lambda run: run[0])
        title = f"{network}, {budget_name(budget)}{', low rank' * low_rank}"
        rows += [[title, *_row(seed, values, recipe)] for seed, values in found]
        if len(found) > 1:
            rows.append([title, *_median_row([values for _, values in found])])
    return [table(_HEAD, rows), "", commits_line(records)]


def _row(seed: int, values: Mapping[str, Any], recipe: Sequence[Any]) -> list[str]:
    dense, epochs, rate, weight, clip_norm, images, rounds = values["dense"]["accuracy"], *recipe
    shots = [f"{figure:.2f}" for name in _ACCURACIES for figure in (values[name], dense - values[name])]
    sizes = [f"{values[name]:,}" for name in ("parameters", "macs")]
    costs = [_short_seconds(values["epoch_seconds"]), values["machine"]]
    length = str(epochs) if rounds == 1 else f"{rounds} × {epochs}"
    longest = f"{clip_norm:g}" if clip_norm else "-"
    return [str(seed), f"{dense:.2f}", *shots, *sizes, length, f"{rate:g}", f"{weight:g}", longest, images, *costs]


def _median_row(found: Sequence[Mapping[str, Any]]) -> list[str]:
    drops = [
        f"**{statistics.median(values['dense']['accuracy'] - values[name] for values in found):.2f}**"
        for name in _ACCURACIES
    ]
    return ["**median**", "", "", drops[0], "", drops[1], *[""] * 9]


def _machine(record: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """The GPU, or the threads on a CPU."""
    environment = record["runs"][cell["run"]]["environment"]
    threads = cell["values"].get("threads", environment["threads"])
    return environment.get("gpu") or ("1 thread" if threads == 1 else f"{threads} threads")


def _short_seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def dense_section(records: Records) -> list[str]:
    """One row for each network that was trained for the benchmark."""
    head = (
        "network", "seed", "accuracy", "epochs", "images in a batch", "peak learning rate", "weight decay",
        "seconds of an epoch", "machine", "SHA-256 of the checkpoint",
    )  # fmt: skip
    rows = [
        [
            record["network"], str(record["seed"]), f"{values['accuracy']:.2f}", str(key["epochs"]),
            str(key["batch_size"]), f"{key['learning_rate']:g}", f"{key['weight_decay']:g}",
            _short_seconds(values["epoch_seconds"]), _machine(record, cell), f"`{values['checkpoint_sha256'][:16]}…`",
        ]
        for record in records
        for cell in record["cells"]
        for key, values in [(cell["key"], cell["values"])]
    ]  # fmt: skip
    return [table(head, rows), "", commits_line(records)]


_ACCURACIES = ("one_shot_accuracy", "tuned_accuracy")


def recovery_section(records: Records) -> list[str]:
    """For each network the methods in rows, and for each start a column before tuning and one after it."""
    lines: list[str] = []
    for network, found in by_network(records).items():
        lines += [
            f"### {network}, {budget_name(found[0]['budget'])}\n",
            conditions_line(found),
            *_recovery_table(found),
        ]
    return [*lines, commits_line(records)]


def _recovery_table(records: Records) -> list[str]:
    cells: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        for cell in record["cells"]:
            key = cell["key"]
            cells.setdefault((key["weights"], key["widths"], key["method"]), []).append(cell["values"])
    head, columns = ["chosen by"], []
    for start in list(dict.fromkeys(place[:2] for place in cells)):
        for stage, title in (("one_shot", "one-shot"), ("tuned", "fine-tuned")):
            head.append(f"{VARIANT_NAMES[start]}: {title}")
            rivals = [_of_stage(stage, cells.get((*start, method), [])) for method in METHOD_NAMES]
            columns.append(compare(rivals, image_count(records)))
    rows = [list(texts) for texts in zip(METHOD_NAMES.values(), *columns, strict=True) if set(texts[1:]) != {"-"}]
    return [table(head, rows), ""]


def _of_stage(stage: str, values: Values) -> list[Mapping[str, Any]]:
    return [{"accuracy": entry[f"{stage}_accuracy"], "wrong": entry[f"{stage}_wrong"]} for entry in values]
