"""From a plan to a physically smaller network whose weights are re-estimated in closed form.

Slicing alone changes what every later layer reads. Walking the traced graph once, in topological order, each dense
layer is refit on what it *actually* reads (inputs that passed through the already pruned and refit part) against what
the *dense* network answered at the same positions; BatchNorm statistics are re-estimated on the way. No gradient
step.

Axes: t sampled rows, d kept features, m kept outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from entprune.calibration import SamplingPlan, Statistics
from entprune.errors import ConfigError
from entprune.evaluation import ImageSplit
from entprune.groups import ChannelGroups, shared_layers
from entprune.layers import LayerSelection, input_width, is_dense, narrow_layers
from entprune.low_rank import reduce_rank
from entprune.moments import (
    Moments,
    count_positions,
    draw_positions,
    feature_count,
    read_outputs,
    read_rows,
)
from entprune.output_layer import find_output_layer, fit_probabilities
from entprune.plan import PruningPlan, select_layers
from entprune.rectifiers import CutOff, cut_off, find_rectifiers
from entprune.refit import make_fit
from entprune.repeated import refit_repeated
from entprune.residuals import Residual, find_norms, inverse_gain, output_gain
from entprune.spill import SpillingStore, Step, Values
from entprune.tracing import called_modules, trace

_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d)
HELD_NUMBERS = 2**28  # a gigabyte: rows of one layer up to this size are held while it is refit
HELD_BYTES = 2**30  # activations of all images up to this size are held in main memory, the rest in files
_FREE_SHARE = 0.5  # of a device's free memory, in place of that
_PULL = 0.1  # of the dense answer where a ReLU cuts it off


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitConfig:
    """How kept weights are re-estimated.

    Attributes:
        relative_ridge: ridge as a fraction of the mean input variance.
        reestimate_batchnorm: recompute BatchNorm means and variances on the pruned network.
        rectified_steps: further fits of a layer whose outputs a ReLU reads (:mod:`entprune.rectifiers`).
        output_temperature: of the class probabilities that the output layer is refit to
            (:mod:`entprune.output_layer`); 0 leaves it at the least-squares fit of the logits.
    """

    relative_ridge: float = 1e-3
    reestimate_batchnorm: bool = True
    rectified_steps: int = 2
    output_temperature: float = 2.0

    def __post_init__(self) -> None:
        if self.relative_ridge <= 0 or self.rectified_steps < 0 or self.output_temperature < 0:
            raise ConfigError(
                "expected relative_ridge > 0, rectified_steps >= 0 and output_temperature >= 0, got "
                f"{self.relative_ridge}, {self.rectified_steps} and {self.output_temperature}."
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RefitData:
    """Calibration images with the dense network's answers.

    Attributes:
        split, indices: the images, in the order in which the statistics were collected.
        statistics: answers per layer from :func:`entprune.calibration.collect_statistics`; moments are not needed.
        sampling: the sampling plan of those statistics.
        residuals: layers whose answers include the dense summand of a residual addition, in the layer's own units.
        held_numbers: rows of one layer up to this size are held while it is refit, others read again for each step.
        held_bytes: activations of all images up to this size are held, the rest spilled (:mod:`entprune.spill`); None
            for a gigabyte, or half of what is free on a device other than the CPU.
    """

    split: ImageSplit
    indices: np.ndarray
    statistics: Statistics
    sampling: SamplingPlan
    residuals: tuple[Residual, ...] = ()
    held_numbers: int = HELD_NUMBERS
    held_bytes: int | None = None


def slice_network(model: nn.Module, groups: ChannelGroups, plan: PruningPlan) -> nn.Module:
    """Copy of the network with the removed channels physically cut out and the remaining weights unchanged.

    Raises:
        ModelError: a layer that the plan touches cannot be sliced.
    """
    smaller = copy.deepcopy(model)
    narrow_layers(smaller, select_layers(model, groups, plan))
    return smaller


def dense_layers(model: nn.Module, protected: Collection[str] = ()) -> tuple[str, ...]:
    """Layers that assembly can refit, in execution order: dense, called once, with parameters of their own.

    Args:
        model: the network.
        protected: layers that must not change.
    """
    left_out = shared_layers(model) | set(protected)
    once = (name for name, count in called_modules(trace(model).graph).items() if count == 1)
    return tuple(name for name in once if name not in left_out and is_dense(model.get_submodule(name)))


def assemble(
    model: nn.Module,
    groups: ChannelGroups,
    plan: PruningPlan,
    *,
    data: RefitData,
    config: RefitConfig,
    graph: fx.Graph | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Build the smaller network and re-estimate its weights.

    Args:
        model: dense network in eval mode; it is not changed.
        groups: its channel groups.
        plan: kept channels, and ranks of layers whose weights are to be of low rank; they stay one layer here.
        data: calibration images and the dense network's answers.
        graph: traced operations of the dense network; traced here without it, which only one thread at a time may do.
        progress: called with (graph nodes done, all nodes).

    Returns:
        The refit smaller network in eval mode, on the CPU.
    """
    selection = select_layers(model, groups, plan)
    smaller = slice_network(model, groups, plan).eval().to(device)
    if plan.ranks or any(len(group.kept_channels) < group.num_channels for group in plan.groups):
        graph = graph or trace(model).graph
        free = _free_modules(graph, groups.protected | shared_layers(model))
        moments = {
            name: entry.moments
            for name, entry in data.statistics.items()
            if isinstance(entry.moments, Moments) and name not in free and name not in groups.protected
        }
        refit_repeated(smaller, model, selection, moments, relative_ridge=config.relative_ridge)
        walk = _RefitWalk(graph, free, smaller, model, selection, data, config, device, dict(plan.ranks))
        with torch.inference_mode():
            walk.run(progress)
    return smaller.cpu()


class _RefitWalk:
    """Executes the traced graph node by node over all calibration batches, refitting layers as they are reached."""

    def __init__(
        self,
        graph: fx.Graph,
        may_change: Collection[str],
        smaller: nn.Module,
        dense: nn.Module,
        selection: Mapping[str, LayerSelection],
        data: RefitData,
        config: RefitConfig,
        device: str,
        ranks: Mapping[str, int],
    ) -> None:
        self._ranks = ranks
        self._norms = find_norms(graph, dense) if ranks else {}
        self._graph, self._may_change = graph, may_change
        self._smaller, self._dense = smaller, dense
        self._selection, self._statistics, self._sampling = selection, data.statistics, data.sampling
        self._data, self._config, self._device = data, config, device
        size = data.sampling.batch_size
        self._batches = [data.indices[start : start + size] for start in range(0, len(data.indices), size)]
        self._store = SpillingStore(_limit(data.held_bytes, device))
        self._changed = False
        by_name = {node.name: node for node in graph.nodes}
        self._residuals = {entry.layer: (entry, by_name[entry.other]) for entry in data.residuals}
        self._settled: set[str] = set()  # BatchNorms whose statistics follow from their layer's refit
        self._rectifiers = find_rectifiers(graph, dense, data.residuals, may_change)
        self._cut_offs = self._find_cut_offs() if config.rectified_steps else {}
        self._output_layer = find_output_layer(graph, dense) if config.output_temperature else None

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        """Walk the graph; activations of all batches are kept until their last use."""
        nodes = list(self._graph.nodes)
        last_use = {used: node for node in nodes for used in node.all_input_nodes}
        values: dict[fx.Node, Values] = {}
        for number, node in enumerate(nodes):
            if node.op == "output":
                break
            values[node] = self._evaluate(node, values)
            for used in [candidate for candidate in values if last_use.get(candidate) is node]:
                self._store.release(values.pop(used))
            if progress is not None:
                progress(number + 1, len(nodes))

    def _evaluate(self, node: fx.Node, values: dict[fx.Node, Values]) -> Values:
        if node.op == "get_attr":
            return Values([_attribute(self._smaller, str(node.target))] * len(self._batches))
        if node.op == "call_module" and isinstance(node.args[0], fx.Node):
            self._visit(str(node.target), values[node.args[0]], values)
        results = Values()
        for batch, indices in enumerate(self._batches):
            step = self._store.step()
            if node.op == "placeholder":
                step.put(results, self._data.split.batch(indices).to(self._device, copy=True))
            else:
                step.put(results, self._call(node, partial(_read, step, values, batch)))
        return results

    def _call(self, node: fx.Node, read: Callable[[fx.Node], Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
        if node.op == "call_module":
            return self._smaller.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)

    def _visit(self, name: str, inputs: Values, values: Mapping[fx.Node, Values]) -> None:
        """Re-estimate one module before it is run."""
        layer = self._smaller.get_submodule(name)
        entry = self._selection.get(name, LayerSelection())
        if entry.inputs is not None and len(entry.inputs) < input_width(self._dense.get_submodule(name)):
            self._changed = True
        self._changed = self._changed or name in self._ranks
        if not self._changed or name not in self._may_change:
            return
        if isinstance(layer, _BATCH_NORM) and self._config.reestimate_batchnorm and name not in self._settled:
            _reestimate_batchnorm(layer, inputs)
        elif isinstance(layer, (nn.Conv2d, nn.Linear)) and name in self._statistics:
            residual, other = self._residuals.get(name, (None, None))
            bias = self._refit(name, layer, entry, inputs, None if other is None else values[other])
            exact = self._rectifiers[name] if name in self._cut_offs else residual
            if exact is not None and exact.norm is not None:
                self._settle(exact.norm, layer, bias)

    def _find_cut_offs(self) -> dict[str, CutOff]:
        """Where ReLUs cut the answers of the layers that are refit."""
        found: dict[str, CutOff] = {}
        for name, entry in self._rectifiers.items():
            cut = cut_off(self._dense, entry)
            if cut is not None and name in self._residuals:
                is_open = inverse_gain(self._dense, self._residuals[name][0]) != 0  # else the stream alone decides
                cut = cut.where(is_open)
            if cut is not None:
                found[name] = cut.to(self._device)
        return found

    def _settle(self, name: str, layer: nn.Conv2d | nn.Linear, bias: Tensor) -> None:
        """A corrected layer answers in the dense network's units: its BatchNorm only takes the intercept."""
        norm = self._smaller.get_submodule(name)
        if isinstance(norm, _BATCH_NORM) and norm.running_mean is not None and layer.bias is None:
            norm.running_mean.sub_(bias)
        self._settled.add(name)

    def _refit(
        self,
        name: str,
        layer: nn.Conv2d | nn.Linear,
        entry: LayerSelection,
        inputs: Values,
        summands: Values | None,
    ) -> Tensor:
        """Solve for the layer's weights; return the intercept (m,)."""
        kept = slice(None) if entry.outputs is None else entry.outputs
        intercept = layer.bias is not None or self._feeds_batchnorm(name)
        num_rows = len(self._statistics[name].outputs)
        fit = make_fit(num_rows, feature_count(layer), layer.weight.shape[0], intercept, self._device)
        prior, ridge = layer.weight.flatten(1), self._config.relative_ridge
        read = partial(self._observations, name, layer, kept, inputs, summands)
        held = list(read()) if num_rows * feature_count(layer) <= self._data.held_numbers else None
        for rows, dense, summand in held or read():
            fit.update(rows, dense - summand)
        weight, bias = fit.solve(prior, ridge)
        if name in self._cut_offs:
            cut = self._cut_offs[name].at(kept)
            for _ in range(self._config.rectified_steps):
                fit.forget_answers()
                for rows, dense, summand in held or read():
                    present = torch.addmm(bias, rows, weight.T) + summand
                    fit.answer_again(rows, cut.targets(dense, present, _PULL) - summand)
                weight, bias = fit.solve(prior, ridge)
        if name == self._output_layer and layer.bias is not None:
            rows, logits = (torch.cat(part) for part in list(zip(*(held or read()), strict=True))[:2])
            weight, bias = fit_probabilities(rows, logits, weight, bias, self._config.output_temperature)
        if name in self._ranks:
            gain = output_gain(self._dense, name, self._norms.get(name))[kept].to(self._device)
            parts = (part[0] for part in held or read())
            weight, bias = reduce_rank(weight, bias, parts, gain, self._ranks[name], intercept=intercept)
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(bias)
        return bias

    def _observations(
        self,
        name: str,
        layer: nn.Conv2d | nn.Linear,
        kept: np.ndarray | slice,
        inputs: Values,
        summands: Values | None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Per batch the rows (t, d), the dense answers (t, m), and what is added to the layer's own (t, m) or zero."""
        outputs = self._statistics[name].outputs
        row = 0
        for batch, value in enumerate(inputs):
            positions = self._positions(name, layer, value, batch)
            rows = read_rows(layer, value, positions)
            dense = torch.from_numpy(outputs[row : row + len(rows)][:, kept]).to(self._device)
            row += len(rows)
            summand = dense.new_zeros(())
            if summands is not None:
                summand = read_outputs(layer, summands[batch], positions) * self._inverse_gain(name, kept)
            yield rows, dense, summand

    def _inverse_gain(self, name: str, kept: np.ndarray | slice) -> Tensor:
        return inverse_gain(self._dense, self._residuals[name][0])[kept].to(self._device)

    def _feeds_batchnorm(self, name: str) -> bool:
        """Whether a shift of the layer's output is absorbed by a BatchNorm whose mean is re-estimated."""
        users = next(iter(node for node in self._graph.nodes if node.target == name)).users
        return self._config.reestimate_batchnorm and all(
            user.op == "call_module" and isinstance(self._smaller.get_submodule(str(user.target)), _BATCH_NORM)
            for user in users
        )

    def _positions(self, name: str, layer: nn.Module, value: Tensor, batch: int) -> Tensor | None:
        """The positions at which the dense answers were taken: same seed, layer, batch and number of positions."""
        return draw_positions(
            value.shape[0],
            count_positions(layer, value),
            per_image=self._sampling.per_image(self._dense.get_submodule(name)),
            seed=self._sampling.seed,
            name=name,
            batch=batch,
        )


def _limit(held_bytes: int | None, device: str) -> int:
    """Bytes of activations that are held."""
    if held_bytes is not None:
        return held_bytes
    return int(_FREE_SHARE * torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else HELD_BYTES


def _free_modules(graph: fx.Graph, left_alone: Collection[str]) -> frozenset[str]:
    """Modules that are called once and that the walk may change."""
    return frozenset(name for name, count in called_modules(graph).items() if count == 1 and name not in left_alone)


def _read(step: Step, values: Mapping[fx.Node, Values], batch: int, node: fx.Node) -> Any:
    return step.get(values[node], batch)


def _attribute(root: nn.Module, target: str) -> Any:
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _reestimate_batchnorm(layer: nn.BatchNorm1d | nn.BatchNorm2d, inputs: Iterable[Tensor]) -> None:
    """Mean and variance per channel over all calibration images."""
    if layer.running_mean is None or layer.running_var is None:
        return
    count = 0
    total = torch.zeros_like(layer.running_mean, dtype=torch.float64)
    square = torch.zeros_like(total)
    for value in inputs:
        rows = value.numel() // value.shape[1]
        variance, mean = torch.var_mean(value, dim=[axis for axis in range(value.ndim) if axis != 1], correction=0)
        count += rows
        total += rows * mean.double()
        square += rows * (variance.double() + mean.double().square())
    layer.running_mean.copy_(total / count)
    layer.running_var.copy_((square / count - (total / count).square()).clamp_min(0))
