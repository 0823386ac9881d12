"""Candidates in one piece or in several: the same scores bit by bit, and idle workers get something to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from entprune import Budget, PruneConfig, scoring
from entprune.candidates import CandidateJob, CandidateScore
from entprune.datasets import ArraySplit
from entprune.models import build_model
from entprune.plan import GroupPlan, PruningPlan
from entprune.pruning import candidate_job
from entprune.runner import InProcessRunner
from entprune.scoring import ScoreTask, can_be_cut, score_all
from entprune.selection import StopRule
from entprune.stages import ImageSet, analyse, calibrate

SHAPE = (1, 8, 8)
NUM_IMAGES = 330  # no whole number of batches


def images(count: int, seed: int) -> ImageSet:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 255, (count, *SHAPE), dtype=np.uint8)
    labels = generator.integers(0, 10, count)
    return ImageSet(split=ArraySplit(images=pixels, labels=labels, mean=(0.5,), std=(0.3,)), indices=np.arange(count))


@pytest.fixture(scope="module")
def job() -> CandidateJob:
    config = PruneConfig(calibration_samples=96, batch_size=32, min_rows=400)
    network = analyse(build_model("digits_cnn", num_classes=10, input_shape=SHAPE, seed=1), SHAPE, config)
    calibration, runner = images(96, 0), InProcessRunner()
    statistics = calibrate(network, calibration, config, runner)
    budget = Budget(max_accuracy_drop=1.0)
    return candidate_job(network, calibration, statistics, images(NUM_IMAGES, 1), budget, config, runner)


@pytest.fixture
def everything_is_much_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_MUCH_WORK", 0.0)


class Watched(InProcessRunner):
    """Notes how many units each stage had, and what is still shared."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers=workers)
        self.pools: list[tuple[str, int]] = []
        self.shared = 0

    def share(self, value: Any) -> Any:
        self.shared += 1
        return super().share(value)

    def release(self, handle: Any) -> None:
        self.shared -= 1

    def run(self, unit: Any, work: Any, *, stage: str, **options: Any) -> list[Any]:
        self.pools.append((stage, len(work)))
        return super().run(unit, work, stage=stage, **options)


def tasks_of(job: CandidateJob, stop: StopRule, *fractions: float) -> list[ScoreTask]:
    plans = [
        PruningPlan(
            groups=tuple(
                GroupPlan(
                    name=group.name,
                    num_channels=group.num_channels,
                    kept_channels=tuple(range(max(1, int(fraction * group.num_channels)))),
                )
                for group in job.network.groups.groups
            )
        )
        for fraction in fractions
    ]
    return [ScoreTask(handle=job, job=job, plan=plan, stop=stop) for plan in plans]


def scores_of(tasks: list[ScoreTask], runner: InProcessRunner) -> list[CandidateScore]:
    found: dict[int, CandidateScore] = {}
    score_all(tasks, runner, stage="search", on_score=found.__setitem__)
    return [found[number] for number in range(len(tasks))]


@pytest.mark.usefixtures("everything_is_much_work")
@pytest.mark.parametrize("max_drop", [None, 0.5, 40.0, 99.0])
@pytest.mark.parametrize("workers", [4, 9, 40])
def test_pieces_give_the_bits_of_the_whole(job: CandidateJob, max_drop: float | None, workers: int) -> None:
    tasks = tasks_of(job, StopRule(max_drop=max_drop, quantile=1.6, chunk=64), 0.3, 0.8)
    whole, cut = Watched(1), Watched(workers)
    for expected, score in zip(scores_of(tasks, whole), scores_of(tasks, cut), strict=True):
        np.testing.assert_array_equal(score.predicted, expected.predicted)
        assert score.state.keys() == expected.state.keys()
        for name, value in expected.state.items():
            np.testing.assert_array_equal(score.state[name], value)
    assert whole.pools == [("search", 2)]
    assert cut.pools[0] == ("search", 2)
    assert cut.pools[1][0] == "search, validation"
    assert cut.shared == 0


@pytest.mark.usefixtures("everything_is_much_work")
def test_free_workers_look_ahead_and_what_is_not_needed_is_dropped(job: CandidateJob) -> None:
    (task,) = tasks_of(job, StopRule(max_drop=99.0, quantile=1.6, chunk=64), 0.5)
    runner = Watched(40)
    (score,) = scores_of([task], runner)
    assert runner.pools == [("search", 1), ("search, validation", 6)]  # all batches at once
    assert len(score.predicted) == 64  # decided at the first look


def test_what_is_little_work_or_has_no_free_workers_stays_in_one_piece(
    job: CandidateJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tasks_of(job, StopRule(max_drop=1.0, quantile=1.6, chunk=64), 0.3, 0.8)
    assert not can_be_cut(tasks, 100)
    monkeypatch.setattr(scoring, "_MUCH_WORK", 0.0)
    assert can_be_cut(tasks, 4)
    assert not can_be_cut(tasks, 3)
    assert not can_be_cut([replace(task, stop=replace(task.stop, chunk=100)) for task in tasks], 100)
    assert not can_be_cut([replace(task, job=replace(job, validation=None, reference=None)) for task in tasks], 100)
    assert not can_be_cut([], 100)
