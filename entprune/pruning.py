"""Prune a network in process: `prune(model, calibration, budget=..., evaluate=...)`.

The same stages run on a cluster through the `flows` package; both give the same plan on the same seed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entprune.allocation import Objective
from entprune.artifact import ModelCard
from entprune.assembly import RefitData, slice_network
from entprune.candidates import CandidateJob, answers_only
from entprune.certificate import Certificate, answer_difference, certify
from entprune.checkpoints import load_plain_state
from entprune.config import Budget, BudgetKind, PruneConfig
from entprune.datasets.splits import ArraySplit
from entprune.errors import DataError
from entprune.evaluation import ImageSplit, Measurement, measurement_of
from entprune.groups import ChannelGroups
from entprune.low_rank import merge_layers, split_layers
from entprune.path import SparsityPath
from entprune.plan import PruningPlan
from entprune.predictions import dense_reference, is_correct, predict, with_perturbed
from entprune.report import collect_warnings, environment
from entprune.rounds import RoundRecord
from entprune.runner import InProcessRunner, Progress, Runner, torch_threads
from entprune.search import SearchResult, search
from entprune.selection import StopRule, paired_interval
from entprune.simplex import effective_channels, entropy
from entprune.stages import ImageSet, Network, analyse, calibrate, sampling_plan, solve

_OBJECTIVES: tuple[Objective, ...] = ("parameters", "macs")
_OTHERS = ""  # no group is named so
_CERTIFICATE_IMAGES, _CERTIFICATE_PIXELS = 16, 16 * 64 * 64  # at most, and not fewer than two images


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PruningResult:
    """What a pruning run gives back.

    Attributes:
        model: the smaller network, an ordinary module in eval mode on the CPU.
        plan: kept channels of every group.
        report: the content of report.json.
        certificate: proof that the smaller network equals the masked full-size one.
        paths: sparsity path of every group, reusable for other budgets.
        card: what the portable artifact needs to know about the network.
    """

    model: nn.Module
    plan: PruningPlan
    report: dict[str, Any]
    certificate: Certificate
    paths: Mapping[str, SparsityPath]
    card: ModelCard


@dataclass(slots=True)
class Stopwatch:
    """Seconds per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def to_dict(self) -> dict[str, float]:
        """Seconds per stage and their total."""
        rounded = {name: round(value, 3) for name, value in self.seconds.items()}
        return {**rounded, "total": round(sum(self.seconds.values()), 3)}


def prune(
    model: nn.Module,
    calibration: ImageSplit | np.ndarray | Tensor | Iterable[Any],
    *,
    budget: Budget,
    evaluate: ImageSplit | tuple[Any, Any] | None = None,
    test: ImageSplit | tuple[Any, Any] | None = None,
    config: PruneConfig | None = None,
    runner: Runner | None = None,
    progress: Progress | None = None,
    model_spec: str | None = None,
    class_names: Sequence[str] = (),
) -> PruningResult:
    """Prune a network to a budget without a single gradient step.

    Args:
        model: pretrained network; it is not changed.
        calibration: unlabelled images (n, C, H, W), normalised as the network expects; an array, a tensor, an
            iterable of batches (a DataLoader; of pairs the first part is taken), or an image split.
        budget: accuracy points, parameters, MACs, latency, or several of them.
        evaluate: held-out labelled images on which candidates are selected, as (images, labels), a loader of such
            pairs, or a split; needed for an accuracy budget.
        test: labelled images for the final figures alone; without them the report's accuracies are null.
        config: settings; the defaults are meant to be left alone.
        runner: who runs the units; in this process by default.
        progress: called with (stage, units done, all units) by the default runner.
        model_spec: how to build the unpruned network again ("vgg16_cifar", "torchvision:resnet50"), for
            `entprune.load`.
        class_names: recorded in the artifact.

    Raises:
        ConfigError, DataError, ModelError: an input is unusable; the message says which and what to do.
    """
    config = config or PruneConfig()
    unlabelled = as_split(calibration)
    labelled = None if evaluate is None else as_split(evaluate, labelled=True)
    test_set = None if test is None else whole_split(as_split(test, labelled=True), None)
    if labelled is None and budget.kind == "max_accuracy_drop":
        raise DataError("an accuracy budget needs labelled images: pass evaluate=(images, labels), or ask for a size.")
    runner = runner or InProcessRunner(threads=config.threads, progress=progress)
    shape = tuple(int(size) for size in unlabelled.batch(np.zeros(1, dtype=np.int64)).shape[1:])
    watch = Stopwatch()
    with watch.stage("analyse"):
        network = analyse(model, (shape[0], shape[1], shape[2]), config)
    config = config.sized_for(network.dense_macs())
    images = whole_split(unlabelled, config.calibration_samples)
    validation = None
    if labelled is not None:
        validation = with_perturbed(whole_split(labelled, config.validation_samples), config)
    with watch.stage("calibrate"):
        statistics = calibrate(network, images, config, runner)
    with watch.stage("solve"):
        paths = solve(network, statistics, config, runner)
    with watch.stage("search"):
        job = candidate_job(network, images, statistics, validation, budget, config, runner)
        found = search(paths, network.cost, job, budget, config, runner)
    with watch.stage("certify"):
        smaller = build_smaller(network, found)
        certificate = certify_result(network, smaller, found.chosen.plan, images, config)
    with watch.stage("measure"):
        dense_figures = measure_network(network.model, network, test_set, config, runner, stage="measure dense")
        small_figures = measure_network(smaller, network, test_set, config, runner, stage="measure pruned")
    card = ModelCard(
        model_spec=model_spec, num_classes=num_outputs(network), input_shape=network.input_shape,
        mean=(), std=(), class_names=tuple(class_names),
    )  # fmt: skip
    report = build_report(
        RunFacts(network=network, paths=paths, found=found, certificate=certificate, budget=budget, config=config),
        dense=dense_figures,
        one_shot=small_figures,
        model={"spec": model_spec, "input_shape": list(network.input_shape), "num_classes": card.num_classes},
        data={
            "spec": None, "sha256": None, "mean": [], "std": [], "calibration_samples": len(images),
            "validation_samples": 0 if validation is None else len(validation),
            "test_samples": 0 if test_set is None else len(test_set),
        },
        validation_accuracy=None if job.reference is None else job.reference.accuracy(),
        timings=watch.to_dict(),
    )  # fmt: skip
    return PruningResult(
        model=smaller, plan=found.chosen.plan, report=report, certificate=certificate, paths=paths, card=card
    )


# --- inputs ---------------------------------------------------------------------------------------------------------


def as_split(images: Any, *, labelled: bool = False) -> ImageSplit:
    """Accept a split, (images, labels), an array or tensor (n, C, H, W), or an iterable of batches or of such pairs.

    Args:
        images: any of these.
        labelled: whether the labels are needed; without it zeros stand in for missing ones.

    Raises:
        DataError: none of these, an empty input, missing labels, or values that are not finite.
    """
    if hasattr(images, "batch") and hasattr(images, "labels"):
        return images  # type: ignore[no-any-return]
    labels: Any = None
    if isinstance(images, tuple) and len(images) == 2:
        images, labels = images
    if not isinstance(images, (np.ndarray, Tensor)):
        images, labels = _join_batches(images, labels, labelled)
    array = np.asarray(images, dtype=np.float32)
    if array.ndim != 4 or not len(array):
        raise DataError(f"expected images of shape (n, C, H, W), got {array.shape}; add the missing axes.")
    if not np.isfinite(array).all():
        raise DataError("expected finite images, got NaN or infinity; clean the data.")
    if labelled and labels is None:
        raise DataError("expected labelled images, got images alone; pass (images, labels), or a loader of such pairs.")
    given = np.zeros(len(array), dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)
    if given.shape != (len(array),):
        raise DataError(f"expected one label per image, got {given.shape} labels for {len(array)} images.")
    channels = array.shape[1]
    return ArraySplit(images=array, labels=given, mean=(0.0,) * channels, std=(1.0,) * channels)


def _join_batches(batches: Iterable[Any], labels: Any, labelled: bool) -> tuple[Tensor, Any]:
    """Images, and where they are needed labels, unless these are given or a batch comes without."""
    parts = [batch if isinstance(batch, (tuple, list)) else (batch,) for batch in batches]
    if not parts:
        raise DataError("expected at least one batch of images, got none.")
    if labelled and labels is None and all(len(part) > 1 for part in parts):
        labels = torch.cat([torch.as_tensor(part[1]) for part in parts])
    return torch.cat([torch.as_tensor(part[0]) for part in parts]), labels


def whole_split(split: ImageSplit, limit: int | None) -> ImageSet:
    """The first `limit` images of a split (all without a limit)."""
    count = len(split) if limit is None else min(limit, len(split))
    return ImageSet(split=split, indices=np.arange(count))


# --- joining stages -------------------------------------------------------------------------------------------------


def candidate_job(
    network: Network,
    images: ImageSet,
    statistics: Mapping[str, Any],
    validation: ImageSet | None,
    budget: Budget,
    config: PruneConfig,
    runner: Runner,
) -> CandidateJob:
    """Score the dense network on the validation images and bundle what candidate units read."""
    reference = None
    if validation is not None:
        logits = predict(network.model, validation, config, runner, stage="validate dense", precision=config.precision)
        reference = dense_reference(logits, validation, config)
    return CandidateJob(
        network=network,
        data=RefitData(
            split=images.split,
            indices=images.indices,
            statistics=answers_only(statistics, network),
            sampling=sampling_plan(config, len(images)),
            residuals=network.residuals,
        ),
        refit=config.refit(),
        validation=validation,
        reference=reference,
        stop=StopRule(max_drop=budget.max_accuracy_drop, quantile=config.quantile),
        device=config.device,
        precision=config.precision,
    )


def build_smaller(network: Network, found: SearchResult) -> nn.Module:
    """The chosen network with its weights; layers of low rank are two each."""
    plan = found.chosen.plan
    smaller = slice_network(network.model, network.groups, plan)
    load_plain_state(smaller, {name: torch.from_numpy(np.array(value)) for name, value in found.state.items()})
    return split_layers(smaller, dict(plan.ranks)).eval()


def certify_result(
    network: Network, smaller: nn.Module, plan: PruningPlan, images: ImageSet, config: PruneConfig
) -> Certificate:
    """Certificate on calibration images.

    Layers of low rank count as one, with the product of their two weights; both networks must answer alike then.
    """
    _, height, width = network.input_shape
    count = max(2, min(_CERTIFICATE_IMAGES, _CERTIFICATE_PIXELS // (height * width)))
    batch = images.split.batch(images.indices[:count])
    merged = merge_layers(smaller, dict(plan.ranks)) if plan.ranks else smaller
    certificate = certify(network.model, merged, network.groups, plan, batch, tolerance=config.certificate_tolerance)
    if not plan.ranks:
        return certificate
    difference = max(certificate.max_abs_difference, answer_difference(merged, smaller, batch))
    return replace(certificate, max_abs_difference=difference, passed=difference <= certificate.tolerance)


def num_outputs(network: Network) -> int:
    """Classes the network tells apart."""
    with torch.inference_mode():
        return int(network.model(torch.zeros(1, *network.input_shape)).shape[1])


def measure_network(
    model: nn.Module,
    network: Network,
    test: ImageSet | None,
    config: PruneConfig,
    runner: Runner,
    *,
    stage: str,
) -> Measurement:
    """Test accuracy (NaN without test images), parameters, MACs and latency; the test images are used here alone."""
    correct = None
    if test is not None:
        correct = is_correct(predict(model, test, config, runner, stage=stage), test)
    with torch_threads(config.threads):
        return measurement_of(model, correct, network.input_shape, repeats=5)


# --- report ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RunFacts:
    """What the report draws on.

    Attributes:
        network: dense.
        paths, found: of its (first) pruning.
        certificate: of the result.
        budget, config: what was asked.
        plan: of the result where rounds followed, against the dense network; by default what `found` chose.
        rounds: of a run that prunes and tunes in turns.
        chosen_round: the one that the result is from.
    """

    network: Network
    paths: Mapping[str, SparsityPath]
    found: SearchResult
    certificate: Certificate
    budget: Budget
    config: PruneConfig
    plan: PruningPlan | None = None
    rounds: Sequence[RoundRecord] = ()
    chosen_round: RoundRecord | None = None

    @property
    def missed(self) -> tuple[BudgetKind, ...]:
        """Budgets that the result does not meet: after tuning where there were rounds."""
        return self.found.chosen.missed if self.chosen_round is None else self.chosen_round.missed


def build_report(
    facts: RunFacts,
    *,
    dense: Measurement,
    one_shot: Measurement,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    validation_accuracy: float | None,
    timings: Mapping[str, float],
    fine_tuned: Measurement | None = None,
    lineage: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of report.json, schema version 1."""
    found, plan = facts.found, facts.plan or facts.found.chosen.plan
    costs = {objective: _costs_by_group(facts, plan, objective) for objective in _OBJECTIVES}
    report: dict[str, Any] = {
        "schema_version": 1,
        "model": dict(model),
        "data": dict(data),
        "seed": facts.config.seed,
        "budget": facts.budget.to_dict(),
        "budget_met": not facts.missed,
        "budgets_missed": list(facts.missed),
        "dense": _figures(dense),
        "one_shot": _compared(one_shot, dense),
        "fine_tuned": None if fine_tuned is None else _compared(fine_tuned, dense),
        "certificate": facts.certificate.to_dict(),
        "groups": [
            _group_entry(facts.network.groups, path, plan) | {name: cost[path.group] for name, cost in costs.items()}
            for path in facts.paths.values()
        ],
        "other_layers": {name: cost[_OTHERS] for name, cost in costs.items()},
        "low_rank": [{"layer": layer, "rank": rank} for layer, rank in plan.ranks],
        "unprunable": [{"layer": e.layer, "reason": e.reason} for e in facts.network.groups.unprunable],
        "candidates": _candidate_entries(found, dense),
        "rounds": [{**record.to_dict(), "chosen": record is facts.chosen_round} for record in facts.rounds],
        "validation": {"dense_accuracy": validation_accuracy, "images": data.get("validation_samples", 0)},
        "plan": plan.to_dict(),
        "settings": facts.config.to_dict(),
        "timings_seconds": dict(timings),
        "lineage": dict(lineage or {}),
        "environment": environment(),
    }
    report["warnings"] = collect_warnings(report)
    return report


def _figures(measured: Measurement) -> dict[str, Any]:
    return {
        "accuracy": None if np.isnan(measured.accuracy) else round(measured.accuracy, 4),
        "parameters": measured.parameters,
        "macs": measured.macs,
        "latency_ms": measured.latency_ms,
    }


def _compared(measured: Measurement, dense: Measurement) -> dict[str, Any]:
    drop = dense.accuracy - measured.accuracy
    return {
        **_figures(measured),
        "accuracy_drop": None if np.isnan(drop) else round(drop, 4),
        "accuracy_drop_interval": _drop_interval(measured, dense),
        "parameters_removed": 1.0 - measured.parameters / dense.parameters,
        "macs_removed": 1.0 - measured.macs / dense.macs,
    }


def _drop_interval(measured: Measurement, dense: Measurement) -> dict[str, float] | None:
    if dense.correct is None or measured.correct is None:
        return None
    low, high = paired_interval(dense.correct, measured.correct)
    return {"low": round(low, 4), "high": round(high, 4)}


def _costs_by_group(facts: RunFacts, plan: PruningPlan, objective: Objective) -> dict[str, dict[str, int]]:
    """Parameters or MACs of the layers that compute each group, and of all others, in both networks."""
    cost = facts.network.cost
    dense, others_dense = cost.by_group({path.group: path.num_channels for path in facts.paths.values()}, objective)
    pruned, others_pruned = cost.by_group(plan.widths(), objective, dict(plan.ranks))
    entries = {group: {"dense": dense[group], "pruned": pruned[group]} for group in dense}
    return {**entries, _OTHERS: {"dense": others_dense, "pruned": others_pruned}}


def _group_entry(groups: ChannelGroups, path: SparsityPath, plan: PruningPlan) -> dict[str, Any]:
    width = len(plan.kept(path.group))
    probability = torch.from_numpy(path.probability(width))
    return {
        "name": path.group,
        "channels": path.num_channels,
        "kept": width,
        "reconstruction_error": float(path.errors[width]) / path.num_consumers,
        "entropy": float(entropy(probability)),
        "effective_channels": effective_channels(probability),
        "setting": path.settings[int(path.choice[width])].setting.label(),
        "note": f"read by {', '.join(piece.layer for piece in groups.named(path.group).consumers)}",
        "channel_probability": [float(f"{value:.4g}") for value in probability.tolist()],
    }


def _candidate_entries(found: SearchResult, dense: Measurement) -> list[dict[str, Any]]:
    return [
        {
            **candidate.to_dict(),
            "parameters_removed": 1.0 - candidate.parameters / dense.parameters,
            "macs_removed": 1.0 - candidate.macs / dense.macs,
            "chosen": candidate.plan.digest() == found.chosen.plan.digest(),
        }
        for candidate in found.candidates
    ]
