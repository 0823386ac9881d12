"""Refinements of the method that were tried and are measured by the ablation; the library has none of them.

- Fisher weights: the regressions count the error of an output as much as the loss feels it, by E[(dL/dy)^2] over images
  with labels drawn from the network's own class probabilities, in place of the gain of the BatchNorm behind it.
- Probes: one group alone is pruned and refit to a few widths, and what KL divergence that costs replaces its refit
  error as predicted loss; other widths are interpolated between logarithms.

Axes: m outputs, d features, c channels, p probed widths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entprune.config import PruneConfig
from entprune.path import SparsityPath, lower_envelope, solve_setting
from entprune.plan import PruningPlan
from entprune.planning import plan_for_widths
from entprune.regression import ConsumerProblem, GroupProblem, RowProblem
from entprune.shared_steps import SharedSteps
from entprune.stages import ImageSet, group_problem
from infra.benchmark.networks import Bench

PROBED_FRACTIONS = (0.75, 0.5, 0.25, 0.1)
PROBE_IMAGES = 1024
_BATCH = 64
_SMALLEST = 1e-12

Divergence = Callable[[PruningPlan], float]


def fisher_weights(bench: Bench) -> dict[str, np.ndarray]:
    """(m,) E[(dL/dy_o)^2] of each consumer's outputs, summed over positions, on the calibration images."""
    network = copy.deepcopy(bench.network.model).eval()
    generator = torch.Generator().manual_seed(bench.config.seed)
    found: dict[str, Tensor] = {}
    for name in bench.network.consumers():
        layer = network.get_submodule(name)
        found[name] = torch.zeros(len(layer.get_parameter("weight")), dtype=torch.float64)
        layer.register_forward_hook(_adds_squares_to(found[name]))
    images = bench.calibration
    for start in range(0, len(images), _BATCH):
        logits = network(images.split.batch(images.indices[start : start + _BATCH]))
        labels = torch.multinomial(logits.detach().softmax(1), 1, generator=generator).flatten()
        torch.autograd.backward(F.cross_entropy(logits, labels, reduction="sum"))
        network.zero_grad()
    return {name: (total / len(images)).numpy() for name, total in found.items()}


def _adds_squares_to(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG001 -- torch's signature
        axis = 1 if isinstance(layer, nn.Conv2d) else output.ndim - 1
        others = [number for number in range(output.ndim) if number != axis]

        def add(slope: Tensor) -> None:
            total.add_(slope.double().square().sum(others))

        output.register_hook(add)

    return hook


def fisher_paths(bench: Bench, config: PruneConfig, weights: Mapping[str, np.ndarray]) -> dict[str, SparsityPath]:
    """Sparsity paths of regressions whose outputs count by their Fisher weights."""
    found, scales = {}, _scales(bench, weights)
    for group in bench.network.groups.groups:
        problem = reweighted(group_problem(bench.network, group, bench.statistics), scales)
        shared = SharedSteps(problem, device=config.device)
        paths = [solve_setting(problem, setting, device=config.device, shared=shared) for setting in config.settings]
        found[group.name] = lower_envelope(group.name, len(group.consumers), paths)
    return found


def _scales(bench: Bench, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(m,) by which the rows of each consumer's weight are multiplied: they hold the gain of the BatchNorm already."""
    gains = {name: bench.network.output_gain(name) for name in weights}
    return {
        name: np.sqrt(weights[name]) / np.where(gains[name] > 0, gains[name], np.inf) for name in weights
    }  # an output without gain is not felt by anything


def reweighted(problem: GroupProblem, scales: Mapping[str, np.ndarray]) -> GroupProblem:
    """The problem with rows of its weights scaled; each consumer's total variance stays what it was."""
    consumers = tuple(_reweighted(consumer, scales[consumer.layer]) for consumer in problem.consumers)
    return replace(problem, consumers=consumers)


def _reweighted(consumer: ConsumerProblem | RowProblem, scale: np.ndarray) -> ConsumerProblem | RowProblem:
    weight = consumer.weight * scale[:, None].astype(np.float32)
    before, after = _variance(consumer, consumer.weight), _variance(consumer, weight)
    return replace(consumer, weight=weight * np.float32((before / after) ** 0.5 if after > 0 else 1.0))


def _variance(consumer: ConsumerProblem | RowProblem, weight: np.ndarray) -> float:
    """tr(W G W^T)."""
    if isinstance(consumer, RowProblem):
        return float(np.square(consumer.factor @ weight.T, dtype=np.float64).sum())
    return float(((weight @ consumer.gram) * weight).sum(dtype=np.float64))


def probe_images(bench: Bench) -> ImageSet:
    """Training images that are neither for calibration nor for validation."""
    used = np.concatenate([bench.calibration.indices, bench.validation.indices])
    free = np.setdiff1d(np.arange(len(bench.data.train)), used)
    chosen = np.random.default_rng(bench.config.seed).permutation(free)[:PROBE_IMAGES]
    return ImageSet(split=bench.data.train, indices=chosen)


def probed_losses(paths: Mapping[str, SparsityPath], divergence: Divergence) -> dict[str, np.ndarray]:
    """(c + 1,) predicted loss of each group at every width.

    Args:
        paths: of all groups.
        divergence: KL from the dense network of the refit network of a plan.
    """
    full = {name: path.num_channels for name, path in paths.items()}
    found = {}
    for name, path in paths.items():
        widths = sorted({max(1, round(fraction * full[name])) for fraction in PROBED_FRACTIONS} - {full[name]})
        costs = [divergence(plan_for_widths(paths, {**full, name: width})) for width in widths]
        found[name] = interpolated(path.errors, np.array(widths), np.array(costs))
    return found


def interpolated(errors: np.ndarray, widths: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """(c + 1,) cost at every width, never rising with it.

    Args:
        errors: (c + 1,) refit errors, falling.
        widths: (p,) probed ones, ascending.
        costs: (p,) what they cost; outside of them cost is proportional to the error.
    """
    known = np.log(np.maximum(errors[widths], _SMALLEST))[::-1]  # ascending
    logs = np.maximum.accumulate(np.log(np.maximum(costs, _SMALLEST))[::-1])
    wanted = np.log(np.maximum(errors, _SMALLEST))
    inside = np.interp(wanted, known, logs)
    beyond = np.minimum(wanted - known[0], 0.0) + np.maximum(wanted - known[-1], 0.0)
    return np.where(errors > 0, np.exp(inside + beyond), 0.0)
