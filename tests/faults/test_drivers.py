"""The driver is killed anywhere and started again: what was stored is not computed again, and the plan is the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows.server import run_flow
from flows.sweep import sweep
from flows.sweep_parameters import parse_sweep
from tests.faults.drivers import BOUND, Relay, draw_kill_points, start_factory
from tests.faults.engines import Engines
from tests.faults.ground import Baseline, Events, Ground, Row, listening, plan_of, read_report
from tests.faults.processes import worker_pids

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

COUNT, SWEEP_COUNT = 6, 4


def start_relay(values: dict[str, Any], engines: Engines, ground: Ground, prefect_address: str, folder: Path) -> Relay:
    return Relay(
        start_factory(),
        values,
        {"MLFLOW_TRACKING_URI": f"sqlite:///{ground.folder / 'mlflow.db'}", "PREFECT_API_URL": prefect_address},
        folder,
        is_free=lambda: not worker_pids(engines.session),
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_killed_drivers_cost_what_was_in_flight(
    engines: Engines,
    ground: Ground,
    baseline: Baseline,
    prefect_address: str,
    tmp_path: Path,
    table: list[Row],
    seed: int,
) -> None:
    parameters = ground.parameters(f"drivers {seed}", ray_address=engines.address)
    relay = start_relay(parameters.model_dump(mode="json"), engines, ground, prefect_address, tmp_path)

    def is_as_undisturbed() -> bool:
        report = read_report(parameters)
        return (plan_of(report), report["one_shot"]["accuracy"]) == (baseline.plan, baseline.accuracy)

    rows = relay.run(draw_kill_points(seed, baseline.units, COUNT), is_as_undisturbed)
    table += rows
    assert len(rows) == COUNT
    assert all(row.same_plan for row in rows), rows
    assert all(row.in_flight <= BOUND for row in rows), rows
    assert relay.total_handed_out() - baseline.units <= sum(row.in_flight for row in rows), rows


def sweep_values(ground: Ground, name: str, ray_address: str) -> dict[str, Any]:
    """Four settings that share their continuations."""
    base = ground.parameters(name, ray_address=ray_address).model_dump(mode="json", exclude_unset=True)
    output, overrides = base.pop("output"), base.pop("overrides")
    grid = {"loss_exponent": [0.5, 1.0], "parameters_removed": [0.5, 0.7]}
    del base["max_accuracy_drop"], overrides["calibration_shards"]
    return {"base": base | overrides, "grid": grid, "output": output}


def found_by(content: dict[str, Any]) -> tuple[Any, ...]:
    """What a sweep found, without times and run ids."""
    settings = [(entry["label"], entry["status"], entry["widths"]) for entry in content["settings"]]
    return settings, content["chosen"]["number"], content["chosen"]["one_shot"]["accuracy"]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_killed_sweeps_go_on(
    engines: Engines, ground: Ground, prefect_address: str, tmp_path: Path, table: list[Row], seed: int
) -> None:
    events = Events()
    with listening(events):
        whole = run_flow(sweep, parse_sweep(sweep_values(ground, f"whole sweep {seed}", engines.address)))
    units = events.handed_out.total()
    values = sweep_values(ground, f"killed sweep {seed}", engines.address)
    relay = start_relay(values, engines, ground, prefect_address, tmp_path)

    def is_as_undisturbed() -> bool:
        content = json.loads((Path(values["output"]) / "sweep.json").read_text(encoding="utf-8"))
        return found_by(content) == found_by(whole)

    points = [point for point in draw_kill_points(seed, units, SWEEP_COUNT) if point.units is not None]
    rows = relay.run(points, is_as_undisturbed)
    table += [replace(row, point=f"sweep, {row.point}") for row in rows]
    assert len(rows) >= 2
    assert all(row.same_plan for row in rows), rows
    assert all(row.in_flight <= BOUND for row in rows), rows
    assert relay.total_handed_out() - units <= sum(row.in_flight for row in rows), rows
