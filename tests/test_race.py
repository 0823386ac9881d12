"""Searches side by side: each ends as it would alone, unless another makes it hopeless; the front holds the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entprune.candidates import CandidateJob, CandidateScore
from entprune.config import Budget, PruneConfig
from entprune.pareto import pareto_front
from entprune.path import SettingPath, SparsityPath
from entprune.plan import PruningPlan
from entprune.race import Entrant, Finish, is_clearly_worse, race
from entprune.runner import OnResult, Work
from entprune.search import search
from entprune.selection import StopRule
from tests.test_search import PATHS, WIDTHS, Clock, Scorer, chain_cost, job_of

NUM_IMAGES = 2000
MAX_DROP = 1.0
CONFIG = PruneConfig(max_rounds=5, resolution=1.1, drop_estimate="labels")
DENSE = chain_cost().parameters({name: path.num_channels for name, path in PATHS.items()})


def paths_of(name: int) -> dict[str, SparsityPath]:
    """Paths whose order of channels tells which setting they belong to, so that the plans of settings differ."""
    found = {}
    for group, path in PATHS.items():
        only = path.settings[0]
        order = np.roll(only.order, name)
        turned = SettingPath(
            setting=only.setting, order=order, errors=only.errors, snapshots=only.snapshots, status=only.status
        )
        found[group] = SparsityPath(
            group=group, num_consumers=1, settings=(turned,), errors=path.errors, choice=path.choice
        )
    return found


class Field:
    """A runner that knows what every setting loses at every share of the parameters."""

    def __init__(self, lost: Sequence[Callable[[float], float]]) -> None:
        self._lost = lost
        self.scored: list[PruningPlan] = []
        self.pools: list[int] = []
        self.released = 0

    workers = 1

    def share(self, value: Any) -> Any:
        return value

    def release(self, handle: Any) -> None:
        self.released += 1

    def run(
        self, unit: Any, work: Sequence[Work], *, stage: str, on_result: OnResult | None = None, keep: bool = True
    ) -> list[Any]:
        self.pools.append(len(work))
        for number, entry in reversed(list(enumerate(work))):  # whoever finishes first
            plan = entry.item[0] if isinstance(entry.item, tuple) else entry.item
            self.scored.append(plan)
            assert on_result is not None
            on_result(number, self.answer(plan))
        return []

    def answer(self, plan: PruningPlan) -> CandidateScore:
        kept = plan.groups[1].kept_channels
        name = next(n for n in range(len(self._lost)) if set(kept) == set(np.roll(np.arange(60), n)[: len(kept)]))
        lost = self._lost[name](chain_cost().parameters(plan.widths()) / DENSE)
        predicted = np.zeros(NUM_IMAGES, dtype=np.int64)
        predicted[: round(lost * NUM_IMAGES)] = 1
        return CandidateScore(state={"size": np.zeros(3)}, predicted=predicted)


JOB = job_of(None, num_images=NUM_IMAGES)


def entrant(name: int, *, arena: str = "one", job: CandidateJob = JOB, max_drop: float = MAX_DROP) -> Entrant:
    return Entrant(
        paths=paths_of(name),
        cost=chain_cost(),
        budget=Budget(max_accuracy_drop=max_drop),
        config=CONFIG,
        job=job,
        stop=StopRule(max_drop=max_drop, quantile=CONFIG.quantile),
        arena=arena,
        candidate_key=lambda plan: plan.digest(),
        known=lambda plan: None,
        on_score=lambda plan, score: None,
    )


def falling(steepness: float) -> Callable[[float], float]:
    return lambda share: min(0.3 * (1 - share) ** steepness, 0.9)


def described(finish: Finish) -> list[dict[str, Any]]:
    return [candidate.to_dict() for candidate in finish.candidates]


# --- the race ---------------------------------------------------------------------------------------------------------


@settings(max_examples=5)
@given(st.lists(st.floats(2.0, 6.0), min_size=2, max_size=4))
def test_a_setting_ends_as_it_would_alone_if_it_is_not_stopped(steepness: list[float]) -> None:
    losses = [falling(value) for value in steepness]
    finishes = race([entrant(number) for number in range(len(losses))], cast("Any", Field(losses)))
    for number, finish in enumerate(finishes):
        alone = search(
            paths_of(number), chain_cost(), job_of(MAX_DROP, num_images=NUM_IMAGES),
            Budget(max_accuracy_drop=MAX_DROP), CONFIG, cast("Any", Field(losses)),
        )  # fmt: skip
        tried = [candidate.to_dict() for candidate in alone.candidates]
        if finish.stopped_by is None:
            assert described(finish) == tried
            assert finish.chosen.plan == alone.chosen.plan
        else:
            assert described(finish) == tried[: len(finish.candidates)]
    sizes = [finish.chosen.parameters for finish in finishes if finish.budget_met]
    assert min(sizes) == min(f.chosen.parameters for f in finishes if f.budget_met and f.stopped_by is None)


def test_hopeless_setting_is_stopped_by_the_best_and_costs_less() -> None:
    losses = [falling(5.0), lambda share: 0.5 if share < 0.95 else 0.0]
    field, patient = Field(losses), Field(losses)
    good, hopeless = race([entrant(0), entrant(1)], cast("Any", field))
    assert good.stopped_by is None
    assert hopeless.stopped_by == 0
    assert hopeless.rounds < CONFIG.max_rounds
    assert not hopeless.budget_met
    unstopped = race([entrant(0), entrant(1)], cast("Any", patient), stop_early=False)
    assert all(finish.stopped_by is None for finish in unstopped)
    assert described(unstopped[0]) == described(good)
    assert len(field.scored) < len(patient.scored)


def test_slightly_worse_setting_runs_to_its_end() -> None:
    finishes = race([entrant(0), entrant(1)], cast("Any", Field([falling(5.0), falling(4.95)])))
    assert [finish.stopped_by for finish in finishes] == [None, None]


def test_settings_of_another_arena_are_not_compared() -> None:
    losses = [falling(5.0), lambda share: 0.5 if share < 0.95 else 0.0]
    finishes = race([entrant(0), entrant(1, arena="another network")], cast("Any", Field(losses)))
    assert [finish.stopped_by for finish in finishes] == [None, None]


def test_candidates_of_a_round_are_one_pool_and_equal_plans_one_unit() -> None:
    field = Field([falling(3.0), falling(3.0)])
    finishes = race([entrant(0), entrant(1), entrant(0)], cast("Any", field))
    assert field.pools[0] == 2 * CONFIG.candidates_per_round  # the third setting asks for the first one's plans
    assert len(field.pools) == max(finish.rounds for finish in finishes)
    digests = [plan.digest() for plan in field.scored]
    assert len(digests) == len(set(digests))
    assert described(finishes[0]) == described(finishes[2])
    assert field.released == 1


def test_each_setting_keeps_its_own_latency_budget() -> None:
    clocks, losses = [Clock(), Clock()], [falling(3.0), falling(3.0)]
    budgets = [Budget(max_accuracy_drop=50.0, latency_removed=0.6), Budget(latency_removed=0.3)]
    entrants = [
        replace(
            entrant(number), budget=budget, arena=str(number), kept_latency=clock,
            stop=StopRule(max_drop=budget.max_accuracy_drop, quantile=CONFIG.quantile),
        )
        for number, (budget, clock) in enumerate(zip(budgets, clocks, strict=True))
    ]  # fmt: skip
    finishes = race(entrants, cast("Any", Field(losses)))
    for number, (finish, budget) in enumerate(zip(finishes, budgets, strict=True)):
        alone = search(
            paths_of(number), chain_cost(), job_of(budget.max_accuracy_drop, num_images=NUM_IMAGES), budget, CONFIG,
            cast("Any", Field(losses)), kept_latency=Clock(),
        )  # fmt: skip
        assert described(finish) == [candidate.to_dict() for candidate in alone.candidates]
        assert finish.budget_met
        assert finish.chosen.latency_kept == Clock()(finish.chosen.plan)
        assert finish.chosen.latency_kept <= 1.0 - (budget.latency_removed or 0.0)
        assert clocks[number].measured
    assert entrants[1].size(finishes[1].chosen) == finishes[1].chosen.macs < chain_cost().macs(WIDTHS)


def test_job_is_released_after_an_error() -> None:
    field = Field([lambda share: 1 / 0])
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        race([entrant(0)], cast("Any", field))
    assert field.released == 1


def test_scorer_of_single_searches_still_fits() -> None:
    found = search(
        PATHS, chain_cost(), job_of(MAX_DROP), Budget(max_accuracy_drop=MAX_DROP), CONFIG, Scorer(lambda _: 0.0)
    )
    assert found.budget_met


# --- clearly worse ----------------------------------------------------------------------------------------------------

STOP = StopRule(max_drop=1.0, quantile=1.645)


@pytest.mark.parametrize(("more_lost", "verdict"), [(0, False), (2, False), (200, True)])
def test_only_a_clear_difference_on_the_same_images_counts(more_lost: int, verdict: bool) -> None:
    best = np.zeros(2000)
    best[:20] = 100.0
    worse = best.copy()
    worse[20 : 20 + more_lost] = 100.0
    assert is_clearly_worse(worse, best, STOP) is verdict
    assert is_clearly_worse(best, worse, STOP) is False


def test_images_that_only_one_has_seen_and_few_images_do_not_count() -> None:
    best, worse = np.zeros(2000), np.zeros(1000)
    best[1000:] = 100.0
    worse[:500] = 100.0
    assert is_clearly_worse(worse, best, STOP)
    assert not is_clearly_worse(np.full(100, 100.0), np.zeros(100), STOP)


# --- the front --------------------------------------------------------------------------------------------------------

COORDINATE = st.one_of(st.none(), st.integers(0, 9).map(float))


@given(st.lists(st.tuples(COORDINATE, COORDINATE), max_size=30))
def test_front_is_what_no_other_point_beats(points: list[tuple[float | None, float | None]]) -> None:
    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] <= other[0] and one[1] <= other[1] and one != other

    front = [cast("tuple[float, float]", points[number]) for number in pareto_front(points)]
    known = [cast("tuple[float, float]", point) for point in points if None not in point]
    assert all(not beats(other, point) for point in front for other in known)
    assert {point for point in known if not any(beats(other, point) for other in known)} == set(front)
    assert len(front) == len(set(front))
    assert front == sorted(front)
    assert [drop for _, drop in front] == sorted((drop for _, drop in front), reverse=True)
