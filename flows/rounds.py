"""Pruning and tuning in turns: the stages of one round, and the rounds of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from entprune.config import Budget
from entprune.finetune import FinetuneConfig
from entprune.low_rank import merge_layers
from entprune.path import SparsityPath
from entprune.plan import PruningPlan, compose_plans
from entprune.pruning import build_smaller
from entprune.rounds import RoundRecord, check_reachable, choose_round, is_exhausted, round_budget, round_start
from entprune.search import SearchResult
from tasks import stages
from tasks.tuning import finetune
from tasks.workload import Engine, Workload


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Pruned:
    """One network pruned once.

    Attributes:
        paths: sparsity path of each group.
        found: what the search tried and chose.
        validation_accuracy: of the dense network, percent.
        model: the smaller network before any gradient step.
    """

    paths: Mapping[str, SparsityPath]
    found: SearchResult
    validation_accuracy: float
    model: nn.Module


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rounds:
    """What came of all rounds.

    Attributes:
        first: round 1 before its tuning.
        plan: of the result, against the dense network.
        tuned: the result.
        records: of every round that was carried out.
        chosen: of the round that the result is from.
    """

    first: Pruned
    plan: PruningPlan
    tuned: nn.Module
    records: tuple[RoundRecord, ...]
    chosen: RoundRecord


def prune_once(work: Workload, engine: Engine, *, origin: Workload | None = None) -> Pruned:
    """Calibrate, solve and search a network; in a later round accuracy refers to the origin's dense network."""
    known = stages.recall_paths(work, engine.store)
    is_solved = len(known) == len(work.network.groups.groups) * len(work.config.settings)
    calibration = stages.calibrate(work, engine, needs_moments=not is_solved)
    paths = stages.solve(work, engine, calibration, known)
    calibration.drop_moments(work.network)
    found, validation_accuracy = stages.search(work, engine, calibration, paths, origin=origin)
    return Pruned(
        paths=paths, found=found, validation_accuracy=validation_accuracy, model=build_smaller(work.network, found)
    )


def prune_in_rounds(work: Workload, engine: Engine, finetuning: FinetuneConfig, num_rounds: int) -> Rounds:
    """Prune and tune in turns for as long as the tuned network is within the accuracy budget.

    Raises:
        ConfigError: a size budget is out of reach.
    """
    check_reachable(work.network, work.budget, work.config)
    pruned: list[Pruned] = []
    tuned: list[nn.Module] = []
    records: list[RoundRecord] = []
    for number in range(1, num_rounds + 1):
        if records and (not records[-1].is_accurate or is_exhausted(work.network, records[-1].plan, work.config)):
            break
        budget = _next_budget(work, engine, records, num_rounds)
        start = merge_layers(tuned[-1], dict(records[-1].plan.ranks)) if records else work.network.model
        pruned.append(prune_once(work.start_round(start, budget), engine, origin=work))
        plan = pruned[-1].found.chosen.plan
        plan = compose_plans(records[-1].plan, plan) if records else plan
        tuned.append(finetune(work, engine, pruned[-1].model, finetuning, num_rounds=num_rounds))
        tried = len(pruned[-1].found.candidates)
        records.append(
            stages.validate(work, engine, tuned[-1], plan, number=number, num_rounds=num_rounds, networks_tried=tried)
        )
    position = choose_round(records, work.config.objective)
    chosen = records[position]
    return Rounds(first=pruned[0], plan=chosen.plan, tuned=tuned[position], records=tuple(records), chosen=chosen)


def _next_budget(work: Workload, engine: Engine, records: Sequence[RoundRecord], num_rounds: int) -> Budget:
    """What the next round is asked."""
    if not records:
        return round_budget(work.budget, 1, num_rounds, {"parameters": 1.0, "macs": 1.0})
    start, kept = round_start(work.network, records[-1].plan)
    latency = 1.0 if work.budget.latency_removed is None else stages.kept_latency(work, engine, start)
    return round_budget(work.budget, len(records) + 1, num_rounds, kept, latency)
