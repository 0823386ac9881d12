"""The stages of a pruning run, each a set of independent units and a cheap step that joins them.

    analyse -> calibrate -> solve -> (search: allocate, assemble, score) -> certify -> measure

Every stage takes a :class:`~entprune.runner.Runner`, so the same code runs in process and on a cluster and gives the
same plan.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from entprune.allocation import CostModel, build_cost_model
from entprune.assembly import dense_layers
from entprune.calibration import (
    LayerStatistics,
    SamplingPlan,
    ShardSum,
    Statistics,
    collect_statistics,
)
from entprune.certificate import confirm_groups
from entprune.config import PruneConfig
from entprune.errors import ModelError
from entprune.evaluation import ImageSplit
from entprune.groups import ChannelGroup, ChannelGroups, find_groups
from entprune.moments import RowMoments
from entprune.path import PathSetting, SettingPath, SparsityPath, lower_envelope, solve_setting
from entprune.plan import consumer_features
from entprune.regression import GroupProblem, build_problem
from entprune.residuals import Residual, ResidualGraph, find_norms, find_residuals, output_gain
from entprune.runner import Runner, Work
from entprune.shared_steps import SharedSteps
from entprune.tracing import trace

Part = tuple[int, int]  # first image, and the one after the last


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Network:
    """The dense network and what analysis found out about it.

    Attributes:
        model: in eval mode, float32, on the CPU; never changed.
        graph: its traced operations; tracing is no work for threads, which would disturb each other.
        groups: its channel groups and what cannot be pruned.
        refit_layers: layers that assembly re-estimates, in execution order.
        cost: its size for any widths.
        input_shape: (C, H, W).
        residuals: layers whose refit makes up for errors that a residual stream carries.
        norms: BatchNorm that alone reads a dense layer, by that layer's name.
    """

    model: nn.Module
    graph: fx.Graph
    groups: ChannelGroups
    refit_layers: tuple[str, ...]
    cost: CostModel
    input_shape: tuple[int, int, int]
    residuals: tuple[Residual, ...] = ()
    norms: Mapping[str, str] = field(default_factory=dict)

    def full_widths(self) -> dict[str, int]:
        """Channels of each group in the dense network, in execution order."""
        return {group.name: group.num_channels for group in self.groups.groups}

    def dense_macs(self) -> int:
        """Multiply-accumulates of one image before pruning."""
        return self.cost.macs(self.full_widths())

    def output_gain(self, layer: str) -> np.ndarray:
        """(m,) float32 magnitude with which each output of a dense layer goes on."""
        return np.asarray(output_gain(self.model, layer, self.norms.get(layer)).numpy())

    def consumers(self) -> tuple[str, ...]:
        """Layers that read a prunable group, in execution order."""
        read = {piece.layer for group in self.groups.groups for piece in group.consumers}
        rest = sorted(read.difference(self.refit_layers))  # called several times, or sharing parameters
        return (*(layer for layer in self.refit_layers if layer in read), *rest)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageSet:
    """Some images of a split."""

    split: ImageSplit
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)


def analyse(model: nn.Module, input_shape: tuple[int, int, int], config: PruneConfig) -> Network:
    """Find groups and costs on a copy of the network.

    Raises:
        ModelError: a weight is not finite, the network cannot be traced, or nothing in it can be pruned.
    """
    dense = copy.deepcopy(model).eval().float().cpu()
    _check_finite(dense)
    groups = find_groups(dense, torch.zeros(2, *input_shape), keep=config.keep)
    groups = confirm_groups(dense, groups, input_shape)
    if not groups.groups:
        listed = "; ".join(f"{entry.layer}: {entry.reason}" for entry in groups.unprunable[:4])
        reasons = listed or "it has no dense layers"
        raise ModelError(f"nothing in this network can be pruned ({reasons}); see `entprune inspect`.")
    graph = copy.deepcopy(trace(dense).graph)  # a copy does not hold on to the network
    layers = dense_layers(dense, groups.protected)
    return Network(
        model=dense,
        graph=graph,
        groups=groups,
        refit_layers=layers,
        residuals=find_residuals(graph, dense, layers, groups.protected) if config.correct_residuals else (),
        norms=find_norms(graph, dense),
        cost=build_cost_model(dense, groups, input_shape),
        input_shape=input_shape,
    )


def _check_finite(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"expected finite weights, got NaN or infinity in {name!r}; check the checkpoint.")


def sampling_plan(config: PruneConfig, num_images: int) -> SamplingPlan:
    """Rows per layer for that many calibration images."""
    return SamplingPlan(
        num_images=num_images,
        batch_size=config.batch_size,
        min_rows=config.min_rows,
        rows_per_feature=config.rows_per_feature,
        seed=config.seed,
    )


# --- calibrate ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CalibrationJob:
    """What every calibration unit reads."""

    network: Network
    images: ImageSet
    sampling: SamplingPlan
    device: str

    def in_chunks(self, images: int) -> CalibrationJob:
        """The same in smaller forward passes."""
        return replace(self, sampling=replace(self.sampling, chunk=images))


def calibrate(
    network: Network,
    images: ImageSet,
    config: PruneConfig,
    runner: Runner,
    *,
    known: Callable[[Part], Statistics | None] = lambda _: None,
    on_result: Callable[[Part, Statistics], None] | None = None,
) -> dict[str, LayerStatistics]:
    """Run the calibration images through the dense network, shard by shard, and sum the moments in shard order.

    Args:
        known: statistics of a shard from an earlier run on the same inputs.
        on_result: called with each new shard's as they come in.
    """
    sampling = sampling_plan(config, len(images))
    job = runner.share(CalibrationJob(network=network, images=images, sampling=sampling, device=config.device))
    total = ShardSum()
    parts = shards(len(images), config.calibration_shards, config.batch_size)
    try:
        run_parts(calibrate_shard, job, parts, runner, "calibrate", known, on_result, total.add)
    finally:
        runner.release(job)
    return total.total()


def run_parts(
    unit: Callable[[Any, Part], Any],
    job: Any,
    parts: Sequence[Part],
    runner: Runner,
    stage: str,
    known: Callable[[Part], Any | None],
    on_result: Callable[[Part, Any], None] | None,
    collect: Callable[[int, Any], None],
) -> None:
    """Run the parts that are not known; `collect` gets the number and result of all of them."""
    missing: list[int] = []
    for number, part in enumerate(parts):
        earlier = known(part)
        if earlier is None:
            missing.append(number)
        else:
            collect(number, earlier)

    def arrived(index: int, result: Any) -> None:
        if on_result is not None:
            on_result(parts[missing[index]], result)
        collect(missing[index], result)

    if missing:
        work = [Work(shared=job, item=parts[number]) for number in missing]
        runner.run(unit, work, stage=stage, on_result=arrived, keep=False)


def shards(count: int, parts: int, batch_size: int) -> list[Part]:
    """Split `count` images into at most `parts` ranges that start at batch boundaries."""
    batches = -(-count // batch_size)
    edges = sorted({batches * part // parts * batch_size for part in range(parts)} | {count})
    return [(start, stop) for start, stop in pairwise(edges) if stop > start]


def calibrate_shard(job: CalibrationJob, shard: tuple[int, int]) -> dict[str, LayerStatistics]:
    """Unit: statistics of one range of the calibration images."""
    start, stop = shard
    consumers = job.network.consumers()
    return collect_statistics(
        copy.deepcopy(job.network.model).to(job.device),
        job.images.split,
        job.images.indices[start:stop],
        consumers=consumers,
        others=[layer for layer in job.network.refit_layers if layer not in consumers],
        sampling=job.sampling,
        first_image=start,
        device=job.device,
        residuals=ResidualGraph(job.network.graph, job.network.residuals),
    )


# --- solve ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SolveJob:
    """What every solve unit of one group reads, and in each process the steps that its settings have in common."""

    problem: GroupProblem
    device: str
    shared: SharedSteps = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared", SharedSteps(self.problem, device=self.device))


def group_problem(network: Network, group: ChannelGroup, statistics: Statistics) -> GroupProblem:
    """The scaled regressions of one group.

    Outputs count as much as the BatchNorm behind them lets through, and the errors of a residual branch are measured
    against the sum that it is added to: a small branch may err more than the stream.
    """
    consumers: dict[str, tuple[np.ndarray | RowMoments, np.ndarray, np.ndarray]] = {}
    variances: dict[str, float] = {}
    branches = {entry.layer for entry in network.residuals}
    for piece in group.consumers:
        entry, layer = statistics[piece.layer], network.model.get_submodule(piece.layer)
        if entry.moments is None:
            raise ModelError(
                f"layer {piece.layer!r}: expected moments of its inputs, got none; calibrate it as a consumer."
            )
        gain = network.output_gain(piece.layer)
        weight = layer.get_parameter("weight").detach().flatten(1).numpy() * gain[:, None]
        inputs = entry.moments if isinstance(entry.moments, RowMoments) else entry.moments.covariance()
        consumers[piece.layer] = (inputs, weight, consumer_features(layer, piece))
        if piece.layer in branches:
            variances[piece.layer] = float((gain**2 * entry.outputs.var(0, dtype=np.float64)).sum())
    return build_problem(group.name, group.num_channels, consumers, variances)


def solve_group(job: SolveJob, setting: PathSetting) -> SettingPath:
    """Unit: one continuation of one group."""
    return solve_setting(job.problem, setting, device=job.device, shared=job.shared)


SolveKey = tuple[str, PathSetting]


def solve(
    network: Network,
    statistics: Statistics,
    config: PruneConfig,
    runner: Runner,
    *,
    known: Mapping[SolveKey, SettingPath] | None = None,
    on_result: Callable[[SolveKey, SettingPath], None] | None = None,
) -> dict[str, SparsityPath]:
    """Solve every (group, setting) pair that is not known yet and take the lower envelope of each group.

    Args:
        known: results of an earlier run on the same inputs.
        on_result: called with each new result as it comes in.
    """
    found: dict[SolveKey, SettingPath] = dict(known or {})
    missing = {
        group.name: tuple(setting for setting in config.settings if (group.name, setting) not in found)
        for group in network.groups.groups
    }
    groups = [group for group in network.groups.groups if missing[group.name]]

    def collect(number: int, setting: PathSetting, result: SettingPath) -> None:
        key = (groups[number].name, setting)
        found[key] = result
        if on_result is not None:
            on_result(key, result)

    requests = ((group_problem(network, group, statistics), missing[group.name]) for group in groups)
    solve_pool(requests, runner, device=config.device, on_result=collect)
    return {
        group.name: lower_envelope(
            group.name, len(group.consumers), [found[group.name, setting] for setting in config.settings]
        )
        for group in network.groups.groups
    }


def solve_pool(
    requests: Iterable[tuple[GroupProblem, Sequence[PathSetting]]],
    runner: Runner,
    *,
    device: str,
    on_result: Callable[[int, PathSetting, SettingPath], None],
) -> None:
    """Solve (group, setting) pairs of any number of groups, networks and calibrations as one pool of work.

    Args:
        requests: problems, each with the settings that are wanted; taken one by one, so that the workers' copies are
            the only ones.
        on_result: called with (number of the request, setting, result) as results come in.
    """
    pairs: list[tuple[int, PathSetting]] = []
    work: list[Work] = []
    handles: list[Any] = []
    try:
        for number, (problem, settings) in enumerate(requests):
            handles.append(runner.share(SolveJob(problem=problem, device=device)))
            pairs.extend((number, setting) for setting in settings)
            work.extend(Work(shared=handles[-1], item=setting, cost=problem.solve_cost()) for setting in settings)
        if work:
            runner.run(solve_group, work, stage="solve", on_result=lambda index, path: on_result(*pairs[index], path))
    finally:
        for handle in handles:
            runner.release(handle)
