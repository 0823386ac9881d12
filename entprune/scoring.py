"""Scores of the candidates of one round: each as one unit, or in pieces where workers would have nothing to do.

A candidate's assembly is one piece of work, for each layer is refit on what the layers before it made of the images.
Its validation is not: batches of images are independent. Where there are at least twice as many workers as candidates,
and validation is much work, the assembled networks are validated batch by batch on all workers. What comes out is the
same, bit by bit: same batches, same order, same stop rule.

Axes: j validation images that were scored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from entprune.assembly import slice_network
from entprune.candidates import CandidateJob, CandidateScore, classify, score_candidate
from entprune.checkpoints import load_plain_state
from entprune.evaluation import placed
from entprune.plan import PruningPlan
from entprune.predictions import EVALUATION_BATCH
from entprune.runner import Runner, Work
from entprune.selection import StopRule
from entprune.stages import shards

_MUCH_WORK = 1e12  # multiply-accumulates of one candidate's validation: less is not worth sending the network around
UNITS_PER_WORKER = 4  # several, so that no worker waits long for the last one


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ScoreTask:
    """One candidate to score.

    Attributes:
        handle: of the job, shared with the workers.
        job: what the unit reads.
        plan: kept channels.
        stop: in place of the job's rule.
    """

    handle: Any
    job: CandidateJob
    plan: PruningPlan
    stop: StopRule

    def validation_macs(self) -> float:
        """Multiply-accumulates of all validation images."""
        return float(self.job.network.cost.macs(self.plan.widths())) * len(self.job.validation or ())


def score_all(
    tasks: Sequence[ScoreTask], runner: Runner, *, stage: str, on_score: Callable[[int, CandidateScore], None]
) -> None:
    """Score candidates side by side.

    Args:
        tasks: the candidates.
        runner: runs the units.
        stage: name for progress and errors.
        on_score: called with (number of the task, score) as scores come in.
    """
    work = [Work(shared=task.handle, item=(task.plan, task.stop)) for task in tasks]
    if not can_be_cut(tasks, runner.workers):
        runner.run(score_plan, work, stage=stage, on_result=on_score, keep=False)
        return
    runs: dict[int, _Validation] = {}

    def begin(number: int, score: CandidateScore) -> None:
        runs[number] = _Validation(tasks[number], score, runner)

    try:
        runner.run(assemble_plan, work, stage=stage, on_result=begin, keep=False)
        while active := [number for number in sorted(runs) if not runs[number].is_done]:
            _validate([runs[number] for number in active], runner, f"{stage}, validation")
        for number, run in sorted(runs.items()):
            on_score(number, run.score())
    finally:
        for run in runs.values():
            run.close()


def can_be_cut(tasks: Sequence[ScoreTask], workers: int) -> bool:
    """Whether assembly and validation are worth being done apart."""
    return workers >= 2 * len(tasks) > 0 and all(
        task.validation_macs() >= _MUCH_WORK
        and task.job.reference is not None
        and task.stop.chunk % EVALUATION_BATCH == 0
        for task in tasks
    )


def score_plan(job: CandidateJob, item: tuple[PruningPlan, StopRule]) -> CandidateScore:
    """Unit: score one plan; settings of the same images share the job but not the budget."""
    plan, stop = item
    return score_candidate(replace(job, stop=stop), plan)


def assemble_plan(job: CandidateJob, item: tuple[PruningPlan, StopRule]) -> CandidateScore:
    """Unit: assemble one plan and predict nothing."""
    return score_candidate(replace(job, validation=None), item[0])


def images_ahead(left: int, workers: int, chunk: int) -> int:
    """Images of one candidate that so many workers predict before the next look, a multiple of the chunk or all."""
    return min(max(1, workers * EVALUATION_BATCH // chunk) * chunk, left)


def validate_range(shared: tuple[CandidateJob, nn.Module], part: tuple[int, int]) -> np.ndarray:
    """Unit: (n,) classes that an assembled network chooses for a range of the validation images."""
    job, model = shared
    with placed(copy.deepcopy(model), job.device, job.precision) as network:
        return classify(job, network, part)


class _Validation:
    """One assembled candidate on its way through the validation images."""

    def __init__(self, task: ScoreTask, score: CandidateScore, runner: Runner) -> None:
        job = task.job
        if job.validation is None or job.reference is None:
            raise ValueError("expected validation images to score on, got none; score the plan as one unit.")
        self._stop, self._reference, self._count, self._runner = task.stop, job.reference, len(job.validation), runner
        self._state, self.predicted = score.state, np.zeros(0, dtype=np.int64)
        self._model = runner.share(_rebuild(job, task.plan, score))
        self.shared = (task.handle, self._model)  # the images are on the workers' nodes already, with the job
        self.is_done = self._count == 0

    def ranges(self, workers: int) -> list[tuple[int, int]]:
        """The next images for so many workers: at least those up to the next look, more where workers are free."""
        start = len(self.predicted)
        count = images_ahead(self._count - start, workers, self._stop.chunk)
        units = workers * UNITS_PER_WORKER
        return [(start + first, start + last) for first, last in shards(count, units, EVALUATION_BATCH)]

    def add(self, classes: np.ndarray) -> None:
        """Add the classes of the next images; what lies behind the first decided look is not kept."""
        present = np.concatenate([self.predicted, classes])
        for look in range(len(self.predicted) + self._stop.chunk, len(present) + self._stop.chunk, self._stop.chunk):
            self.predicted = present[:look]
            if len(self.predicted) == self._count or self._stop.is_decided(self._reference.drops(self.predicted)):
                self.is_done = True
                return

    def score(self) -> CandidateScore:
        """State and predictions."""
        return CandidateScore(state=self._state, predicted=self.predicted)

    def close(self) -> None:
        """Let the workers forget the network."""
        self._runner.release(self._model)


def _validate(runs: Sequence[_Validation], runner: Runner, stage: str) -> None:
    """Predict the next images of all candidates as one pool of work."""
    parts = [run.ranges(-(-runner.workers // len(runs))) for run in runs]
    work = [
        Work(shared=run.shared, item=part, cost=part[1] - part[0])
        for run, ranges in zip(runs, parts, strict=True)
        for part in ranges
    ]
    classes = iter(runner.run(validate_range, work, stage=stage))
    for run, ranges in zip(runs, parts, strict=True):
        run.add(np.concatenate([next(classes) for _ in ranges]))


def _rebuild(job: CandidateJob, plan: PruningPlan, score: CandidateScore) -> nn.Module:
    smaller = slice_network(job.network.model, job.network.groups, plan)
    load_plain_state(smaller, {name: torch.from_numpy(np.array(value)) for name, value in score.state.items()})
    return smaller.eval()
