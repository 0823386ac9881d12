"""Stages of a sweep: what settings share is computed once, and what is left forms one pool of work across them."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from entprune.assembly import slice_network
from entprune.candidates import CandidateJob, CandidateScore, score_candidate
from entprune.config import Budget, PruneConfig
from entprune.evaluation import measure_latency
from entprune.groups import ChannelGroup
from entprune.low_rank import new_pair
from entprune.path import PathSetting, SettingPath, SparsityPath, lower_envelope
from entprune.plan import PruningPlan
from entprune.race import Entrant, Finish, race
from entprune.runner import Work, torch_threads
from entprune.search import SearchResult
from entprune.selection import StopRule
from entprune.stages import group_problem, solve_pool
from entprune.storage import load_setting_path, save_setting_path
from tasks.progress import StageClock
from tasks.stages import (
    LATENCY_REPEATS,
    calibrate,
    candidate_job,
    keep_score,
    kept_latency,
    recall_score,
    reference_of,
)
from tasks.store import Store
from tasks.workload import Calibration, Engine, Inputs, Workload, decided, stage_task


@dataclass(frozen=True, kw_only=True, slots=True)
class SolveCounts:
    """What the settings of a sweep had in common.

    Attributes:
        asked: (group, continuation) pairs, counted for every setting that needs them.
        distinct: the same, each once.
        solved: those of them that no earlier run had stored.
        calibrations: distinct pairs of a network and calibration images.
    """

    asked: int
    distinct: int
    solved: int
    calibrations: int


# --- load and calibrate -----------------------------------------------------------------------------------------------


@stage_task("load")
def load(
    read: Callable[[], Sequence[Inputs]], wishes: Sequence[tuple[PruneConfig, Budget]], clock: StageClock
) -> list[Workload]:
    """Read and check the inputs of all settings, and lay out which images serve what; images are cut out once.

    Args:
        read: returns one entry per setting; settings of the same network share it.
        wishes: settings of the stages and budget, likewise.
        clock: of the run.
    """
    grounds: dict[tuple[int | float | None, ...], Workload] = {}
    works = []
    with clock.stage("load"):
        for inputs, (wish, budget) in zip(read(), wishes, strict=True):
            config = decided(wish, inputs)
            chosen = (config.calibration_samples, config.validation_samples, config.perturbed_share, config.seed)
            name = (id(inputs.network), *chosen)
            if name not in grounds:
                grounds[name] = Workload(inputs, config, budget)
            works.append(_vary(grounds[name], config, budget))
    return works


def _vary(work: Workload, config: PruneConfig, budget: Budget) -> Workload:
    """The same network and images under other settings."""
    other = copy.copy(work)
    other.config, other.budget = config, budget
    other.keys = dataclasses.replace(work.keys, config=config)
    return other


def recall_paths(works: Sequence[Workload], store: Store) -> dict[str, SettingPath]:
    """Continuations that earlier runs finished on the same inputs, by their key."""
    found: dict[str, SettingPath] = {}
    for key in dict.fromkeys(key for work in works for key, _, _ in _continuations(work)):
        path = store.fetch("paths", key, load_setting_path)
        if path is not None:
            found[key] = path
    return found


def _continuations(work: Workload) -> list[tuple[str, ChannelGroup, PathSetting]]:
    """Key, group and setting of everything that a setting's paths are made of."""
    return [
        (work.keys.path(group, setting), group, setting)
        for group in work.network.groups.groups
        for setting in work.config.settings
    ]


def calibration_key(work: Workload) -> str:
    """Settings with the same one share their statistics."""
    return work.keys.answers(work.network.refit_layers) + work.keys.moments(work.network.consumers())


def calibrate_all(
    works: Sequence[Workload], engine: Engine, known: Mapping[str, SettingPath]
) -> dict[str, Calibration]:
    """Statistics by their key, one data pass each; moments only where something is left to solve."""
    shared: dict[str, list[Workload]] = {}
    for work in works:
        shared.setdefault(calibration_key(work), []).append(work)
    return {
        key: calibrate(
            same[0],
            engine,
            needs_moments=any(name not in known for work in same for name, _, _ in _continuations(work)),
        )
        for key, same in shared.items()
    }


# --- solve ------------------------------------------------------------------------------------------------------------


@stage_task("solve")
def solve(
    works: Sequence[Workload], engine: Engine, calibrations: Mapping[str, Calibration], known: dict[str, SettingPath]
) -> tuple[list[dict[str, SparsityPath]], SolveCounts]:
    """Sparsity paths of all groups for each setting; (group, continuation) pairs of all settings form one pool.

    Each continuation is solved once for all settings that need it, and stored as soon as it is there.
    """
    names = [name for work in works for name, _, _ in _continuations(work)]
    wanted = _wanted(works, known)
    counts = SolveCounts(
        asked=len(names),
        distinct=len(set(names)),
        solved=sum(len(settings) for _, _, settings in wanted),
        calibrations=len(calibrations),
    )

    def keep(number: int, setting: PathSetting, path: SettingPath) -> None:
        work, group, _ = wanted[number]
        key = work.keys.path(group, setting)
        known[key] = path
        engine.store.keep("paths", key, partial(save_setting_path, path))

    with engine.clock.stage("solve"):
        requests = (
            (group_problem(work.network, group, calibrations[calibration_key(work)].statistics), settings)
            for work, group, settings in wanted
        )
        solve_pool(requests, engine.runner, device=works[0].config.device, on_result=keep)
        engine.clock.summarise(f"{counts.solved} continuations solved, {counts.asked} asked for")
        return [_envelopes(work, known) for work in works], counts


def _wanted(
    works: Sequence[Workload], known: Mapping[str, SettingPath]
) -> list[tuple[Workload, ChannelGroup, list[PathSetting]]]:
    """Groups with the continuations that are missing, each once across all settings."""
    entries: dict[tuple[str, int, str], tuple[Workload, ChannelGroup, list[PathSetting]]] = {}
    seen = set(known)
    for work in works:
        for key, group, setting in _continuations(work):
            if key not in seen:
                seen.add(key)
                problem = (calibration_key(work), id(work.network), group.name)
                entries.setdefault(problem, (work, group, []))[2].append(setting)
    return list(entries.values())


def _envelopes(work: Workload, known: Mapping[str, SettingPath]) -> dict[str, SparsityPath]:
    return {
        group.name: lower_envelope(
            group.name,
            len(group.consumers),
            [known[work.keys.path(group, setting)] for setting in work.config.settings],
        )
        for group in work.network.groups.groups
    }


# --- search -----------------------------------------------------------------------------------------------------------


@stage_task("search")
def search(
    works: Sequence[Workload],
    engine: Engine,
    calibrations: Mapping[str, Calibration],
    paths: Sequence[dict[str, SparsityPath]],
    *,
    stop_early: bool,
) -> tuple[list[Entrant], list[Finish]]:
    """The smallest network within each setting's budget; candidates of all settings form one pool per round."""
    with engine.clock.stage("search"):
        jobs: dict[str, CandidateJob] = {}
        entrants = [
            _entrant(work, engine, calibrations[calibration_key(work)], path, jobs)
            for work, path in zip(works, paths, strict=True)
        ]
        finishes = race(entrants, engine.runner, stop_early=stop_early)
        tried = sum(len(finish.candidates) for finish in finishes)
        stopped = sum(finish.stopped_by is not None for finish in finishes)
        engine.clock.summarise(f"{tried} networks tried, {stopped} settings stopped early")
        return entrants, finishes


def _entrant(
    work: Workload,
    engine: Engine,
    calibration: Calibration,
    paths: dict[str, SparsityPath],
    jobs: dict[str, CandidateJob],
) -> Entrant:
    """A setting's search; what its candidate units read is shared with settings of the same images and refit."""
    config, keys = work.config, work.keys
    scored = f"{keys.validation} {config.drop_estimate} {config.scoring_precision}"
    shared = f"{calibration_key(work)} {config.refit()} {scored}"
    if shared not in jobs:
        jobs[shared] = candidate_job(work, calibration.statistics, reference_of(work, engine))
    stop = StopRule(max_drop=work.budget.max_accuracy_drop, quantile=config.quantile)
    job = dataclasses.replace(jobs[shared], stop=stop)
    return Entrant(
        paths=paths,
        cost=work.network.cost,
        budget=work.budget,
        config=config,
        job=jobs[shared],
        stop=stop,
        arena=f"{keys.network} {work.budget.to_dict()} {config.objective} {scored}",
        candidate_key=keys.candidate,
        known=lambda plan: recall_score(job, engine.store, keys.candidate(plan)),
        on_score=lambda plan, score: keep_score(engine.store, keys.candidate(plan), score),
        kept_latency=partial(kept_latency, work, engine),
    )


def dense_accuracy(entrant: Entrant) -> float:
    """Percent of the validation images that the dense network classifies correctly; NaN without any."""
    reference = entrant.job.reference
    return math.nan if reference is None else reference.accuracy()


@stage_task("assemble")
def assemble_chosen(entrant: Entrant, finish: Finish, engine: Engine) -> SearchResult:
    """The chosen setting's search with the weights of its network, which the race did not hold on to."""
    with engine.clock.stage("assemble"):
        engine.store.flush()
        score = entrant.known(finish.chosen.plan) or _score_again(entrant, finish.chosen.plan, engine)
        return SearchResult(
            candidates=finish.candidates, chosen=finish.chosen, state=score.state, budget_met=finish.budget_met
        )


def _score_again(entrant: Entrant, plan: PruningPlan, engine: Engine) -> CandidateScore:
    handle = engine.runner.share(dataclasses.replace(entrant.job, stop=entrant.stop))
    try:
        (score,) = engine.runner.run(score_candidate, [Work(shared=handle, item=plan)], stage="assemble")
    finally:
        engine.runner.release(handle)
    return score


# --- measure ----------------------------------------------------------------------------------------------------------


@stage_task("time")
def measure_latencies(
    works: Sequence[Workload], engine: Engine, plans: Sequence[PruningPlan]
) -> list[dict[str, float]]:
    """Milliseconds of each setting's network; widths and ranks alone matter, so equal ones are measured once."""
    found: dict[tuple[str, tuple[int, ...], tuple[tuple[str, int], ...]], dict[str, float]] = {}
    latencies = []
    with engine.clock.stage("time"):
        engine.runner.settle()
        for work, plan in zip(works, plans, strict=True):
            name = (work.keys.network, tuple(plan.widths().values()), plan.ranks)
            if name not in found:
                smaller = slice_network(work.network.model, work.network.groups, plan)
                for layer, rank in plan.ranks:
                    new_pair(smaller, layer, rank)
                with torch_threads(work.config.threads):
                    found[name] = measure_latency(smaller, work.network.input_shape, repeats=LATENCY_REPEATS)
            latencies.append(found[name])
    return latencies
