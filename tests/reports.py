"""Reports and paths of runs that never were, for tests of what shows them."""

from __future__ import annotations

from typing import Any

import numpy as np

from entprune.path import PathSetting, SettingPath, SparsityPath

GROUPS = (("conv1", 6, 2), ("layer1.0.conv2", 10, 10))


def make_path(name: str, num_channels: int) -> SparsityPath:
    settings = []
    for entropy_weight in (0.0, 0.3):
        order = np.arange(num_channels)
        snapshots = np.zeros((num_channels, num_channels), dtype=np.float32)
        for row, alive in enumerate(range(num_channels, 0, -1)):
            snapshots[row, :alive] = np.linspace(2.0, 1.0, alive) / np.linspace(2.0, 1.0, alive).sum()
        errors = (1.0 - entropy_weight) * np.linspace(1.0, 0.0, num_channels + 1) ** 2
        setting = PathSetting(entropy_weight=entropy_weight)
        settings.append(
            SettingPath(setting=setting, order=order, errors=errors, snapshots=snapshots, status="complete")
        )
    stacked = np.stack([entry.errors for entry in settings])
    return SparsityPath(
        group=name, num_consumers=1, settings=tuple(settings), errors=stacked.min(0), choice=stacked.argmin(0)
    )


def make_paths() -> dict[str, SparsityPath]:
    return {name: make_path(name, channels) for name, channels, _ in GROUPS}


def make_figures(**changes: Any) -> dict[str, Any]:
    return {"accuracy": 99.0, "parameters": 400_000, "macs": 2_000_000, "latency_ms": {"1": 0.6, "64": 12.0}} | changes


def make_pruned(**changes: Any) -> dict[str, Any]:
    return make_figures(
        accuracy=98.75, parameters=40_000, macs=400_000, latency_ms={"1": 0.3, "64": 4.0},
        accuracy_drop=0.25, accuracy_drop_interval={"low": 0.06, "high": 0.44},
        parameters_removed=0.9, macs_removed=0.8,
    ) | changes  # fmt: skip


def make_candidate(kept_fraction: float, drop: float, **changes: Any) -> dict[str, Any]:
    return {
        "round": 1, "kept_fraction": kept_fraction, "parameters": int(400_000 * kept_fraction), "macs": 400_000,
        "parameters_removed": 1 - kept_fraction, "macs_removed": 0.8, "validation_accuracy": 99.2 - drop,
        "validation_drop": drop, "drop_upper_bound": drop + 0.1, "images": 5000, "accepted": drop <= 0.4,
        "chosen": False, "widths": {"conv1": 2},
    } | changes  # fmt: skip


def make_report(**changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "model": {"spec": "lenet", "input_shape": [1, 28, 28], "num_classes": 10},
        "data": {
            "spec": "mnist", "sha256": "ab" * 32, "mean": [0.13], "std": [0.31],
            "calibration_samples": 2048, "validation_samples": 5000, "test_samples": 10000,
        },
        "seed": 0,
        "budget": {"max_accuracy_drop": 0.5},
        "budget_met": True,
        "dense": make_figures(),
        "one_shot": make_pruned(),
        "fine_tuned": None,
        "certificate": {"max_abs_difference": 3e-7, "tolerance": 1e-4, "num_images": 32, "passed": True},
        "groups": [
            {
                "name": name, "channels": channels, "kept": kept, "reconstruction_error": 0.08, "entropy": 1.0,
                "effective_channels": 2.7, "setting": "entropy +0", "note": "read by fc",
                "channel_probability": [1 / kept] * kept + [0.0] * (channels - kept),
                "parameters": {"dense": 100_000, "pruned": 10_000}, "macs": {"dense": 800_000, "pruned": 90_000},
            }
            for name, channels, kept in GROUPS
        ],
        "unprunable": [{"layer": "fc", "reason": "its outputs are the network's outputs"}],
        "candidates": [
            make_candidate(0.5, 0.02),
            make_candidate(0.1, 0.25, chosen=True),
            make_candidate(0.02, 40.0),
        ],
        "validation": {"dense_accuracy": 99.2, "images": 5000},
        "other_layers": {
            "parameters": {"dense": 200_000, "pruned": 20_000},
            "macs": {"dense": 400_000, "pruned": 220_000},
        },
        "plan": {
            "plan_version": 1,
            "groups": [
                {"name": name, "num_channels": channels, "kept_channels": list(range(kept))}
                for name, channels, kept in GROUPS
            ],
        },
        "settings": {"confidence": 0.8, "threads": 1},
        "timings_seconds": {"solve": 2.5, "total": 75.0},
        "lineage": {"checkpoint_sha256": "cd" * 32, "mlflow_run_id": None},
        "environment": {"python": "3.11.7"},
        "warnings": [],
    } | changes  # fmt: skip


def without_figures() -> dict[str, Any]:
    """What an in-process call without labels gives."""
    unknown = {"accuracy": None, "latency_ms": None}
    unjudged = {"validation_accuracy": None, "validation_drop": None, "drop_upper_bound": None, "images": 0}
    return make_report(
        model={"spec": None, "input_shape": [1, 8, 8], "num_classes": 2},
        data=make_report()["data"] | {"spec": None, "sha256": None},
        budget={"parameters_removed": 0.9},
        dense=make_figures(**unknown),
        one_shot=make_pruned(**unknown, accuracy_drop=None, accuracy_drop_interval=None),
        candidates=[make_candidate(0.1, 0.0, chosen=True) | unjudged],
        validation={"dense_accuracy": None, "images": 0},
        lineage={},
    )


def make_setting(number: int, parameters: int, drop: float, **changes: Any) -> dict[str, Any]:
    figures = {
        "parameters": parameters, "macs": 10 * parameters, "validation_accuracy": 98.0, "validation_drop": drop,
        "drop_upper_bound": drop + 0.1, "images": 4000, "accepted": True,
        "parameters_removed": 0.9, "macs_removed": 0.5,
    }  # fmt: skip
    return {
        "number": number, "label": f"ridge {number} </script>", "values": {"ridge": number}, "status": "finished",
        "stopped_by": None, "rounds": 3, "budget_met": True, "result": figures | {"latency_ms": {"1": 1.0, "64": 9.5}},
        "candidates": [figures, figures | {"parameters": 2 * parameters}],
    } | changes  # fmt: skip


def make_sweep() -> dict[str, Any]:
    measured = {"accuracy": 98.5, "parameters": 100, "macs": 1000, "latency_ms": {"1": 1.0, "64": 9.5}}
    removed = {"accuracy_drop": 0.5, "parameters_removed": 0.9, "macs_removed": 0.5}
    return {
        "model": {"spec": "lenet"}, "data": {"validation_samples": 4000, "test_samples": 10_000},
        "dense": measured, "swept": ["ridge"],
        "settings": [make_setting(0, 100, 0.4), make_setting(1, 90, 0.6, status="stopped", stopped_by=0, rounds=1)],
        "fronts": {
            "parameters": [{"setting": 1, "cost": 90, "drop": 0.6, "is_result": True},
                           {"setting": 0, "cost": 100, "drop": 0.4, "is_result": True}],
            "macs": [{"setting": 0, "cost": 1000, "drop": 0.4, "is_result": True}],
            "latency": [{"setting": 0, "cost": 9.5, "drop": 0.4, "is_result": False}],
        },
        "chosen": {"number": 0, "rule": "the fewest parameters", "budget_met": True, "one_shot": measured | removed,
                   "fine_tuned": None},
        "solve": {"pairs_asked": 6, "pairs_distinct": 3, "pairs_solved": 3, "calibrations": 1, "workers": 2},
        "timings_seconds": {"solve": 1.0, "total": 2.0},
    }  # fmt: skip
