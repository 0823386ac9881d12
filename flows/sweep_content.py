"""Plain values of a sweep's results: each setting's, the fronts over all of them, and the choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entprune.pareto import pareto_front
from entprune.race import Finish
from entprune.search import Candidate
from flows.sweep_parameters import SweepSetting
from tasks.workload import Workload

_LATENCY_BATCH = "64"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Entry:
    """One setting with all that came of it.

    Attributes:
        setting: what it asked for.
        work: its network, images and settings.
        finish: how its search ended.
        latency_ms: of its network, batch size to milliseconds.
    """

    setting: SweepSetting
    work: Workload
    finish: Finish
    latency_ms: dict[str, float]

    @property
    def status(self) -> str:
        """Whether the search ran to its end."""
        return "finished" if self.finish.stopped_by is None else "stopped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The chosen setting, whether it keeps to what may be lost, and the rule in words."""

    number: int
    budget_met: bool
    rule: str


def choose(entries: Sequence[Entry], max_drop: float | None, smallest: str) -> Chosen:
    """Choose one setting by validation images alone; settings that were stopped take no part.

    One that misses a budget other than accuracy is chosen only if all do.

    Args:
        entries: at least one of them finished.
        max_drop: points that the upper bound of the drop may reach; None to look for the least drop.
        smallest: "parameters", "macs" or "latency".
    """

    def bound(entry: Entry) -> float:
        upper = entry.finish.chosen.upper_bound
        return math.inf if upper is None else upper

    def size(entry: Entry) -> tuple[float, float, int]:
        cost = entry.latency_ms[_LATENCY_BATCH] if smallest == "latency" else getattr(entry.finish.chosen, smallest)
        return cost, bound(entry), entry.setting.number

    def other_missed(entry: Entry) -> bool:
        return bool({*entry.finish.chosen.missed} - {"max_accuracy_drop"})

    def nearness(entry: Entry) -> tuple[bool, float, tuple[float, float, int]]:
        return other_missed(entry), bound(entry), size(entry)

    finished = [entry for entry in entries if entry.finish.stopped_by is None]
    if max_drop is None:
        best = min(finished, key=nearness)
        rule = "the least accuracy drop, by its upper confidence bound on the validation images"
        return Chosen(number=best.setting.number, budget_met=best.finish.budget_met, rule=rule)
    what = {"parameters": "the fewest parameters", "macs": "the fewest MACs", "latency": "the lowest latency"}[smallest]
    rule = f"{what} with at most {max_drop:g} points lost, by the upper confidence bound on the validation images"
    within = [entry for entry in finished if bound(entry) <= max_drop and not other_missed(entry)]
    if within:
        return Chosen(number=min(within, key=size).setting.number, budget_met=True, rule=rule)
    nearest = min(finished, key=nearness)
    return Chosen(number=nearest.setting.number, budget_met=False, rule=f"{rule}; none does, so the nearest")


def describe_sweep(
    entries: Sequence[Entry], chosen: Chosen, report: Mapping[str, Any], runs: Mapping[int, str]
) -> dict[str, Any]:
    """What sweep.json says of the settings and of the chosen one.

    Args:
        entries: all settings.
        chosen: one of them.
        report: content of the chosen network's report.json.
        runs: MLflow run of each setting.
    """
    return {
        "schema_version": 1,
        "kind": "sweep",
        **{name: report[name] for name in ("model", "data", "dense", "environment")},
        "settings": [describe_setting(entry) | {"mlflow_run_id": runs[entry.setting.number]} for entry in entries],
        "fronts": describe_fronts(entries),
        "chosen": {
            "number": chosen.number,
            "rule": chosen.rule,
            "budget_met": chosen.budget_met,
            "report": "chosen/report.json",
            **{name: report[name] for name in ("one_shot", "fine_tuned", "certificate")},
            "registered_version": report["lineage"]["registered_version"],
        },
    }


def describe_setting(entry: Entry) -> dict[str, Any]:
    """A setting's entry in sweep.json."""
    finish = entry.finish
    return {
        "number": entry.setting.number,
        "label": entry.setting.label(),
        "values": {name: _plain(value) for name, value in entry.setting.values.items()},
        "budget": entry.work.budget.to_dict(),
        "status": entry.status,
        "stopped_by": finish.stopped_by,
        "rounds": finish.rounds,
        "budget_met": finish.budget_met,
        "result": {**_figures(entry, finish.chosen), "latency_ms": dict(entry.latency_ms)},
        "widths": finish.chosen.plan.widths(),
        "candidates": [_figures(entry, candidate) for candidate in finish.candidates],
    }


def _figures(entry: Entry, candidate: Candidate) -> dict[str, Any]:
    """Sizes and what validation says; nothing of the test split."""
    cost = entry.work.network.cost
    dense = entry.work.network.full_widths()
    listed = candidate.to_dict()
    names = ("parameters", "macs", "validation_accuracy", "validation_drop", "drop_upper_bound", "images", "accepted")
    return {name: listed[name] for name in names} | {
        "parameters_removed": 1.0 - candidate.parameters / cost.parameters(dense),
        "macs_removed": 1.0 - candidate.macs / cost.macs(dense),
    }


def describe_fronts(entries: Sequence[Entry]) -> dict[str, list[dict[str, Any]]]:
    """Networks that no other beats in validation drop and one kind of cost, smallest first.

    Parameters and MACs are known of every candidate, latency of each setting's result alone.
    """
    candidates = [
        (entry, candidate, None if candidate.plan is not entry.finish.chosen.plan else entry.latency_ms[_LATENCY_BATCH])
        for entry in entries
        for candidate in entry.finish.candidates
    ]
    return {
        "parameters": _front([(entry, tried.parameters, tried) for entry, tried, _ in candidates]),
        "macs": _front([(entry, tried.macs, tried) for entry, tried, _ in candidates]),
        "latency": _front([(entry, milliseconds, tried) for entry, tried, milliseconds in candidates]),
    }


def _front(points: Sequence[tuple[Entry, float | None, Candidate]]) -> list[dict[str, Any]]:
    front = pareto_front([(cost, candidate.accuracy_drop) for _, cost, candidate in points])
    return [
        {
            "setting": points[number][0].setting.number,
            "cost": points[number][1],
            "drop": points[number][2].accuracy_drop,
            "is_result": points[number][2].plan is points[number][0].finish.chosen.plan,
        }
        for number in front
    ]


def _plain(value: Any) -> Any:
    """A value without folders, which differ from machine to machine."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return str(value).rsplit("/", 1)[-1] if isinstance(value, (str, Path)) else value
