"""Searches of several settings side by side: one pool of candidates per round, and no more rounds for hopeless ones.

Every unfinished search asks for its next candidates, all of them are scored as one pool of work, and only then verdicts
fall, so that nothing depends on which worker was faster. A setting that is not stopped comes out as it would alone.

Axes: j validation images that two candidates have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from entprune.allocation import CostModel
from entprune.candidates import CandidateJob, CandidateScore
from entprune.config import Budget, PruneConfig
from entprune.latency import KeptLatency, latency_budget
from entprune.path import SparsityPath
from entprune.plan import PruningPlan
from entprune.rank_choice import rank_choice
from entprune.runner import Runner
from entprune.scoring import ScoreTask, score_all
from entprune.search import Candidate, Ledger, ScoreRequest, SearchResult, search_steps
from entprune.selection import StopRule

_MIN_IMAGES = 256  # that a verdict on two candidates rests on


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Entrant:
    """One setting's search.

    Attributes:
        paths, cost, budget, config: as for :func:`entprune.search.search`.
        job: what candidate units read; entrants that share the very object share it on the workers, too.
        stop: this setting's own, in place of the job's.
        arena: entrants of the same arena have the same network, validation images and budget and can be compared.
        candidate_key: name of a plan's score; entrants with the same name get the same score.
        known: score of a plan from an earlier run on the same inputs.
        on_score: called with each new score as it comes in.
        kept_latency: measures the fraction of the dense network's latency that a plan keeps; by default here and now.
    """

    paths: dict[str, SparsityPath]
    cost: CostModel
    budget: Budget
    config: PruneConfig
    job: CandidateJob
    stop: StopRule
    arena: str
    candidate_key: Callable[[PruningPlan], str]
    known: Callable[[PruningPlan], CandidateScore | None]
    on_score: Callable[[PruningPlan, CandidateScore], None]
    kept_latency: KeptLatency | None = None

    def size(self, candidate: Candidate) -> int:
        """What the search makes small."""
        kind = self.budget.kind
        is_macs = self.config.objective == "macs" if kind == "max_accuracy_drop" else kind != "parameters_removed"
        return candidate.macs if is_macs else candidate.parameters


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Finish:
    """How one entrant ended.

    Attributes:
        candidates: in the order tried.
        chosen: the smallest accepted one, or the one nearest to the budget; of a stopped entrant the best so far.
        budget_met: whether any was accepted.
        stopped_by: number of the entrant that made this one hopeless, None if it ran to its end.
        rounds: that it took part in.
    """

    candidates: tuple[Candidate, ...]
    chosen: Candidate
    budget_met: bool
    stopped_by: int | None
    rounds: int


class _Run:
    """One entrant on its way; weights are let go at once, because a sweep tries more networks than fit in memory."""

    def __init__(self, entrant: Entrant) -> None:
        self.entrant = entrant
        latency = latency_budget(entrant.job.network, entrant.budget, entrant.config, entrant.kept_latency)
        self.ledger = Ledger(entrant.stop, entrant.job.reference, latency)
        ranks = rank_choice(entrant.job, entrant.config)
        self._steps = search_steps(
            entrant.paths, entrant.cost, self.ledger, entrant.budget, entrant.config, ranks=ranks
        )
        self.request: ScoreRequest | None = None
        self.result: SearchResult | None = None
        self.stopped_by: int | None = None
        self.rounds = 0
        self.advance()

    def advance(self) -> None:
        try:
            self.request = next(self._steps)
            self.rounds += 1
        except StopIteration as end:
            self.request, self.result = None, end.value

    def enter(self, plan: PruningPlan, score: CandidateScore) -> None:
        self.ledger.scores[plan.digest()] = replace(score, state={})

    def best(self) -> Candidate | None:
        """The smallest accepted candidate so far."""
        accepted = [candidate for candidate in self.ledger.tried if candidate.accepted]
        return min(accepted, key=self.entrant.size, default=None)

    def drops(self, candidate: Candidate) -> np.ndarray:
        """(j,) estimated drop of each image that the candidate was scored on."""
        return self.ledger.drops(candidate.plan)

    def stop(self, winner: int) -> None:
        self.request, self.stopped_by = None, winner
        self._steps.close()
        self.rounds -= 1  # the one that it asked for is not run

    def finish(self) -> Finish:
        best = self.best()
        chosen = self.result.chosen if self.result is not None else best or self.ledger.nearest()
        return Finish(
            candidates=tuple(self.ledger.tried),
            chosen=chosen,
            budget_met=self.result.budget_met if self.result is not None else best is not None,
            stopped_by=self.stopped_by,
            rounds=self.rounds,
        )


def race(entrants: Sequence[Entrant], runner: Runner, *, stop_early: bool = True) -> list[Finish]:
    """Search all settings round by round.

    Args:
        entrants: one per setting.
        runner: runs all candidates of a round as one pool of work.
        stop_early: end a search once one of its candidates is no smaller than the smallest accepted network of its
            arena and yet clearly less accurate on the same images: whatever it tries below that size is worse still.

    Returns:
        One finish per entrant, in their order.

    Raises:
        ConfigError: a size or latency budget that even the least widths do not reach.
    """
    runs = [_Run(entrant) for entrant in entrants]
    pool = _Pool(runner)
    number = 0
    try:
        while active := [run for run in runs if run.request is not None]:
            number += 1
            pool.score(active, f"search, round {number}")
            for run in active:
                run.advance()
            if stop_early:
                _stop_hopeless(runs)
    finally:
        pool.close()
    return [run.finish() for run in runs]


class _Pool:
    """Scores what all searches of one round ask for, each plan once."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._handles: dict[int, Any] = {}  # by the identity of the job, which its entrant keeps alive

    def close(self) -> None:
        for handle in self._handles.values():
            self._runner.release(handle)

    def score(self, runs: Sequence[_Run], stage: str) -> None:
        wanted: dict[tuple[int, str, StopRule], list[tuple[_Run, PruningPlan]]] = {}
        for run in runs:
            for plan in run.ledger.missing(run.request) if run.request is not None else ():
                entrant = run.entrant
                name = (id(entrant.job), entrant.candidate_key(plan), entrant.stop)
                wanted.setdefault(name, []).append((run, plan))
        missing: list[list[tuple[_Run, PruningPlan]]] = []
        for askers in wanted.values():
            run, plan = askers[0]
            earlier = run.entrant.known(plan)
            if earlier is None:
                missing.append(askers)
            else:
                _tell(askers, earlier)

        def collect(number: int, score: CandidateScore) -> None:
            run, plan = missing[number][0]
            run.entrant.on_score(plan, score)
            _tell(missing[number], score)

        tasks = [self._task(*askers[0]) for askers in missing]
        if tasks:
            score_all(tasks, self._runner, stage=stage, on_score=collect)

    def _task(self, run: _Run, plan: PruningPlan) -> ScoreTask:
        job = run.entrant.job
        if id(job) not in self._handles:
            self._handles[id(job)] = self._runner.share(job)
        return ScoreTask(handle=self._handles[id(job)], job=job, plan=plan, stop=run.entrant.stop)


def _tell(askers: Sequence[tuple[_Run, PruningPlan]], score: CandidateScore) -> None:
    for run, plan in askers:
        run.enter(plan, score)


def _stop_hopeless(runs: Sequence[_Run]) -> None:
    for arena in dict.fromkeys(run.entrant.arena for run in runs):
        rivals = [(number, run) for number, run in enumerate(runs) if run.entrant.arena == arena]
        leaders = [(run.entrant.size(best), number, run, best) for number, run in rivals if (best := run.best())]
        if not leaders:
            continue
        size, winner, leader, best = min(leaders, key=lambda entry: entry[:2])
        for number, run in rivals:
            if number == winner or run.request is None:
                continue
            larger = [candidate for candidate in run.ledger.tried if run.entrant.size(candidate) >= size]
            if any(is_clearly_worse(run.drops(entry), leader.drops(best), run.entrant.stop) for entry in larger):
                run.stop(winner)


def is_clearly_worse(drops: np.ndarray, best: np.ndarray, stop: StopRule) -> bool:
    """Whether one candidate loses more accuracy than another beyond doubt, image by image.

    Args:
        drops, best: estimated drops per validation image, of which the first j images are common.
        stop: its quantile counts twice, because many settings are looked at many times.
    """
    common = min(len(drops), len(best))
    if common < _MIN_IMAGES:
        return False
    mean, low, _ = stop.bounds(drops[:common] - best[:common])
    return mean - 2.0 * (mean - low) > 0.0
