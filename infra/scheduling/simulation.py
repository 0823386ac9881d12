"""A run's units on any number of workers, played through event by event with the order of the product's pool.

A run is a sequence of stages with a barrier after each: first what the command itself does while the workers wait, then
a pool of units. An idle worker takes the first unit in the order of :func:`entprune.runner.largest_first`, which knows
estimates of the costs alone; the simulated seconds are the measured ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from entprune.runner import Work, largest_first


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One unit.

    Attributes:
        seconds: that it takes.
        cost: the estimate by which units are ordered.
        least_seconds: of the smallest piece that it could be cut into without another result.
    """

    seconds: float
    cost: float = 1.0
    least_seconds: float | None = None

    @property
    def piece(self) -> float:
        """Seconds of that smallest piece; of the whole where it cannot be cut."""
        return self.seconds if self.least_seconds is None else self.least_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What is done before the next stage may begin.

    Attributes:
        name: of the stage.
        jobs: its pool of units.
        before_seconds, after_seconds: of the command itself, before the first unit starts and after the last one ends.
    """

    name: str
    jobs: tuple[Job, ...] = ()
    before_seconds: float = 0.0
    after_seconds: float = 0.0

    @property
    def work(self) -> float:
        """Seconds of all units."""
        return sum(job.seconds for job in self.jobs)

    @property
    def serial(self) -> float:
        """Seconds of the command itself."""
        return self.before_seconds + self.after_seconds

    @property
    def longest(self) -> float:
        """Seconds of the longest unit."""
        return max((job.seconds for job in self.jobs), default=0.0)


def pool_seconds(jobs: Sequence[Job], workers: int, *, hand_out_seconds: float = 0.0) -> float:
    """When the last unit of a pool ends, all workers being idle at first.

    Args:
        jobs: the units.
        workers: how many.
        hand_out_seconds: that the command takes for each unit, one after the other.
    """
    order = largest_first([Work(shared=None, item=job, cost=job.cost) for job in jobs])
    idle = [0.0] * min(workers, len(jobs))  # when each worker is free, as a heap
    command = end = 0.0
    for number in order:
        start = max(heapq.heappop(idle), command)
        command = start + hand_out_seconds
        finish = command + jobs[number].seconds
        end = max(end, finish)
        heapq.heappush(idle, finish)
    return end


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOutcome:
    """How one stage went; the parts add up to its seconds.

    Attributes:
        name: of the stage.
        seconds: all of it.
        work: seconds of its units, shared evenly by all workers.
        largest_unit: beyond that, while fewer workers than there are have something to do because units are large.
        order: beyond both: what the order costs, and handing out.
        serial: of the command itself.
    """

    name: str
    seconds: float
    work: float
    largest_unit: float
    order: float
    serial: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a run went.

    Attributes:
        workers: how many.
        makespan: seconds from start to end.
        bound: seconds that no schedule can beat: the work shared evenly by all workers, or the chain of what has to
            follow each other, whichever is longer.
        chain: that chain: of each stage the command's own seconds and the longest piece that cannot be cut.
        busy: fraction of the workers' time that is spent on units.
        stages: each of them.
    """

    workers: int
    makespan: float
    bound: float
    chain: float
    busy: float
    stages: tuple[StageOutcome, ...]

    @property
    def share_of_bound(self) -> float:
        """Bound over makespan: 1 is optimal."""
        return self.bound / self.makespan

    def losses(self) -> dict[str, float]:
        """Seconds beyond evenly shared work, by cause and stage, the largest first."""
        found: dict[str, float] = {}
        for stage in self.stages:
            for cause in ("largest_unit", "order", "serial"):
                name = f"{cause.replace('_', ' ')} of {stage.name}"
                found[name] = found.get(name, 0.0) + getattr(stage, cause)
        return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def simulate(stages: Sequence[Stage], workers: int, *, hand_out_seconds: float = 0.0) -> Outcome:
    """Play a run through."""
    outcomes = tuple(_play(stage, workers, hand_out_seconds) for stage in stages)
    makespan, work = sum(entry.seconds for entry in outcomes), sum(stage.work for stage in stages)
    chain = sum(stage.serial + max((job.piece for job in stage.jobs), default=0.0) for stage in stages)
    return Outcome(
        workers=workers,
        makespan=makespan,
        bound=max(work / workers, chain),
        chain=chain,
        busy=work / (workers * makespan),
        stages=outcomes,
    )


def _play(stage: Stage, workers: int, hand_out_seconds: float) -> StageOutcome:
    seconds = pool_seconds(stage.jobs, workers, hand_out_seconds=hand_out_seconds)
    even = stage.work / workers
    largest = max(0.0, stage.longest - even)
    return StageOutcome(
        name=stage.name,
        seconds=stage.serial + seconds,
        work=even,
        largest_unit=largest,
        order=seconds - even - largest,
        serial=stage.serial,
    )
