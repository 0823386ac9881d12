"""Find the smallest network within a budget: allocate widths, assemble candidates, score them, narrow the bracket.

Selection uses validation images alone, paired with the dense network's answers on the same images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from entprune.allocation import AllocationProblem, CostModel, Limits, Objective
from entprune.candidates import CandidateJob, CandidateScore
from entprune.config import Budget, BudgetKind, PruneConfig
from entprune.errors import ConfigError
from entprune.latency import KeptLatency, LatencyBudget, latency_budget, limit_macs
from entprune.path import SparsityPath
from entprune.plan import PruningPlan
from entprune.planning import Planner, allocation_problem
from entprune.rank_choice import RankChoice, rank_choice
from entprune.runner import Runner
from entprune.scoring import ScoreTask, score_all
from entprune.selection import DenseReference, StopRule

_SMALLEST_FRACTION = 0.02
_REMOVED_RESOLUTION = 1.25  # factor between the removed fractions of neighbouring sizes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Candidate:
    """One plan that was tried.

    Attributes:
        round: of the search, from 1.
        kept_fraction: asked of the objective.
        plan: kept channels.
        parameters, macs: exact, from the cost model.
        accuracy: percent on the validation images scored, None where none were asked for.
        accuracy_drop: estimated drop on unseen images in points (see :mod:`entprune.selection`), upper_bound its
            confidence bound.
        label_drop: paired mean drop by the labels of these images.
        images: validation images scored.
        accepted: whether every budget is met.
        latency_kept: measured fraction of the dense network's latency, None where it was not asked for.
        missed: names of the budgets that are not met, as far as they were looked at.
    """

    round: int
    kept_fraction: float
    plan: PruningPlan
    parameters: int
    macs: int
    accuracy: float | None
    accuracy_drop: float | None
    label_drop: float | None
    upper_bound: float | None
    images: int
    accepted: bool
    latency_kept: float | None = None
    missed: tuple[BudgetKind, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report."""
        return {
            "round": self.round,
            "kept_fraction": self.kept_fraction,
            "parameters": self.parameters,
            "macs": self.macs,
            "validation_accuracy": self.accuracy,
            "validation_drop": self.accuracy_drop,
            "validation_label_drop": self.label_drop,
            "drop_upper_bound": None if self.upper_bound == math.inf else self.upper_bound,  # JSON knows no infinity
            "images": self.images,
            "accepted": self.accepted,
            "latency_kept": self.latency_kept,
            "widths": self.plan.widths(),
        }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SearchResult:
    """Everything that was tried and what was chosen.

    Attributes:
        candidates: in the order tried.
        chosen: the smallest accepted one, or the one nearest to the budget if none was: with several budgets the one
            that removes no more than they ask and so loses least.
        state: its weights.
        budget_met: whether any candidate was accepted; otherwise `chosen.missed` says which budgets failed.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    state: dict[str, np.ndarray]
    budget_met: bool


OnScore = Callable[[PruningPlan, CandidateScore], None]


def search(
    paths: Mapping[str, SparsityPath],
    cost: CostModel,
    job: CandidateJob,
    budget: Budget,
    config: PruneConfig,
    runner: Runner,
    *,
    known: Callable[[PruningPlan], CandidateScore | None] = lambda _: None,
    on_score: OnScore | None = None,
    kept_latency: KeptLatency | None = None,
    dense_widths: Mapping[str, int] | None = None,
) -> SearchResult:
    """Search the budget.

    Args:
        paths: sparsity path of each group.
        cost: size of the network for any widths.
        job: what candidate units read.
        budget: the user's.
        config: settings.
        runner: runs candidates of one round side by side.
        known: returns the score of a plan from an earlier run on the same inputs.
        on_score: called with each new score as it comes in.
        kept_latency: measures the fraction of the dense network's latency that a plan keeps; by default here and now.
        dense_widths: where the network was pruned before, what each group had then; floors refer to these.

    Raises:
        ConfigError: a size or latency budget that even the least widths do not reach.
    """
    ledger = Ledger(job.stop, job.reference, latency_budget(job.network, budget, config, kept_latency))
    scorer = _Scorer(job, runner, known, on_score)
    steps = search_steps(paths, cost, ledger, budget, config, dense_widths, rank_choice(job, config))
    try:
        while True:
            try:
                request = next(steps)
            except StopIteration as end:
                found: SearchResult = end.value
                return found
            scorer.score(request, ledger)
    finally:
        scorer.close()


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreRequest:
    """Plans that a search wants to see scored before it goes on; `stage` names what for."""

    plans: tuple[PruningPlan, ...]
    stage: str


SearchSteps = Generator[ScoreRequest, None, SearchResult]


def search_steps(
    paths: Mapping[str, SparsityPath],
    cost: CostModel,
    ledger: Ledger,
    budget: Budget,
    config: PruneConfig,
    dense_widths: Mapping[str, int] | None = None,
    ranks: RankChoice | None = None,
) -> SearchSteps:
    """Search as a sequence of requests; whoever drives it enters the scores into the ledger before it goes on.

    Raises:
        ConfigError: a size or latency budget that even the least widths do not reach.
    """
    problem = allocation_problem(paths, cost, config, _objective(budget, config), dense_widths)
    plannings = [_Planning.within(budget, problem, Planner(problem, paths), ledger.latency)]
    if ranks is not None:
        with suppress(ConfigError):  # no latency is low enough with ranks; without them one is
            thin = Planner(problem, paths, ranks)
            plannings.insert(0, _Planning.within(budget, problem, thin, ledger.latency))
    if budget.max_accuracy_drop is not None:
        return _smallest_of(problem, plannings, ledger, config)
    return _by_size(problem, plannings, ledger)


@dataclass(frozen=True, slots=True)
class _Planning:
    """Who makes plans, and within what limits of size; a limit of latency became one of MACs, for these plans."""

    planner: Planner
    limits: Limits
    is_timed: bool

    @classmethod
    def within(
        cls, budget: Budget, problem: AllocationProblem, planner: Planner, latency: LatencyBudget | None
    ) -> _Planning:
        """What a budget of size allows, and how many MACs one of latency."""
        limits: Limits = budget.size_limits()
        if latency is not None:
            limits = limit_macs(problem, limits, lambda tried: latency.kept(planner.plan_within(tried)), latency.limit)
        return cls(planner, limits, latency is not None)

    def plan(self, objective: Objective, fraction: float) -> PruningPlan:
        """The plan whose widths are of this size; where its ranks leave it above a limit, one within the limits."""
        plan = self.planner.plan_within({**self.limits, objective: fraction})
        return plan if self.planner.keeps_to(self.limits, plan) else self.planner.plan_within(self.limits)

    def largest(self) -> PruningPlan:
        """The largest network within the limits; what room ranks leave is filled unless that would take time."""
        return self.planner.plan_within(self.limits) if self.is_timed else self.planner.fitting(self.limits)


def _objective(budget: Budget, config: PruneConfig) -> Objective:
    if budget.max_accuracy_drop is not None:
        return config.objective
    return "parameters" if budget.parameters_removed is not None else "macs"


class Ledger:
    """Scores of one search's plans, and the candidates that it made of them.

    Args:
        stop: verdicts follow its budget and confidence.
        reference: the dense network's answers, None where nothing is selected on them.
        latency: budget of latency, None without one.

    Attributes:
        scores: by the plan's digest.
        tried: candidates in the order tried.
    """

    def __init__(self, stop: StopRule, reference: DenseReference | None, latency: LatencyBudget | None = None) -> None:
        self._stop, self._reference, self.latency = stop, reference, latency
        self.scores: dict[str, CandidateScore] = {}
        self.tried: list[Candidate] = []

    @property
    def max_drop(self) -> float:
        """Budget in points, infinite without one."""
        return float("inf") if self._stop.max_drop is None else self._stop.max_drop

    def missing(self, request: ScoreRequest) -> list[PruningPlan]:
        """Plans without a score, each once."""
        plans = {plan.digest(): plan for plan in request.plans}
        return [plan for digest, plan in plans.items() if digest not in self.scores]

    def score(self, plan: PruningPlan) -> CandidateScore:
        """The score of a plan that was requested."""
        return self.scores[plan.digest()]

    def drops(self, plan: PruningPlan) -> np.ndarray:
        """(j,) estimated drop of each validation image a plan was scored on, in points; none without a reference."""
        predicted = self.score(plan).predicted
        return np.zeros(0) if self._reference is None else self._reference.drops(predicted)

    def judge(self, problem: AllocationProblem, plan: PruningPlan, fraction: float, number: int) -> Candidate:
        """Turn a plan's score into a candidate with its verdict."""
        score = self.score(plan)
        stop, reference, count = self._stop, self._reference, len(score.predicted)
        drop = upper = accuracy = label_drop = None
        if reference is not None and count:
            drop, _, upper = stop.bounds(reference.drops(score.predicted))
            label_drop = float(reference.drops(score.predicted, "labels").mean())
            accuracy = 100.0 * float((score.predicted == reference.labels[:count]).mean())
        missed: tuple[BudgetKind, ...] = ()
        latency_kept: float | None = None
        if stop.max_drop is not None and (upper is None or upper > stop.max_drop):
            missed = ("max_accuracy_drop",)
        elif self.latency is not None:
            latency_kept = self.latency.kept(plan)
            missed = () if self.latency.allows(latency_kept) else ("latency_removed",)
        candidate = Candidate(
            round=number,
            kept_fraction=fraction,
            plan=plan,
            parameters=problem.cost.parameters(plan.widths(), dict(plan.ranks)),
            macs=problem.cost.macs(plan.widths(), dict(plan.ranks)),
            accuracy=accuracy,
            accuracy_drop=drop,
            label_drop=label_drop,
            upper_bound=upper,
            images=count,
            accepted=not missed,
            latency_kept=latency_kept,
            missed=missed,
        )
        self.tried.append(candidate)
        return candidate

    def nearest(self) -> Candidate:
        """The candidate that comes nearest to the budget."""
        return min(self.tried, key=lambda candidate: candidate.upper_bound or 0.0)

    def finish(self, chosen: Candidate, budget_met: bool) -> SearchResult:
        """Result with the chosen candidate's weights."""
        return SearchResult(
            candidates=tuple(self.tried),
            chosen=chosen,
            state=self.score(chosen.plan).state,
            budget_met=budget_met,
        )


class _Scorer:
    """Scores what one search asks for: from an earlier run, or on the runner's workers."""

    def __init__(
        self,
        job: CandidateJob,
        runner: Runner,
        known: Callable[[PruningPlan], CandidateScore | None],
        on_score: OnScore | None,
    ) -> None:
        self._job, self._runner, self._known, self._on_score = job, runner, known, on_score
        self._handle: Any = None

    def close(self) -> None:
        if self._handle is not None:
            self._runner.release(self._handle)

    def score(self, request: ScoreRequest, ledger: Ledger) -> None:
        """Enter the scores of the requested plans."""
        for plan in ledger.missing(request):
            earlier = self._known(plan)
            if earlier is not None:
                ledger.scores[plan.digest()] = earlier
        missing = ledger.missing(request)
        if not missing:
            return
        if self._handle is None:
            self._handle = self._runner.share(self._job)

        def collect(number: int, score: CandidateScore) -> None:
            ledger.scores[missing[number].digest()] = score
            if self._on_score is not None:
                self._on_score(missing[number], score)

        job, handle = self._job, self._handle
        tasks = [ScoreTask(handle=handle, job=job, plan=plan, stop=job.stop) for plan in missing]
        score_all(tasks, self._runner, stage=request.stage, on_score=collect)


def _by_size(problem: AllocationProblem, plannings: Sequence[_Planning], ledger: Ledger) -> SearchSteps:
    """One plan, or one with ranks and one without: the size is known without trying, what it loses is not."""
    plans = [entry.largest() for entry in plannings]
    yield ScoreRequest(plans=tuple(plans), stage="assemble")
    judged = [
        ledger.judge(problem, plan, entry.limits.get(problem.objective, _kept(problem, plan)), 1)
        for plan, entry in zip(plans, plannings, strict=True)
    ]
    chosen = min(judged, key=lambda candidate: (not candidate.accepted, candidate.accuracy_drop or 0.0))
    return ledger.finish(chosen, chosen.accepted)


def _smallest_of(
    problem: AllocationProblem, plannings: Sequence[_Planning], ledger: Ledger, config: PruneConfig
) -> SearchSteps:
    """The smallest network with layers of low rank, unless one without them is within the budget at that size.

    Then that one is made smaller still. Otherwise a single further network was tried.
    """
    first, *others = plannings
    found = yield from _by_accuracy(problem, first, ledger, config)
    for entry in others:
        limits = dict(entry.limits)
        if found.budget_met:
            limits[problem.objective] = min(limits.get(problem.objective, 1.0), _kept(problem, found.chosen.plan))
            if limits[problem.objective] <= problem.fraction(problem.smallest()):
                break
        elif not limits:
            break  # it lost too much with next to nothing removed
        rival = yield from _by_accuracy(problem, replace(entry, limits=limits), ledger, config)
        found = rival if rival.budget_met else replace(found, candidates=rival.candidates)
    return found if found.budget_met else ledger.finish(ledger.nearest(), False)


def _kept(problem: AllocationProblem, plan: PruningPlan) -> float:
    return problem.fraction(plan.widths(), plan.ranks)


def _by_accuracy(problem: AllocationProblem, planning: _Planning, ledger: Ledger, config: PruneConfig) -> SearchSteps:
    """Narrow a bracket of kept fractions, several candidates per round, on a logarithmic scale.

    Further budgets bound the bracket from above; the largest network that they allow is tried first, for nothing
    larger may be chosen, and the larger a network the less it loses.
    """
    bracket = _Bracket(low=_smallest_fraction(problem), high=1.0)
    best: Candidate | None = None
    if planning.limits:
        plan = planning.largest()
        yield ScoreRequest(plans=(plan,), stage="search, largest")
        best = ledger.judge(problem, plan, problem.fraction(plan.widths()), 1)
        bracket.high, bracket.excess_high = best.kept_fraction, _log_ratio(best.upper_bound or 0.0, ledger.max_drop)
        if not best.accepted or bracket.low >= bracket.high:
            return ledger.finish(best, best.accepted)
    for number in range(1, config.max_rounds + 1):
        if number > 1 and bracket.is_narrow(config.resolution):
            break
        inner = bracket.next_fractions(config)
        plans = [planning.plan(problem.objective, float(fraction)) for fraction in inner]
        yield ScoreRequest(plans=tuple(plans), stage=f"search, round {number}")
        judged = [
            ledger.judge(problem, plan, float(fraction), number) for plan, fraction in zip(plans, inner, strict=True)
        ]
        for candidate in judged:  # ascending size: the bracket's ends are the last refusal below the first acceptance
            excess = _log_ratio(candidate.upper_bound or 0.0, ledger.max_drop)
            if candidate.accepted:
                best = candidate
                bracket.high, bracket.excess_high = candidate.kept_fraction, excess
                break
            bracket.low, bracket.excess_low = candidate.kept_fraction, excess
    return ledger.finish(best, True) if best is not None else ledger.finish(ledger.nearest(), False)


@dataclass(slots=True)
class _Bracket:
    """Kept fractions between which the budget is met, with log(bound / budget) at the ends where it is known."""

    low: float
    high: float
    excess_low: float | None = None
    excess_high: float | None = None

    def is_narrow(self, resolution: float) -> bool:
        """Whether both what is kept and what is removed are known well enough; the latter counts where little goes."""
        if self.high / self.low > resolution * 1.001:
            return False
        return self.high < 1.0 and (1.0 - self.low) / (1.0 - self.high) <= _REMOVED_RESOLUTION

    def next_fractions(self, config: PruneConfig) -> np.ndarray:
        """Fractions to try next, ascending, inside the bracket.

        Evenly spaced at first; once both ends have been scored, close around the crossing that a power law through them
        predicts: the drop grows about geometrically as the network shrinks.
        """
        count = config.candidates_per_round
        ratio = self.high / self.low
        if self.excess_low is None or self.excess_high is None or ratio <= config.resolution**2:
            return np.geomspace(self.low, self.high, count + 2)[1:-1]
        share = self.excess_low / max(self.excess_low - self.excess_high, 1e-12)
        centre = self.low * ratio**share
        margin = config.resolution**0.5
        low, high = max(centre / margin, self.low * margin**0.5), min(centre * margin, self.high / margin**0.5)
        return np.geomspace(low, high, count) if count > 1 else np.array([centre])


def _log_ratio(bound: float, budget: float) -> float:
    return math.log(max(bound, 1e-3) / max(budget, 1e-3))


def _smallest_fraction(problem: AllocationProblem) -> float:
    dense = problem.cost.evaluate(problem.full(), problem.objective)
    least = problem.cost.evaluate(problem.smallest(), problem.objective) / dense
    if least >= 1.0:
        raise ConfigError("the least widths leave nothing to remove; lower the floor per group.")
    return min(max(least * 1.0001, _SMALLEST_FRACTION), 1.0)
