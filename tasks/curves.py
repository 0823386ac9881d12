"""Numbers of sparsity paths and groups in the form in which they are tracked: (name, value, step).

Axes: c channels of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from entprune.path import PathSetting, SettingPath, SparsityPath

Numbers = list[tuple[str, float, int]]

_MAX_POINTS = 200  # of one curve: more cannot be seen and only cost time


def setting_numbers(paths: Mapping[str, SparsityPath]) -> Iterator[tuple[PathSetting, Numbers]]:
    """For each hyperparameter setting its summary and its error curve of each group; the step is the width.

    Args:
        paths: of each group; all were solved for the same settings.
    """
    settings = [entry.setting for entry in next(iter(paths.values())).settings] if paths else []
    for number, setting in enumerate(settings):
        numbers: Numbers = [(name, value, 0) for name, value in _summarise_setting(paths, number).items()]
        for path in paths.values():
            numbers += _error_curve(path.settings[number], path)
        yield setting, numbers


def group_numbers(report: Mapping[str, Any]) -> Numbers:
    """What became of each group; the step is the group's number in execution order."""
    numbers: Numbers = []
    for number, group in enumerate(report["groups"]):
        values = {name: group[name] for name in ("reconstruction_error", "entropy", "effective_channels")}
        values["kept_fraction"] = group["kept"] / group["channels"]
        numbers += [(f"group.{name}", float(value), number) for name, value in values.items() if value is not None]
    return numbers


def _summarise_setting(paths: Mapping[str, SparsityPath], number: int) -> dict[str, float]:
    """Numbers by which settings are compared: smaller errors and more widths won are better."""
    mean_errors = [float((path.settings[number].errors / path.num_consumers).mean()) for path in paths.values()]
    won = sum(int((path.choice == number).sum()) for path in paths.values())
    return {
        "mean_error": float(np.mean(mean_errors)),
        "worst_group_mean_error": max(mean_errors),
        "widths_won_fraction": won / sum(len(path.choice) for path in paths.values()),
        "levels": float(np.mean([len(path.settings[number].snapshots) for path in paths.values()])),
        "complete_groups": float(sum(path.settings[number].status == "complete" for path in paths.values())),
    }


def _error_curve(setting_path: SettingPath, path: SparsityPath) -> Numbers:
    """Error per consumer at widths 0..c, thinned out to what a plot can show."""
    widths = np.unique(np.linspace(0, path.num_channels, _MAX_POINTS).round().astype(int))
    errors = setting_path.errors / path.num_consumers
    return [(f"reconstruction_error.{path.group}", float(errors[width]), int(width)) for width in widths]
