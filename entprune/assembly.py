"""From a plan to a physically smaller network whose weights are re-estimated in closed form.

Slicing alone changes what every later layer reads. Walking the traced graph once, in topological order, each dense
layer is refit on what it *actually* reads (inputs that passed through the already pruned and refit part) against what
the *dense* network answered at the same positions; BatchNorm statistics are re-estimated on the way. No gradient
step.

Axes: t sampled rows, d kept features, m kept outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from entprune.calibration import SamplingPlan, Statistics
from entprune.evaluation import ImageSplit
from entprune.groups import ChannelGroups, shared_layers
from entprune.layers import LayerSelection, input_width, is_dense, narrow_layers
from entprune.moments import (
    GramSum,
    Moments,
    ProductSum,
    count_positions,
    draw_positions,
    feature_count,
    read_outputs,
    read_rows,
)
from entprune.plan import PruningPlan, select_layers
from entprune.repeated import refit_repeated
from entprune.residuals import Residual, inverse_gain
from entprune.ridge import row_kernel
from entprune.tracing import called_modules, trace

_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True, kw_only=True, slots=True)
class RefitConfig:
    """How kept weights are re-estimated.

    Attributes:
        relative_ridge: ridge as a fraction of the mean input variance.
        reestimate_batchnorm: recompute BatchNorm means and variances on the pruned network.
    """

    relative_ridge: float = 1e-3
    reestimate_batchnorm: bool = True


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RefitData:
    """Calibration images with the dense network's answers.

    Attributes:
        split, indices: the images, in the order in which the statistics were collected.
        statistics: answers per layer from :func:`entprune.calibration.collect_statistics`; moments are not needed.
        sampling: the sampling plan of those statistics.
        residuals: layers whose answers include the dense summand of a residual addition, in the layer's own units.
    """

    split: ImageSplit
    indices: np.ndarray
    statistics: Statistics
    sampling: SamplingPlan
    residuals: tuple[Residual, ...] = ()


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
        plan: kept channels.
        data: calibration images and the dense network's answers.
        graph: traced operations of the dense network; traced here without it, which only one thread at a time may do.
        progress: called with (graph nodes done, all nodes).

    Returns:
        The refit smaller network in eval mode, on the CPU.
    """
    selection = select_layers(model, groups, plan)
    smaller = slice_network(model, groups, plan).eval().to(device)
    if any(len(group.kept_channels) < group.num_channels for group in plan.groups):
        graph = graph or trace(model).graph
        free = _free_modules(graph, groups.protected | shared_layers(model))
        moments = {
            name: entry.moments
            for name, entry in data.statistics.items()
            if isinstance(entry.moments, Moments) and name not in free and name not in groups.protected
        }
        refit_repeated(smaller, model, selection, moments, relative_ridge=config.relative_ridge)
        walk = _RefitWalk(graph, free, smaller, model, selection, data, config, device)
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
    ) -> None:
        self._graph, self._may_change = graph, may_change
        self._smaller, self._dense = smaller, dense
        self._selection, self._statistics, self._sampling = selection, data.statistics, data.sampling
        self._data, self._config, self._device = data, config, device
        self._changed = False
        by_name = {node.name: node for node in graph.nodes}
        self._residuals = {entry.layer: (entry, by_name[entry.other]) for entry in data.residuals}
        self._settled: set[str] = set()  # BatchNorms whose statistics follow from a corrected refit

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        """Walk the graph; activations of all batches are held until their last use."""
        size, indices = self._sampling.batch_size, self._data.indices
        batches = [self._data.split.batch(indices[i : i + size]).to(self._device) for i in range(0, len(indices), size)]
        nodes = list(self._graph.nodes)
        last_use = {used: node for node in nodes for used in node.all_input_nodes}
        values: dict[fx.Node, list[Any]] = {}
        for number, node in enumerate(nodes):
            if node.op == "output":
                break
            values[node] = self._evaluate(node, values, batches)
            for used in [candidate for candidate in values if last_use.get(candidate) is node]:
                del values[used]
            if progress is not None:
                progress(number + 1, len(nodes))

    def _evaluate(self, node: fx.Node, values: dict[fx.Node, list[Any]], batches: list[Tensor]) -> list[Any]:
        if node.op == "placeholder":
            return [batch.clone() for batch in batches]
        if node.op == "get_attr":
            return [_attribute(self._smaller, str(node.target))] * len(batches)
        if node.op == "call_module":
            inputs = [self._argument(node.args[0], values, batch) for batch in range(len(batches))]
            self._visit(str(node.target), inputs, values)
        return [self._call(node, values, batch) for batch in range(len(batches))]

    def _call(self, node: fx.Node, values: dict[fx.Node, list[Any]], batch: int) -> Any:
        args = self._argument(node.args, values, batch)
        kwargs = self._argument(node.kwargs, values, batch)
        if node.op == "call_module":
            return self._smaller.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)

    @staticmethod
    def _argument(argument: Any, values: dict[fx.Node, list[Any]], batch: int) -> Any:
        return fx.node.map_arg(argument, lambda used: values[used][batch])

    def _visit(self, name: str, inputs: list[Any], values: dict[fx.Node, list[Any]]) -> None:
        """Re-estimate one module before it is run."""
        layer = self._smaller.get_submodule(name)
        entry = self._selection.get(name, LayerSelection())
        if entry.inputs is not None and len(entry.inputs) < input_width(self._dense.get_submodule(name)):
            self._changed = True
        if not self._changed or name not in self._may_change:
            return
        if isinstance(layer, _BATCH_NORM) and self._config.reestimate_batchnorm and name not in self._settled:
            _reestimate_batchnorm(layer, inputs)
        elif isinstance(layer, (nn.Conv2d, nn.Linear)) and name in self._statistics:
            residual, other = self._residuals.get(name, (None, None))
            bias = self._refit(name, layer, entry, inputs, None if other is None else values[other])
            if residual is not None and residual.norm is not None:
                self._settle(residual.norm, layer, bias)

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
        inputs: list[Tensor],
        summands: list[Tensor] | None,
    ) -> Tensor:
        """Solve for the layer's weights; return the intercept (m,)."""
        outputs = self._statistics[name].outputs
        kept = slice(None) if entry.outputs is None else entry.outputs
        intercept = layer.bias is not None or self._feeds_batchnorm(name)
        fit = _make_fit(len(outputs), feature_count(layer), layer.weight.shape[0], intercept, self._device)
        row = 0
        for batch, value in enumerate(inputs):
            positions = self._positions(name, layer, value, batch)
            rows = read_rows(layer, value, positions)
            answers = torch.from_numpy(outputs[row : row + len(rows)][:, kept]).to(self._device)
            row += len(rows)
            if summands is not None:
                answers = answers - read_outputs(layer, summands[batch], positions) * self._inverse_gain(name, kept)
            fit.update(rows, answers)
        weight, bias = fit.solve(layer.weight.flatten(1), self._config.relative_ridge)
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(bias)
        return bias

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


def _free_modules(graph: fx.Graph, left_alone: Collection[str]) -> frozenset[str]:
    """Modules that are called once and that the walk may change."""
    return frozenset(name for name, count in called_modules(graph).items() if count == 1 and name not in left_alone)


def _attribute(root: nn.Module, target: str) -> Any:
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _make_fit(
    num_rows: int, num_features: int, num_outputs: int, intercept: bool, device: str
) -> _RowFit | _DualRowFit:
    """The smaller form: the rows themselves where they are fewer than the features, else the normal equations."""
    if num_rows < num_features:
        return _DualRowFit(intercept)
    return _RowFit(num_features, num_outputs, intercept, device)


class _RowFit:
    """Accumulates the normal equations of y on x.

    Centred (shifted by the first batch's means) with an intercept, raw without.
    """

    def __init__(self, num_features: int, num_outputs: int, intercept: bool, device: str) -> None:
        self._count = 0
        self._intercept = intercept
        self._shift = (torch.zeros(num_features, device=device), torch.zeros(num_outputs, device=device))
        self._sum_x = torch.zeros(num_features, dtype=torch.float64, device=device)
        self._sum_y = torch.zeros(num_outputs, dtype=torch.float64, device=device)
        self._xx = GramSum(num_features, device=device)
        self._yx = ProductSum(num_outputs, num_features, device=device)

    def update(self, rows: Tensor, answers: Tensor) -> None:
        """Add rows (t, d) with answers (t, m)."""
        if self._intercept and self._count == 0:
            self._shift = (rows.mean(0), answers.mean(0))
        x, y = rows - self._shift[0], answers - self._shift[1]
        self._count += rows.shape[0]
        self._sum_x += x.sum(0, dtype=torch.float64)
        self._sum_y += y.sum(0, dtype=torch.float64)
        self._xx.update(x)
        self._yx.update(y, x)

    def solve(self, prior: Tensor, relative_ridge: float) -> tuple[Tensor, Tensor]:
        """Ridge regression that shrinks towards `prior` (m, d): directions without data keep the given weights.

        Returns:
            (m, d) weight and (m,) bias in float32.
        """
        mean_x, mean_y = self._sum_x / self._count, self._sum_y / self._count
        if not self._intercept:
            mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
        xx = self._xx.total() / self._count - torch.outer(mean_x, mean_x)
        yx = self._yx.total() / self._count - torch.outer(mean_y, mean_x)
        residual = yx - prior.double() @ xx
        ridge = relative_ridge * xx.diagonal().mean().clamp_min(1e-12)
        xx.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(xx)
        weight = prior.double() + torch.cholesky_solve(residual.T, factor).T
        bias = mean_y + self._shift[1].double() - weight @ (mean_x + self._shift[0].double())
        return weight.float(), bias.float()


class _DualRowFit:
    """Keeps rows and answers, and solves the same regression as :class:`_RowFit` by a (t, t) system.

    Memory is O(t d + t m + t^2 + m d): no (d, d) matrix.
    """

    def __init__(self, intercept: bool) -> None:
        self._intercept = intercept
        self._rows: list[Tensor] = []
        self._answers: list[Tensor] = []

    def update(self, rows: Tensor, answers: Tensor) -> None:
        """Add rows (t, d) with answers (t, m); they are read when the fit is solved."""
        self._rows.append(rows)
        self._answers.append(answers)

    def solve(self, prior: Tensor, relative_ridge: float) -> tuple[Tensor, Tensor]:
        """Ridge regression that shrinks towards `prior`: the dual of :meth:`_RowFit.solve`, with the same ridge.

            W = P + (Y - X P^T)^T (X X^T + t ridge I)^-1 X,   ridge = relative_ridge * trace(X X^T) / (t d)

        X (t, d) and Y (t, m) centred where there is an intercept. Arguments and result are those of the primal form.
        """
        x, mean_x = self._centred(self._rows)
        y, mean_y = self._centred(self._answers)
        kernel = row_kernel(x)
        ridge = relative_ridge * (kernel.trace() / x.numel()).clamp_min(1e-12)
        kernel.diagonal().add_(len(x) * ridge)
        residual = y.addmm_(x, prior.T, alpha=-1.0)
        coefficients = torch.cholesky_solve(residual.double(), torch.linalg.cholesky(kernel))  # (t, m)
        weight = torch.addmm(prior, coefficients.T.float(), x)
        shift = torch.cat([part.double() @ mean_x.double() for part in torch.split(weight, 256)])  # W is never copied
        return weight, (mean_y.double() - shift).float()

    def _centred(self, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(t, k) float32 values less their (k,) mean, and the mean; zero without an intercept."""
        values = torch.cat(parts).float()
        parts.clear()
        mean = values.mean(0, dtype=torch.float64).float() if self._intercept else torch.zeros_like(values[0])
        return values.sub_(mean), mean


def _reestimate_batchnorm(layer: nn.BatchNorm1d | nn.BatchNorm2d, inputs: list[Tensor]) -> None:
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
