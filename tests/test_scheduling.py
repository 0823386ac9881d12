"""The scheduling simulator: right on small cases, never below its bound, the same order as the product's pool."""

from __future__ import annotations

import json
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entprune.runner import InProcessRunner, Work
from infra.scheduling import render
from infra.scheduling.simulation import Job, Stage, pool_seconds, simulate
from infra.scheduling.workloads import SCENARIOS, Costs

seconds = st.floats(min_value=0.01, max_value=100.0)


def jobs(*lengths: float) -> tuple[Job, ...]:
    return tuple(Job(seconds=length, cost=length) for length in lengths)


@pytest.mark.parametrize(
    ("lengths", "workers", "expected"),
    [
        ((), 4, 0.0),
        ((3.0,), 4, 3.0),
        ((5.0, 4.0, 3.0, 3.0), 2, 8.0),  # 5 + 3 and 4 + 3
        ((3.0, 3.0, 2.0, 2.0, 2.0), 2, 7.0),  # the known case in which the largest first is not the best: 6 would do
    ],
)
def test_pool_of_a_few_units(lengths: tuple[float, ...], workers: int, expected: float) -> None:
    for shuffled in set(permutations(lengths)):
        assert pool_seconds(jobs(*shuffled), workers) == pytest.approx(expected)


def test_wrong_estimates_cost_time() -> None:
    units = [Job(seconds=1.0, cost=1.0) for _ in range(4)]
    long = Job(seconds=4.0, cost=0.5)  # thought to be the smallest, and so the last to start
    assert pool_seconds([*units, long], 2) == 6.0
    assert pool_seconds([*units, Job(seconds=4.0, cost=9.0)], 2) == 4.0


def test_units_are_handed_out_one_after_the_other() -> None:
    assert pool_seconds(jobs(1.0, 1.0, 1.0), 3, hand_out_seconds=0.25) == 1.75


def test_order_is_that_of_the_product() -> None:
    costs = [2.0, 5.0, 1.0, 5.0, 3.0]
    ran: list[int] = []
    runner = InProcessRunner()
    runner.run(
        lambda _, item: ran.append(item), [Work(shared=None, item=n, cost=c) for n, c in enumerate(costs)], stage="x"
    )
    # One worker and one unit that takes long: all before it in the order end before it does.
    for late in range(len(costs)):
        units = [Job(seconds=100.0 if number == late else 1.0, cost=cost) for number, cost in enumerate(costs)]
        two = pool_seconds(units, 2)
        assert two == 100.0 + (ran.index(late) // 2)  # with two workers, pairs start together


@given(
    lengths=st.lists(st.tuples(seconds, seconds), min_size=1, max_size=40),
    workers=st.integers(1, 20),
    serial=st.floats(0.0, 10.0),
)
def test_makespan_lies_between_the_bound_and_grahams_limit(
    lengths: list[tuple[float, float]], workers: int, serial: float
) -> None:
    units = tuple(Job(seconds=length, cost=cost) for length, cost in lengths)
    stage = Stage(name="solve", jobs=units, before_seconds=serial)
    outcome = simulate([stage, stage], workers)
    assert outcome.bound <= outcome.makespan * (1 + 1e-9)
    graham = 2 * (serial + stage.work / workers + (1 - 1 / workers) * stage.longest)  # of any list schedule
    assert outcome.makespan <= graham * (1 + 1e-9)
    assert 0.0 < outcome.busy <= 1.0 + 1e-9
    for entry in outcome.stages:
        assert entry.seconds == pytest.approx(entry.work + entry.largest_unit + entry.order + entry.serial)
        assert entry.order >= -1e-6


def test_one_worker_is_never_idle_and_enough_workers_wait_for_the_chain_alone() -> None:
    stages = [Stage(name="calibrate", jobs=jobs(4.0, 2.0)), Stage(name="solve", jobs=jobs(5.0, 1.0), after_seconds=0.5)]
    alone, many = simulate(stages, 1), simulate(stages, 100)
    assert (alone.makespan, alone.bound) == (12.5, 12.0)
    assert (many.makespan, many.bound, many.chain) == (9.5, 9.5, 9.5)


def test_units_that_could_be_cut_do_not_lengthen_the_chain() -> None:
    whole = [Stage(name="measure", jobs=(Job(seconds=8.0, least_seconds=1.0),))]
    outcome = simulate(whole, 8)
    assert (outcome.makespan, outcome.bound) == (8.0, 1.0)
    assert next(iter(outcome.losses())) == "largest unit of measure"


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def costs() -> Costs:
    return Costs(json.loads((render.HERE / "resnet50.json").read_text(encoding="utf-8")))


def test_page_and_figures_are_those_of_the_measured_units(costs: Costs) -> None:
    found = render.play(costs, render.WORKERS)
    assert (render.HERE / "README.md").read_text(encoding="utf-8") == render.page(costs, found)
    assert json.loads((render.HERE / "simulation.json").read_text()) == json.loads(json.dumps(render.as_json(found)))


def test_images_are_taken_as_linear(costs: Costs) -> None:
    few, many = costs.step(f"calibrate {costs.few}"), costs.step(f"calibrate {costs.many}")
    assert costs.images("calibrate", costs.few) == pytest.approx(few)
    assert costs.images("calibrate", 2 * costs.many - costs.few) == pytest.approx(2 * many - few)


def test_a_sweep_is_more_work_than_a_run_and_shares_its_calibration(costs: Costs) -> None:
    _, run, wide, sweep = (costs.stages(scenario, 1) for scenario in SCENARIOS)
    work = {name: sum(stage.work for stage in stages) for name, stages in (("run", run), ("sweep", sweep))}
    assert work["sweep"] > 2 * work["run"]
    assert [stage.work for stage in sweep if stage.name == "calibration"] == [run[1].work]
    assert len(wide) < len(run)  # fewer rounds


@pytest.mark.parametrize("workers", [1, 8, 64, 256])
def test_cutting_for_the_workers_leaves_the_work_about_as_it_is(costs: Costs, workers: int) -> None:
    for scenario in SCENARIOS:
        whole, cut = (sum(stage.work for stage in costs.stages(scenario, count)) for count in (1, workers))
        assert whole <= cut * (1 + 1e-9)
        assert cut < 1.05 * whole
