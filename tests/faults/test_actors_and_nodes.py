"""Actors and nodes are killed while a run is at work: it finishes by itself, with the same plan."""

from __future__ import annotations

import random
from functools import partial

import pytest

from tests.faults.engines import Engines
from tests.faults.ground import WORKERS, Baseline, Ground, Row
from tests.faults.in_process import Kill, disturbed

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def draw_actor_kills(engines: Engines, units: int, count: int, seed: int) -> dict[int, Kill]:
    """Kills after seeded numbers of units, of seeded actors."""
    generator = random.Random(seed)
    moments = sorted(generator.sample(range(2, units), count))

    def kill(number: int) -> str:
        return f"actor ({engines.kill_worker(number)}), SIGKILL"

    return {moment: partial(kill, generator.randrange(WORKERS)) for moment in moments}


def draw_node_kills(engines: Engines, units: int, count: int, seed: int) -> dict[int, Kill]:
    """The same for nodes; each is replaced by a new one."""
    generator = random.Random(seed)
    moments = sorted(generator.sample(range(2, units - 2), count))

    def kill(number: int) -> str:
        engines.kill_node(number)
        return "node, SIGKILL to raylet and workers"

    return {moment: partial(kill, generator.randrange(WORKERS)) for moment in moments}


def assert_nothing_lost(rows: list[Row], count: int, lines: list[str]) -> None:
    assert len(rows) == count
    assert all(row.same_plan for row in rows), rows
    assert all(row.redone <= row.in_flight for row in rows), rows
    assert sum("done again" in line for line in lines) == sum(row.redone for row in rows), lines


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_killed_actors_cost_a_unit_each(
    engines: Engines, ground: Ground, baseline: Baseline, table: list[Row], seed: int
) -> None:
    kills = draw_actor_kills(engines, baseline.units, 9, seed)
    rows, events = disturbed(ground.parameters(f"actors {seed}"), baseline, kills, at_stake=1)
    table += rows
    assert_nothing_lost(rows, 9, events.lines)


@pytest.mark.parametrize(("seed", "count"), [(0, 2), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_lost_nodes_cost_the_units_on_them(
    engines: Engines, ground: Ground, baseline: Baseline, table: list[Row], seed: int, count: int
) -> None:
    kills = draw_node_kills(engines, baseline.units, count, seed)
    rows, events = disturbed(ground.parameters(f"nodes {seed}"), baseline, kills, at_stake=1)
    table += rows
    assert_nothing_lost(rows, count, events.lines)
