"""Widths of all groups for a budget: least predicted loss at a given size.

The size of a network is bilinear in neighbouring widths (a layer costs inputs times outputs), so each group's saving is
re-evaluated as its neighbours shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import nn

from entprune.errors import ConfigError
from entprune.groups import ChannelGroups
from entprune.layers import find_part, output_width, part_width

Objective = Literal["parameters", "macs"]
Limits = Mapping[Objective, float]  # kept fraction of the dense network's size, in (0, 1]
Widths = Mapping[str, int] | Mapping[str, int | np.ndarray]
Ranks = Mapping[str, int]  # of layers that are made two
Excess = Callable[[Mapping[str, int]], dict[Objective, float]]  # how many times over which limits, where it is over
_BISECTIONS = 40
_SWEEPS = 30
_BLENDS = 6  # trials of how much either of two limits counts
_TIGHTENINGS = 20
_BLEND_UNIT = 1e6  # large, because differences of cost below one count as one


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """Size of one layer as a function of the widths of the groups it touches.

    parameters = taps * inputs * outputs + per_output * outputs, MACs = taps * inputs * outputs * positions (of rank r:
    r * (taps * inputs + outputs) in place of taps * inputs * outputs), with
    inputs = fixed_inputs + sum_g input_blocks[g] * width_g and outputs alike; no parameters where another layer that
    shares them was counted (`is_counted` false).
    """

    name: str
    taps: int
    per_output: int
    positions: int
    fixed_inputs: int
    fixed_outputs: int
    input_blocks: Mapping[str, int]
    output_blocks: Mapping[str, int]
    is_counted: bool = True

    def inputs(self, widths: Widths) -> int | np.ndarray:
        """Inputs at these widths; an array where a width is one."""
        return self.fixed_inputs + sum(block * widths[name] for name, block in self.input_blocks.items())

    def outputs(self, widths: Widths) -> int | np.ndarray:
        """Outputs likewise."""
        return self.fixed_outputs + sum(block * widths[name] for name, block in self.output_blocks.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Parameters and MACs of the network for any widths, without building it."""

    layers: tuple[LayerCost, ...]
    untouched_parameters: int

    def parameters(self, widths: Mapping[str, int], ranks: Ranks | None = None) -> int:
        """Parameters at these widths, and ranks of layers that have one."""
        return int(self.evaluate(widths, "parameters", ranks))

    def macs(self, widths: Mapping[str, int], ranks: Ranks | None = None) -> int:
        """Multiply-accumulates of one image in convolutions and linear layers."""
        return int(self.evaluate(widths, "macs", ranks))

    def evaluate(self, widths: Mapping[str, int], objective: Objective, ranks: Ranks | None = None) -> float:
        """Cost in parameters or MACs."""
        total = float(self.untouched_parameters) if objective == "parameters" else 0.0
        known = ranks or {}
        return total + sum(float(_layer_cost(layer, widths, objective, known.get(layer.name))) for layer in self.layers)

    def by_group(
        self, widths: Mapping[str, int], objective: Objective, ranks: Ranks | None = None
    ) -> tuple[dict[str, int], int]:
        """Cost of the layers that compute each group, and of everything that computes none; together the whole.

        What one layer costs is split among the groups that it writes, in proportion to its outputs in them.
        """
        written: dict[str, float] = {}
        for layer in self.layers:
            cost = float(_layer_cost(layer, widths, objective, (ranks or {}).get(layer.name)))
            sizes = {group: block * widths[group] for group, block in layer.output_blocks.items()}
            outputs = max(1, layer.fixed_outputs + sum(sizes.values()))
            for group, size in sizes.items():
                written[group] = written.get(group, 0.0) + cost * size / outputs
        rounded = {group: round(cost) for group, cost in written.items()}
        return rounded, round(self.evaluate(widths, objective, ranks)) - sum(rounded.values())

    def blocks(self) -> dict[str, int]:
        """Channels that the first layer to write a group gets for each of the group's."""
        found: dict[str, int] = {}
        for layer in self.layers:
            for group, block in layer.output_blocks.items():
                found.setdefault(group, block)
        return found

    def along(self, group: str, widths: Mapping[str, int], num_channels: int, objective: Objective) -> np.ndarray:
        """(c + 1,) part of the cost that depends on one group, for every width of it, the others fixed."""
        width = np.arange(num_channels + 1, dtype=np.float64)
        trial: dict[str, int | np.ndarray] = {**widths, group: width}
        touched = (x for x in self.layers if group in x.input_blocks or group in x.output_blocks)
        return np.asarray(sum((_layer_cost(layer, trial, objective) for layer in touched), np.zeros_like(width)))


def _layer_cost(
    layer: LayerCost,
    widths: Widths,
    objective: Objective,
    rank: int | None = None,
) -> float | np.ndarray:
    inputs, outputs = layer.inputs(widths), layer.outputs(widths)
    dense: float | np.ndarray = (
        layer.taps * inputs * outputs if rank is None else rank * (layer.taps * inputs + outputs)
    )
    if objective == "macs":
        return dense * layer.positions
    return (dense + layer.per_output * outputs) * layer.is_counted


def build_cost_model(model: nn.Module, groups: ChannelGroups, input_shape: tuple[int, int, int]) -> CostModel:
    """Derive the cost model from the layers' shapes and one forward pass (for output positions)."""
    positions = _output_positions(model, input_shape)
    reads: dict[str, dict[str, int]] = {}
    writes: dict[str, dict[str, int]] = {}
    axes: dict[str, int] = {}
    for group in groups.groups:
        for piece in (*group.consumers, *group.readers):
            reads.setdefault(piece.layer, {})[group.name] = piece.index.shape[1]
        for piece in (*group.producers, *group.followers):
            writes.setdefault(piece.layer, {})[group.name] = piece.index.shape[1]
            axes[piece.layer] = piece.axis
    full = {group.name: group.num_channels for group in groups.groups}
    matrices = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    counted: set[nn.Parameter] = set()
    layers: list[LayerCost] = []
    for name in dict.fromkeys([*matrices, *writes]):
        part = find_part(model, name)
        own = {part} if isinstance(part, nn.Parameter) else set(_own_parameters(part))
        size = _size(part, axes.get(name, 0), has_parameters=bool(own - counted))
        touched = reads.get(name, {}), writes.get(name, {})
        layers.append(_describe(name, size, positions.get(name, 0), *touched, full))
        counted |= own
    rest = sum(parameter.numel() for parameter in set(model.parameters()) - counted)
    return CostModel(layers=tuple(layers), untouched_parameters=rest)


def _own_parameters(part: nn.Module | torch.Tensor) -> list[nn.Parameter]:
    return list(part.parameters(recurse=False)) if isinstance(part, nn.Module) else []


@dataclass(frozen=True, slots=True)
class _Size:
    """Of one part at full width: its inputs and outputs, taps of each pair, further parameters of each output."""

    inputs: int
    outputs: int
    taps: int
    per_output: int
    is_counted: bool


def _size(part: nn.Module | torch.Tensor, axis: int, *, has_parameters: bool) -> _Size:
    """Size of a part; what an earlier layer shares with it was counted there (`has_parameters` false)."""
    if isinstance(part, nn.Conv2d):
        taps, per_output = part.kernel_size[0] * part.kernel_size[1], int(part.bias is not None)
        return _Size(part.in_channels // part.groups, part.out_channels, taps, per_output, has_parameters)
    if isinstance(part, nn.Linear):
        return _Size(part.in_features, part.out_features, 1, int(part.bias is not None), has_parameters)
    width = part_width(part, axis)
    numbers = part.numel() if isinstance(part, torch.Tensor) else sum(p.numel() for p in _own_parameters(part))
    return _Size(0, width, 0, numbers // width, has_parameters)


def _describe(
    name: str, size: _Size, positions: int, reads: Mapping[str, int], writes: Mapping[str, int], full: Mapping[str, int]
) -> LayerCost:
    return LayerCost(
        name=name,
        taps=size.taps,
        per_output=size.per_output,
        positions=positions,
        fixed_inputs=size.inputs - sum(block * full[group] for group, block in reads.items()) if size.taps else 0,
        fixed_outputs=size.outputs - sum(block * full[group] for group, block in writes.items()),
        input_blocks=dict(reads) if size.taps else {},
        output_blocks=dict(writes),
        is_counted=size.is_counted,
    )


def _output_positions(model: nn.Module, input_shape: tuple[int, int, int]) -> dict[str, int]:
    """Output positions per image of every convolution and linear layer."""
    found: dict[str, int] = {}

    def record(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: object, output: torch.Tensor) -> None:
            found[name] = found.get(name, 0) + output.numel() // output_width(module)

        return module.register_forward_hook(hook)

    handles = [record(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, *input_shape, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocationProblem:
    """What the allocation chooses from.

    Attributes:
        losses: per group the (c + 1,) predicted loss at each width, non-increasing.
        minimum: per group the least width.
        cost: size of the network at any widths.
        objective: what is made small.
        round_to: widths of layers are multiples of this; a group's dense width is always allowed.
        blocks: per group the channels that a layer gets for each of the group's, where that is not one.
    """

    losses: Mapping[str, np.ndarray]
    minimum: Mapping[str, int]
    cost: CostModel
    objective: Objective = "parameters"
    round_to: int = 1
    blocks: Mapping[str, int] = field(default_factory=dict)

    def full(self) -> dict[str, int]:
        """Dense widths."""
        return {name: len(loss) - 1 for name, loss in self.losses.items()}

    def smallest(self) -> dict[str, int]:
        """Least widths."""
        return {name: int(self.allowed(name)[0]) for name in self.losses}

    def allowed(self, name: str) -> np.ndarray:
        """Widths that the group may take, ascending; the dense width is always among them."""
        dense = len(self.losses[name]) - 1
        width = np.arange(min(self.minimum[name], dense), dense + 1)
        step = self.round_to // math.gcd(self.round_to, self.blocks.get(name, 1))
        return np.asarray(width[(width % step == 0) | (width == dense)])

    def fraction(self, widths: Mapping[str, int], ranks: Iterable[tuple[str, int]] = ()) -> float:
        """Fraction of the dense network's cost, with ranks of layers that are made two."""
        kept = self.cost.evaluate(widths, self.objective, dict(ranks))
        return kept / self.cost.evaluate(self.full(), self.objective)

    def loss(self, widths: Mapping[str, int]) -> float:
        """Predicted loss: the sum over groups."""
        return float(sum(loss[widths[name]] for name, loss in self.losses.items()))


def allocate(problem: AllocationProblem, kept_fraction: float) -> dict[str, int]:
    """Widths of least predicted loss whose cost is at most `kept_fraction` of the dense network's.

    Minimises loss + price * cost by coordinate descent for a price found by bisection, then spends what is left of
    the budget greedily, which closes the gaps that a price leaves on non-convex curves.

    Raises:
        ConfigError: the fraction lies outside (0, 1], or even the least widths cost more.
    """
    if not 0.0 < kept_fraction <= 1.0:
        raise ConfigError(
            f"expected a kept fraction in (0, 1], got {kept_fraction}; ask for a removed fraction below 1."
        )
    dense = problem.cost.evaluate(problem.full(), problem.objective)
    target = kept_fraction * dense
    least = problem.cost.evaluate(problem.smallest(), problem.objective)
    if least > target:
        raise ConfigError(
            f"at most {1 - least / dense:.3%} of the {problem.objective} can be removed from this network, "
            f"{1 - kept_fraction:.3%} was asked; lower the budget or the least widths."
        )
    low, high = 1e-9, 1e9  # price of the whole dense cost, log scale
    widths = problem.smallest()
    for _ in range(_BISECTIONS):
        price = (low * high) ** 0.5
        trial = _descend(problem, price / dense)
        if problem.cost.evaluate(trial, problem.objective) <= target:
            high, widths = price, trial
        else:
            low = price
    return _spend(problem, widths, target)


def allocate_within(problem: AllocationProblem, limits: Limits) -> dict[str, int]:
    """Widths of least predicted loss that keep to several limits at once.

    One limit is allocated alone; if the others hold then, nothing better exists. Otherwise the costs are blended, each
    in units of its limit: whatever keeps to all limits keeps to every blend, and the blend is sought that both limits
    bind.

    Raises:
        ConfigError: even the least widths exceed a limit.
    """
    if not limits:
        return problem.full()
    problems = {objective: replace(problem, objective=objective) for objective in limits}

    def exceeded(widths: Mapping[str, int]) -> dict[Objective, float]:
        found = {objective: entry.fraction(widths) / limits[objective] for objective, entry in problems.items()}
        return {objective: value for objective, value in found.items() if value > 1.0 + 1e-12}

    alone = [allocate(entry, limits[objective]) for objective, entry in problems.items()]
    sufficient = [widths for widths in alone if not exceeded(widths)]
    if not sufficient:
        sufficient = _blend(problem, limits, exceeded)
    return min(sufficient, key=problem.loss)


def _blend(problem: AllocationProblem, limits: Limits, exceeded: Excess) -> list[dict[str, int]]:
    """Widths that keep to both limits, for several blends; at least the smallest ones."""
    found = [problem.smallest()]
    low, high = 0.0, 1.0  # share of the MACs
    for _ in range(_BLENDS):
        share = 0.5 * (low + high)
        blended = replace(problem, cost=_blended_cost(problem, limits, share))
        fraction = _BLEND_UNIT / blended.cost.evaluate(blended.full(), blended.objective)
        widths = allocate(blended, fraction)
        over = exceeded(widths)
        found.append(_tighten(blended, fraction, widths, exceeded))
        if not over:
            break
        low, high = (share, high) if "macs" in over else (low, share)
    return found


def _tighten(blended: AllocationProblem, fraction: float, widths: dict[str, int], exceeded: Excess) -> dict[str, int]:
    """Allocate less of a blend until each limit is kept: spare room of one cannot pay for the other."""
    least = blended.fraction(blended.smallest())
    for _ in range(_TIGHTENINGS):
        over = exceeded(widths)
        if not over:
            return widths
        fraction /= 1.002 * max(over.values())
        if fraction <= least:
            break
        widths = allocate(blended, fraction)
    return blended.smallest()


@dataclass(frozen=True, kw_only=True, slots=True)
class _BlendedCost(CostModel):
    """A weighted sum of parameters and MACs, whatever the objective."""

    weights: Mapping[Objective, float]

    def evaluate(self, widths: Mapping[str, int], objective: Objective, ranks: Ranks | None = None) -> float:  # noqa: ARG002 -- the base's
        return sum(weight * CostModel.evaluate(self, widths, name) for name, weight in self.weights.items())

    def along(self, group: str, widths: Mapping[str, int], num_channels: int, objective: Objective) -> np.ndarray:  # noqa: ARG002
        parts = [w * CostModel.along(self, group, widths, num_channels, name) for name, w in self.weights.items()]
        return np.asarray(sum(parts, np.zeros(num_channels + 1)))


def _blended_cost(problem: AllocationProblem, limits: Limits, share: float) -> _BlendedCost:
    """Costs in units of their limits, so that a network at both limits costs one unit."""
    full, cost = problem.full(), problem.cost
    shares: dict[Objective, float] = {"macs": share, "parameters": 1.0 - share}
    weights = {name: part * _BLEND_UNIT / (limits[name] * cost.evaluate(full, name)) for name, part in shares.items()}
    return _BlendedCost(layers=cost.layers, untouched_parameters=cost.untouched_parameters, weights=weights)


def _descend(problem: AllocationProblem, price: float) -> dict[str, int]:
    """Coordinate descent from the dense and from the least widths; the better end point."""
    ends = [_descend_from(problem, price, start) for start in (problem.full(), problem.smallest())]
    return min(ends, key=lambda widths: problem.loss(widths) + price * problem.cost.evaluate(widths, problem.objective))


def _descend_from(problem: AllocationProblem, price: float, start: dict[str, int]) -> dict[str, int]:
    widths = dict(start)
    for _ in range(_SWEEPS):
        before = dict(widths)
        for name, loss in problem.losses.items():
            allowed = problem.allowed(name)
            cost = problem.cost.along(name, widths, len(loss) - 1, problem.objective)
            widths[name] = int(allowed[(loss + price * cost)[allowed].argmin()])
        if widths == before:
            break
    return widths


def _spend(problem: AllocationProblem, widths: dict[str, int], target: float) -> dict[str, int]:
    """Widen the group with the largest loss reduction per cost while the budget lasts."""
    widths = dict(widths)
    while True:
        spare = target - problem.cost.evaluate(widths, problem.objective)
        best: tuple[float, str, int] | None = None
        for name, loss in problem.losses.items():
            cost = problem.cost.along(name, widths, len(loss) - 1, problem.objective)
            allowed = problem.allowed(name)
            wider = allowed[(allowed > widths[name]) & (cost[allowed] - cost[widths[name]] <= spare)]
            if not len(wider):
                continue
            gain = (loss[widths[name]] - loss[wider]) / np.maximum(cost[wider] - cost[widths[name]], 1.0)
            if gain.max() > 0 and (best is None or gain.max() > best[0]):
                best = (float(gain.max()), name, int(wider[gain.argmax()]))
        if best is None:
            return widths
        widths[best[1]] = best[2]
