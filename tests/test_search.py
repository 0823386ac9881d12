"""The search: with a scorer whose answer is known it finds the smallest network that fits, or says that none does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entprune.allocation import CostModel, LayerCost
from entprune.candidates import CandidateJob, CandidateScore
from entprune.config import Budget, PruneConfig
from entprune.errors import ConfigError
from entprune.path import PathSetting, SettingPath, SparsityPath
from entprune.plan import PruningPlan
from entprune.runner import OnResult, Work
from entprune.search import SearchResult, _Bracket, _Planning, search
from entprune.selection import DenseReference, StopRule

NUM_IMAGES = 400
WIDTHS = {"first": 30, "second": 60}
CONFIG = PruneConfig(max_rounds=30, resolution=1.3, drop_estimate="labels")


def chain_cost(untouched: int = 0) -> CostModel:
    def layer(name: str, inputs: str | None, outputs: str | None) -> LayerCost:
        return LayerCost(
            name=name, taps=9, per_output=1, positions=4,
            fixed_inputs=0 if inputs else 3, fixed_outputs=0 if outputs else 10,
            input_blocks={inputs: 1} if inputs else {}, output_blocks={outputs: 1} if outputs else {},
        )  # fmt: skip

    layers = (layer("a", None, "first"), layer("b", "first", "second"), layer("c", "second", None))
    return CostModel(layers=layers, untouched_parameters=untouched)


def falling_path(name: str) -> SparsityPath:
    """Channel k is the k-th most important one."""
    count = WIDTHS[name]
    errors = np.linspace(1.0, 0.0, count + 1) ** 2
    only = SettingPath(
        setting=PathSetting(), order=np.arange(count), errors=errors,
        snapshots=np.full((1, count), 1.0 / count, dtype=np.float32), status="complete",
    )  # fmt: skip
    return SparsityPath(
        group=name, num_consumers=1, settings=(only,), errors=errors, choice=np.zeros(count + 1, dtype=np.int64)
    )


PATHS = {name: falling_path(name) for name in WIDTHS}
DENSE = chain_cost().parameters(WIDTHS)


class Scorer:
    """A runner that answers from a rule: the fraction of images lost by a network of a given share of parameters."""

    def __init__(self, lost: Callable[[float], float], *, num_images: int = NUM_IMAGES) -> None:
        self._lost, self._num_images = lost, num_images
        self.scored: list[PruningPlan] = []
        self.released = 0

    workers = 1

    def share(self, value: Any) -> Any:
        return value

    def release(self, handle: Any) -> None:
        self.released += 1

    def run(
        self, unit: Any, work: Sequence[Work], *, stage: str, on_result: OnResult | None = None, keep: bool = True
    ) -> list[Any]:
        plans = [entry.item[0] for entry in work]
        results = [self.answer(plan) for plan in plans]
        for number, result in enumerate(results):
            self.scored.append(plans[number])
            if on_result is not None:
                on_result(number, result)
        return results

    def answer(self, plan: PruningPlan) -> CandidateScore:
        lost = self._lost(chain_cost().parameters(plan.widths()) / DENSE)
        predicted = np.zeros(self._num_images, dtype=np.int64)
        predicted[: round(lost * self._num_images)] = 1
        return CandidateScore(state={"size": np.array(len(self.scored))}, predicted=predicted)


def job_of(
    max_drop: float | None,
    *,
    has_reference: bool = True,
    num_images: int = NUM_IMAGES,
    quantile: float = CONFIG.quantile,
) -> CandidateJob:
    """The dense network is right and certain on every image."""
    probabilities = np.tile(np.array([1.0, 0.0], dtype=np.float32), (num_images, 1))
    reference = DenseReference(labels=np.zeros(num_images, np.int64), probabilities=probabilities, estimate="labels")
    unused = cast("Any", None)
    return CandidateJob(
        network=unused, data=unused, refit=unused, validation=unused, reference=reference if has_reference else None,
        stop=StopRule(max_drop=max_drop, quantile=quantile), device="cpu",
    )  # fmt: skip


def by_accuracy(
    scorer: Scorer, max_drop: float = 1.0, config: PruneConfig = CONFIG, cost: CostModel | None = None, **options: Any
) -> SearchResult:
    budget = Budget(max_accuracy_drop=max_drop)
    return search(PATHS, cost or chain_cost(), job_of(max_drop), budget, config, scorer, **options)


# --- accuracy budgets ------------------------------------------------------------------------------------------------


@settings(max_examples=4)
@given(st.floats(0.1, 0.9), st.integers(1, 3))
def test_smallest_sufficient_size_is_found(threshold: float, per_round: int) -> None:
    config = PruneConfig(max_rounds=60, resolution=1.05, candidates_per_round=per_round, drop_estimate="labels")
    found = by_accuracy(Scorer(lambda share: 0.0 if share >= threshold else 0.5), config=config)
    share = found.chosen.parameters / DENSE
    assert found.budget_met
    assert threshold <= share <= 1.15 * threshold


@settings(max_examples=5)
@given(st.floats(0.0, 5.0), st.floats(0.5, 3.0))
def test_chosen_network_is_the_smallest_accepted_one_and_within_the_budget(max_drop: float, steepness: float) -> None:
    found = by_accuracy(Scorer(lambda share: 0.3 * (1 - share) ** steepness), max_drop)
    accepted = [candidate for candidate in found.candidates if candidate.accepted]
    for candidate in found.candidates:
        assert candidate.upper_bound is not None
        assert candidate.accuracy_drop is not None
        assert candidate.accuracy_drop <= candidate.upper_bound
        assert candidate.accepted == (candidate.upper_bound <= max_drop)
    assert found.budget_met == bool(accepted)
    if accepted:
        assert found.chosen.parameters == min(candidate.parameters for candidate in accepted)


@pytest.mark.parametrize("steepness", [1.0, 3.0, 8.0])
@pytest.mark.parametrize("crossing", [0.1, 0.15, 0.4])
def test_few_rounds_suffice_however_steeply_the_accuracy_falls(steepness: float, crossing: float) -> None:
    """The drop is half a point at the crossing and follows a power of the size, as measured curves roughly do."""
    config = PruneConfig(max_rounds=4, candidates_per_round=2, drop_estimate="labels")
    scorer = Scorer(lambda share: min(0.005 * (share / crossing) ** -steepness, 0.9), num_images=40_000)
    budget = Budget(max_accuracy_drop=0.5)
    found = search(PATHS, chain_cost(), job_of(0.5, num_images=40_000, quantile=0.0), budget, config, scorer)
    assert found.budget_met
    assert found.chosen.parameters / DENSE <= 1.15 * crossing


def test_impossible_budget_says_so_and_comes_as_near_as_it_can() -> None:
    found = by_accuracy(Scorer(lambda share: 0.5 - 0.2 * share))
    assert not found.budget_met
    assert not any(candidate.accepted for candidate in found.candidates)
    assert found.chosen.accuracy_drop == min(candidate.accuracy_drop or 0.0 for candidate in found.candidates)


def test_drop_of_the_mean_alone_does_not_suffice() -> None:
    found = by_accuracy(Scorer(lambda share: 0.0 if share > 0.5 else 0.01), max_drop=1.0)  # mean 1.0, bound above it
    assert found.chosen.accuracy_drop == 0.0
    assert found.chosen.parameters > 0.5 * DENSE


def test_something_is_tried_even_where_little_can_be_removed() -> None:
    cost = chain_cost(untouched=100 * DENSE)  # at most one percent
    found = by_accuracy(Scorer(lambda _: 0.0), cost=cost)
    assert found.budget_met
    assert found.candidates
    assert by_accuracy(Scorer(lambda _: 0.5), cost=cost).budget_met is False


def test_single_validation_image_decides_nothing_and_can_be_reported() -> None:
    found = search(
        PATHS, chain_cost(), job_of(1.0, num_images=1), Budget(max_accuracy_drop=1.0), CONFIG,
        Scorer(lambda _: 0.0, num_images=1),
    )  # fmt: skip
    assert not found.budget_met
    assert json.loads(json.dumps(found.chosen.to_dict(), allow_nan=False))["drop_upper_bound"] is None


def test_nothing_to_remove_is_explained() -> None:
    with pytest.raises(ConfigError, match="the least widths leave nothing to remove"):
        by_accuracy(Scorer(lambda _: 0.0), config=PruneConfig(minimum_channels=60))


def test_rounds_are_limited() -> None:
    config = PruneConfig(max_rounds=3, candidates_per_round=2, resolution=1.0001, drop_estimate="labels")
    found = by_accuracy(Scorer(lambda share: 0.0 if share > 0.3 else 0.5), config=config)
    assert {candidate.round for candidate in found.candidates} == {1, 2, 3}
    assert len(found.candidates) == 6


def test_floor_and_multiple_of_the_widths_are_respected() -> None:
    config = PruneConfig(minimum_channels=9, round_to=4, drop_estimate="labels")
    found = by_accuracy(Scorer(lambda share: 0.0 if share > 0.25 else 0.5), config=config)
    for candidate in found.candidates:
        for name, width in candidate.plan.widths().items():
            assert width >= 9
            assert width % 4 == 0 or width == WIDTHS[name]


def test_sizes_of_candidates_are_those_of_their_plans() -> None:
    found = by_accuracy(Scorer(lambda share: 0.0 if share > 0.25 else 0.5))
    for candidate in found.candidates:
        assert candidate.parameters == chain_cost().parameters(candidate.plan.widths())
        assert candidate.macs == chain_cost().macs(candidate.plan.widths())
        assert candidate.images == NUM_IMAGES
        assert candidate.to_dict()["widths"] == candidate.plan.widths()


# --- what is known already -------------------------------------------------------------------------------------------


def test_no_plan_is_scored_twice() -> None:
    scorer = Scorer(lambda share: 0.0 if share > 0.25 else 0.5)
    by_accuracy(scorer, config=PruneConfig(max_rounds=8, resolution=1.0001, drop_estimate="labels"))
    digests = [plan.digest() for plan in scorer.scored]
    assert len(digests) == len(set(digests)) > 2


def test_known_scores_are_used_and_give_the_same_answer() -> None:
    scorer, scores = Scorer(lambda share: 0.0 if share > 0.25 else 0.5), {}
    first = by_accuracy(scorer, on_score=lambda plan, score: scores.__setitem__(plan.digest(), score))
    assert set(scores) == {plan.digest() for plan in scorer.scored}
    idle, late = Scorer(lambda _: 0.5), []
    again = by_accuracy(idle, known=lambda plan: scores.get(plan.digest()), on_score=lambda *call: late.append(call))
    assert idle.scored == late == []
    assert again.chosen.plan == first.chosen.plan
    assert [candidate.to_dict() for candidate in again.candidates] == [c.to_dict() for c in first.candidates]


def test_state_is_that_of_the_chosen_network() -> None:
    scores = {}
    found = by_accuracy(
        Scorer(lambda share: 0.0 if share > 0.25 else 0.5),
        on_score=lambda plan, score: scores.__setitem__(plan.digest(), score),
    )
    assert found.state is scores[found.chosen.plan.digest()].state


def test_shared_job_is_released_even_after_an_error() -> None:
    scorer = Scorer(lambda share: 0.0)
    by_accuracy(scorer)
    assert scorer.released == 1
    failing = Scorer(lambda share: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        by_accuracy(failing)
    assert failing.released == 1


# --- size budgets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parameters", "macs"])
@pytest.mark.parametrize("removed", [0.0, 0.3, 0.75, 0.95])
@pytest.mark.parametrize("has_reference", [False, True])
def test_size_budget_is_met_by_one_allocation(kind: str, removed: float, has_reference: bool) -> None:
    scorer, cost = Scorer(lambda _: 0.25), chain_cost(untouched=5)
    budget = Budget(**{f"{kind}_removed": removed})
    found = search(PATHS, cost, job_of(None, has_reference=has_reference), budget, CONFIG, scorer)
    assert len(scorer.scored) == len(found.candidates) == 1
    assert found.budget_met
    assert found.chosen.accepted
    size = {"parameters": found.chosen.parameters, "macs": found.chosen.macs}[kind]
    dense = {"parameters": cost.parameters(WIDTHS), "macs": cost.macs(WIDTHS)}[kind]
    assert 1 - size / dense >= removed
    assert 1 - size / dense <= removed + 0.06  # no more is cut than was asked
    assert found.chosen.accuracy_drop == (pytest.approx(25.0) if has_reference else None)


def test_unreachable_size_budget_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"of the parameters can be removed from this network, 99\.000% was asked"):
        search(
            PATHS,
            chain_cost(untouched=DENSE),
            job_of(None),
            Budget(parameters_removed=0.99),
            CONFIG,
            Scorer(lambda _: 0.0),
        )


@pytest.mark.parametrize(
    ("low", "high", "narrow"),
    [
        (0.100, 0.105, True),
        (0.100, 0.120, False),  # a fifth more is kept
        (0.900, 0.945, False),  # hardly more is kept, but half as much removed
        (0.900, 0.910, True),
        (0.980, 1.000, False),  # nothing was accepted yet
    ],
)
def test_search_ends_when_kept_and_removed_are_both_known(low: float, high: float, narrow: bool) -> None:
    assert _Bracket(low=low, high=high).is_narrow(1.08) is narrow


# --- several budgets -------------------------------------------------------------------------------------------------


class Clock:
    """Latency goes with the MACs, with a part that stays."""

    def __init__(self, fixed: float = 0.1) -> None:
        self.fixed, self.measured = fixed, list[PruningPlan]()

    def __call__(self, plan: PruningPlan) -> float:
        self.measured.append(plan)
        return self.fixed + (1 - self.fixed) * chain_cost().macs(plan.widths()) / chain_cost().macs(WIDTHS)


def search_for(scorer: Scorer, budget: Budget, **options: Any) -> SearchResult:
    return search(PATHS, chain_cost(), job_of(budget.max_accuracy_drop), budget, CONFIG, scorer, **options)


def share_removed(found: SearchResult) -> float:
    return 1 - found.chosen.parameters / DENSE


def test_accuracy_decides_where_it_allows_more_than_the_size_asks() -> None:
    scorer = Scorer(lambda share: 0.0 if share >= 0.3 else 0.5)
    found = search_for(scorer, Budget(max_accuracy_drop=1.0, parameters_removed=0.4))
    assert found.budget_met
    assert 0.6 <= share_removed(found) <= 0.7


def test_size_is_met_where_accuracy_would_allow_just_that() -> None:
    scorer = Scorer(lambda share: 0.0 if share >= 0.55 else 0.5)
    found = search_for(scorer, Budget(max_accuracy_drop=1.0, parameters_removed=0.4))
    assert found.budget_met
    assert share_removed(found) >= 0.4


def test_impossible_pair_removes_what_was_asked_and_says_that_accuracy_failed() -> None:
    scorer = Scorer(lambda share: 0.0 if share >= 0.7 else 0.5)
    found = search_for(scorer, Budget(max_accuracy_drop=1.0, parameters_removed=0.4))
    assert not found.budget_met
    assert found.chosen.missed == ("max_accuracy_drop",)
    assert 0.4 <= share_removed(found) <= 0.46
    assert len(scorer.scored) == 1  # everything smaller loses more


def test_a_plan_that_its_ranks_leave_above_a_limit_is_made_within_it() -> None:
    class Sizes:
        """Plans are their size."""

        def plan_within(self, limits: Mapping[str, float]) -> float:
            return limits["parameters"]

        def keeps_to(self, limits: Mapping[str, float], plan: float) -> bool:
            return plan <= limits["parameters"]

    planning = _Planning(cast("Any", Sizes()), {"parameters": 0.5}, is_timed=False)
    assert [planning.plan("parameters", asked) for asked in (0.4, 0.7)] == [0.4, 0.5]


def test_latency_alone_removes_no_more_than_it_must() -> None:
    scorer, clock = Scorer(lambda _: 0.0), Clock()
    found = search_for(scorer, Budget(latency_removed=0.5), kept_latency=clock)
    assert found.budget_met
    assert len(scorer.scored) == 1
    assert found.chosen.latency_kept is not None
    assert 0.5 / 1.08 <= found.chosen.latency_kept <= 0.5
    digests = [plan.digest() for plan in clock.measured]
    assert len(digests) == len(set(digests))


def test_latency_size_and_accuracy_hold_together() -> None:
    scorer = Scorer(lambda share: 0.0 if share >= 0.2 else 0.5)
    budget = Budget(max_accuracy_drop=1.0, parameters_removed=0.3, latency_removed=0.6)
    found = search_for(scorer, budget, kept_latency=Clock())
    assert found.budget_met
    assert found.chosen.latency_kept is not None
    assert found.chosen.latency_kept <= 0.4
    assert share_removed(found) >= 0.3
    assert found.chosen.parameters >= 0.2 * DENSE


def test_unreachable_latency_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"at most \d+\.\d% of the latency can be removed .*, 60\.0% was asked"):
        search_for(Scorer(lambda _: 0.0), Budget(latency_removed=0.6), kept_latency=Clock(fixed=0.5))


def test_latency_that_turns_out_too_long_is_refused() -> None:
    scorer, clock = Scorer(lambda share: 0.0 if share > 0.3 else 0.5), Clock()

    def uneven(plan: PruningPlan) -> float:
        return 0.8 if len(scorer.scored) > 1 else clock(plan)  # whatever is narrower than asked takes longer

    found = search_for(scorer, Budget(max_accuracy_drop=1.0, latency_removed=0.5), kept_latency=uneven)
    assert found.budget_met
    assert found.chosen is found.candidates[0]
    assert found.chosen.latency_kept is not None
    assert found.chosen.latency_kept <= 0.5
    assert ("latency_removed",) in {candidate.missed for candidate in found.candidates}


@pytest.mark.parametrize(
    ("macs", "calibration", "validation"),
    [(2_293_000, 6144, 16_000), (125_000_000, 3686, 16_000), (313_000_000, 1536, 10_224), (4_000_000_000, 1536, 4000)],
)
def test_small_networks_are_given_more_images(macs: int, calibration: int, validation: int) -> None:
    sized = PruneConfig().sized_for(macs)
    assert (sized.calibration_samples, sized.validation_samples) == (calibration, validation)
    assert sized.sized_for(1) == sized
    assert PruneConfig(calibration_samples=7).sized_for(macs).calibration_samples == 7


def test_labels_are_trusted_on_unseen_images_alone() -> None:
    assert PruneConfig().sized_for(1).drop_estimate == "posterior"
    assert PruneConfig().sized_for(1, has_unseen=True).drop_estimate == "labels"
    assert PruneConfig(drop_estimate="blend").sized_for(1, has_unseen=True).drop_estimate == "blend"


@pytest.mark.parametrize(
    ("macs", "is_native", "expected"),
    [(2_293_000, True, "float32"), (313_000_000, True, "bfloat16"), (313_000_000, False, "float32")],
)
def test_much_scoring_is_done_in_bfloat16_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, macs: int, is_native: bool, expected: str
) -> None:
    monkeypatch.setattr("entprune.config.has_native_bfloat16", lambda _: is_native)
    assert PruneConfig().sized_for(macs).scoring_precision == expected
    assert PruneConfig(scoring_precision="float32").sized_for(macs).scoring_precision == "float32"


def test_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match="scoring_precision must be one of None, float32, bfloat16, got 'float16'"):
        PruneConfig.from_dict({"scoring_precision": "float16"})
