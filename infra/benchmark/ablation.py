"""Part `ablation`: what each default is worth: one change at a time, at a fixed size, before any gradient step.

Statistics are collected once per network and seed and each setting of the paths is solved once; every variant then
allocates, assembles and is measured at the same budgets. Only the variant that does without the correction of residuals
needs statistics of its own, and comes last. Times are processor seconds: other work on the machine does not enter.

Axes: n images, k classes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from entprune.allocation import Objective, allocate
from entprune.assembly import slice_network
from entprune.candidates import score_candidate
from entprune.checkpoints import load_plain_state
from entprune.config import Budget, PruneConfig
from entprune.errors import ConfigError
from entprune.path import PathSetting, SettingPath, SparsityPath
from entprune.plan import PruningPlan
from entprune.planning import allocation_problem, plan_for_widths
from entprune.predictions import dense_reference, predict
from entprune.runner import InProcessRunner
from entprune.selection import NO_CLASS
from entprune.stages import SolveKey, group_problem, solve
from infra.benchmark.contest import budget_label
from infra.benchmark.networks import Bench
from infra.benchmark.outcomes import pack_outcomes
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject
from infra.benchmark.swaps import swap
from infra.benchmark.trials import Divergence, fisher_paths, fisher_weights, probe_images, probed_losses

BUDGETS: dict[str, tuple[Budget, ...]] = {
    "lenet": (Budget(parameters_removed=0.94), Budget(parameters_removed=0.96)),
    "vgg16_cifar": (Budget(parameters_removed=0.89),),
    "resnet18_cifar": (Budget(parameters_removed=0.8),),
    "resnet56_cifar": (Budget(macs_removed=0.45),),
}
WITH_RESIDUALS = ("resnet18_cifar", "resnet56_cifar")
_SECONDS_BETWEEN_LINES = 20.0

Trial = Literal["swaps", "fisher", "probes"]
Losses = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One change of the defaults.

    Attributes:
        name: of its row.
        family: what is changed.
        changes: settings that differ from the defaults.
        is_refit: without it the chosen channels are cut out and nothing else is done.
        trial: what is done beside the method (:mod:`infra.benchmark.trials`, :mod:`infra.benchmark.swaps`).
    """

    name: str
    family: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    is_refit: bool = True
    trial: Trial | None = None

    def config(self, defaults: PruneConfig) -> PruneConfig:
        """Settings of the variant."""
        return replace(defaults, **self.changes)

    def described(self) -> dict[str, Any]:
        """The changes as plain values for JSON."""
        settings = self.changes.get("settings", ())
        plain = {"settings": [setting.to_dict() for setting in settings]} if settings else {}
        steps = ({} if self.is_refit else {"refit": False}) | ({} if self.trial is None else {"trial": self.trial})
        return {**self.changes, **plain, **steps}


def _alone(name: str, family: str, **changes: Any) -> Variant:
    """One setting of the paths and no envelope."""
    return Variant(name=name, family=family, changes={"settings": (PathSetting(**changes),)})


def _changed(name: str, family: str, **changes: Any) -> Variant:
    return Variant(name=name, family=family, changes=changes)


_SETS, _SCHEDULE, _ALLOCATION, _REFIT = "sets of channels", "schedule", "allocation", "refit"
VARIANTS: tuple[Variant, ...] = (
    Variant(name="default", family="nothing"),
    _alone("entropy -1", _SETS, entropy_weight=-1.0),
    _alone("entropy 0", _SETS, entropy_weight=0.0),
    _alone("entropy +1", _SETS, entropy_weight=1.0),
    _alone("entropy +3", _SETS, entropy_weight=3.0),
    _alone("elimination alone", _SETS, method="elimination"),
    Variant(name="swaps after the envelope", family=_SETS, trial="swaps"),
    Variant(name="Fisher weights of outputs", family=_SETS, trial="fisher"),
    _alone("growth 1.5", _SCHEDULE, entropy_weight=1.0, l2_growth=1.5),
    _alone("growth 4", _SCHEDULE, entropy_weight=1.0, l2_growth=4.0),
    _alone("drop threshold 0.1", _SCHEDULE, entropy_weight=1.0, drop_threshold=0.1),
    _changed("loss exponent 0.7", _ALLOCATION, loss_exponent=0.7),
    _changed("loss exponent 1.4", _ALLOCATION, loss_exponent=1.4),
    Variant(name="KL of each group, probed", family=_ALLOCATION, trial="probes"),
    _changed("rectified_steps 0", _REFIT, rectified_steps=0),
    _changed("output_temperature 0", _REFIT, output_temperature=0.0),
    _changed("no BatchNorm re-estimation", _REFIT, reestimate_batchnorm=False),
    _changed("no residual correction", _REFIT, correct_residuals=False),
    Variant(name="no refit at all", family=_REFIT, is_refit=False),
)
_BY_NAME = {variant.name: variant for variant in VARIANTS}


def variants_for(network: str) -> list[Variant]:
    """Variants in the order in which they are measured: cheap ones first, other statistics last."""
    late = ("entropy -1", "no residual correction")
    ordered = sorted(VARIANTS, key=lambda variant: late.index(variant.name) + 1 if variant.name in late else 0)
    return [variant for variant in ordered if variant.name != "no residual correction" or network in WITH_RESIDUALS]


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """All budgets of one variant, then the next variant.

    Raises:
        ConfigError: the network has no such budget.
    """
    labels = [budget_label(budget) for budget in BUDGETS[request.network]]
    if request.budget not in {"", *labels}:
        raise ConfigError(f"budget: expected one of {', '.join(labels)}, got {request.budget!r}.")
    wanted = [label for label in labels if request.budget in {"", label}]
    subject = Subject(part="ablation", network=request.network, seed=request.seed)
    variants = variants_for(request.network)
    return [(subject, {"variant": variant.name, "budget": label}) for variant in variants for label in wanted]


class SolvedPaths:
    """Paths of one network at any settings, each setting solved once and timed alone, in processor seconds.

    Args:
        bench: with the statistics that the regressions read.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._known: dict[SolveKey, SettingPath] = {}
        self._seconds: dict[PathSetting, float] = {}
        self._label, self._printed = "", 0.0
        self._runner = InProcessRunner(threads=bench.config.threads, progress=self._show)

    def paths(self, config: PruneConfig) -> dict[str, SparsityPath]:
        """Envelope over the settings of `config`."""
        network, statistics = self.bench.network, self.bench.statistics
        for setting in config.settings:
            if setting in self._seconds:
                continue
            start, self._printed = time.process_time(), time.perf_counter()
            self._label = setting.label()
            alone = replace(config, settings=(setting,))
            solve(network, statistics, alone, self._runner, known=self._known, on_result=self._known.__setitem__)
            self._seconds[setting] = time.process_time() - start
        return solve(network, statistics, config, self._runner, known=self._known)

    def seconds(self, config: PruneConfig) -> float:
        """Sum over the settings of `config`, after :meth:`paths`."""
        return sum(self._seconds[setting] for setting in config.settings)

    def _show(self, stage: str, done: int, count: int) -> None:
        if time.perf_counter() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = time.perf_counter()
            print(f"  {stage}, {self._label}: {done} of {count} groups", flush=True)


class AblationMeter:
    """Measures the variants on one network and seed."""

    def __init__(self, request: Request) -> None:
        self._bench = request.bench()
        self._solved = SolvedPaths(self._bench)
        self._runner = InProcessRunner(threads=self._bench.config.threads)
        self._dense: dict[str, Any] | None = None
        self._dense_logits: np.ndarray | None = None
        self._trials: dict[str, tuple[Mapping[str, SparsityPath], Losses | None, float]] = {}

    def facts(self, record: Record) -> Mapping[str, Any]:
        """Hashes of the inputs, numbers of images, and figures of the unpruned network."""
        bench = self._bench
        if self._dense is None:
            self._dense = record.content["facts"].get("dense")
        if self._dense is None:
            full = {group.name: group.num_channels for group in bench.network.groups.groups}
            self._dense = {"accuracy": bench.accuracy(bench.network.model), **self._size(full)}
        return bench.facts | {
            "calibration_samples": len(bench.calibration),
            "validation_samples": len(bench.validation),
            "test_samples": len(bench.test),
            "dense": self._dense,
        }

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Solve, allocate, assemble, and compare with the dense network on validation and test images."""
        variant = _BY_NAME[key["variant"]]
        config = variant.config(self._bench.config)
        solved = self._solved_for(config)
        objective, kept = _target(key["budget"])
        _ = solved.bench.job  # so that its seconds are not those of anything else
        paths, losses, seconds = self._paths(variant, config, solved)
        problem = allocation_problem(paths, solved.bench.network.cost, config, objective)
        widths = allocate(problem if losses is None else replace(problem, losses=losses), kept)
        plan, exchanges = plan_for_widths(paths, widths), None
        if variant.trial == "swaps":
            start = time.process_time()
            plan, exchanges = swapped_plan(solved.bench, plan)
            seconds += time.process_time() - start
        start = time.process_time()
        model = build(solved.bench, plan, config, is_refit=variant.is_refit)
        assembly_seconds = time.process_time() - start
        outcomes = self._bench.outcomes(model)
        return {
            **self._validate(model),
            "accuracy": 100.0 * float(outcomes.mean()),
            "wrong": pack_outcomes(~outcomes),
            "solve_seconds": round(seconds, 3),
            "assembly_seconds": round(assembly_seconds, 3) if variant.is_refit else None,
            **self._size(widths),
            "widths": list(widths.values()),
            "plan_sha256": plan.digest(),
            "changes": variant.described(),
            **({} if exchanges is None else {"exchanges": exchanges}),
        }

    def _paths(
        self, variant: Variant, config: PruneConfig, solved: SolvedPaths
    ) -> tuple[Mapping[str, SparsityPath], Losses | None, float]:
        """Paths, predicted losses where they are not those of the paths, and the seconds that both took."""
        trial = variant.trial
        if trial not in ("fisher", "probes"):
            return solved.paths(config), None, solved.seconds(config)
        if trial not in self._trials:
            paths = None if trial == "fisher" else solved.paths(config)
            start = time.process_time()
            if paths is None:
                found, losses, earlier = fisher_paths(solved.bench, config, fisher_weights(solved.bench)), None, 0.0
            else:
                losses = probed_losses(paths, self._divergence(solved.bench, config))
                found, earlier = paths, solved.seconds(config)
            self._trials[trial] = found, losses, earlier + time.process_time() - start
        return self._trials[trial]

    def _divergence(self, bench: Bench, config: PruneConfig) -> Divergence:
        """Of a plan's refit network from the dense one, on images of its own."""
        images = probe_images(bench)
        dense = predict(bench.network.model, images, config, self._runner, stage="probe dense")

        def measure(plan: PruningPlan) -> float:
            model = build(bench, plan, config, is_refit=True)
            found = divergence(dense, predict(model, images, config, self._runner, stage="probe"))
            return math.inf if found is None else found

        return measure

    def _solved_for(self, config: PruneConfig) -> SolvedPaths:
        """Those with the statistics of `config`; only one set of them is held at a time."""
        if config.correct_residuals != self._solved.bench.config.correct_residuals:
            bench = self._bench
            changed = replace(bench.config, correct_residuals=config.correct_residuals)
            other = Bench(bench.entry, bench.model, bench.data, changed, bench.facts["checkpoint_sha256"])
            self._solved = SolvedPaths(other)
        return self._solved

    def _validate(self, model: nn.Module) -> dict[str, float | None]:
        """Divergence from the dense network and estimated drop in points, on the validation images."""
        bench = self._bench
        images, config = bench.validation, bench.config
        if self._dense_logits is None:
            self._dense_logits = predict(bench.network.model, images, config, self._runner, stage="validate dense")
        logits = predict(model, images, config, self._runner, stage="validate")
        reference = dense_reference(self._dense_logits, images, config)
        predicted = np.where(np.isfinite(logits).all(1), logits.argmax(1), NO_CLASS)
        drop = float(reference.drops(predicted, "posterior").mean())
        return {"kl": divergence(self._dense_logits, logits), "validation_drop": drop}

    def _size(self, widths: Mapping[str, int]) -> dict[str, int]:
        cost = self._bench.network.cost
        return {"parameters": cost.parameters(widths), "macs": cost.macs(widths)}


def _target(label: str) -> tuple[Objective, float]:
    """What a budget counts and the fraction of it that is kept, from "parameters_removed-0.94"."""
    kind, _, value = label.partition("-")
    return ("parameters" if kind == "parameters_removed" else "macs"), 1.0 - float(value)


def swapped_plan(bench: Bench, plan: PruningPlan) -> tuple[PruningPlan, dict[str, int]]:
    """The plan with each group's set refined by exchanges, and how many there were."""
    groups, exchanges = [], {}
    for group, entry in zip(bench.network.groups.groups, plan.groups, strict=True):
        kept, exchanges[entry.name] = swap(group_problem(bench.network, group, bench.statistics), entry.kept_channels)
        groups.append(replace(entry, kept_channels=kept))
    return PruningPlan(groups=tuple(groups)), exchanges


def build(bench: Bench, plan: PruningPlan, config: PruneConfig, *, is_refit: bool) -> nn.Module:
    """The smaller network: assembled with the refit of `config`, or cut out as it is."""
    network = bench.network
    smaller = slice_network(network.model, network.groups, plan)
    if is_refit:
        state = score_candidate(replace(bench.job, refit=config.refit()), plan).state
        load_plain_state(smaller, {name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return smaller.eval()


def divergence(dense: np.ndarray, pruned: np.ndarray) -> float | None:
    """KL(dense || pruned) in nats, the mean over images; None where a logit is not finite.

    Args:
        dense, pruned: (n, k) logits.
    """
    if not (np.isfinite(dense).all() and np.isfinite(pruned).all()):
        return None
    log_p, log_q = (torch.from_numpy(logits).double().log_softmax(1) for logits in (dense, pruned))
    return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


PART = Part(
    name="ablation", networks=tuple(BUDGETS), threads=1, cells=cells, meter=AblationMeter,
    headline=("kl", "accuracy", "solve_seconds", "assembly_seconds"),
)  # fmt: skip
