"""The driver is killed anywhere and started again: what was stored is not computed again, and the plan is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.drivers import BOUND, Relay, draw_kill_points, start_factory
from tests.faults.engines import Engines
from tests.faults.ground import Baseline, Ground, Row
from tests.faults.processes import worker_pids

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

COUNT = 6


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
    relay = Relay(
        start_factory(),
        ground.parameters(f"drivers {seed}", ray_address=engines.address),
        {"MLFLOW_TRACKING_URI": f"sqlite:///{ground.folder / 'mlflow.db'}", "PREFECT_API_URL": prefect_address},
        tmp_path,
        is_free=lambda: not worker_pids(engines.session),
    )
    rows = relay.run(draw_kill_points(seed, baseline.units, COUNT), baseline)
    table += rows
    assert len(rows) == COUNT
    assert all(row.same_plan for row in rows), rows
    assert all(row.in_flight <= BOUND for row in rows), rows
    assert relay.total_handed_out() - baseline.units <= sum(row.in_flight for row in rows), rows
