"""The entropic regression of one channel group.

Alternating closed-form steps for the layer weights and the channel probabilities.

Objective, with every consumer j scaled so that its output variance is one and its inputs have unit scale per channel:

    J(w, Lambda) = sum_j tr[(W_j - Lambda_j D) G_j (W_j - Lambda_j D)^T] + eps_l2 sum_j ||Lambda_j||_F^2 + eps_w H(w)

Axes: d features, m outputs, c channels, b features per channel (d = c * b, channel-major after :func:`build_problem`).

Source: method notes, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entprune.errors import ConfigError
from entprune.simplex import closed_form_probability, entropy, probability_step

_SCALE_FLOOR = 1e-2
_RELATIVE_RIDGE = 1e-6
_MAX_RIDGE_ATTEMPTS = 6


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ConsumerProblem:
    """One consumer's regression in scaled units, channel-major.

    Attributes:
        layer: consumer's name.
        gram: (d, d) float32 scaled covariance of its inputs.
        weight: (m, d) float32 scaled dense weight, tr(weight gram weight^T) = 1 (or 0 for a constant layer).
        block: b, features per channel.
    """

    layer: str
    gram: np.ndarray
    weight: np.ndarray
    block: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupProblem:
    """Regressions of all consumers that share one vector of channel probabilities."""

    name: str
    num_channels: int
    consumers: tuple[ConsumerProblem, ...]

    def solve_cost(self) -> float:
        """Floating-point operations of one Lambda step at full width: the unit by which work is ordered."""
        sizes = ((consumer.gram.shape[0], consumer.weight.shape[0]) for consumer in self.consumers)
        return float(sum(features**3 / 3 + 2 * features**2 * outputs for features, outputs in sizes))


def build_problem(
    name: str,
    num_channels: int,
    consumers: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> GroupProblem:
    """Scale and reorder the regressions of one group.

    Args:
        name: group name.
        num_channels: c.
        consumers: per layer the covariance (d, d), the dense weight (m, d), and the features of each channel (c, b);
            features of other groups stay as they are, and the output variance is that of the whole layer.

    Returns:
        The problem in scaled float32 units.
    """
    return GroupProblem(
        name=name,
        num_channels=num_channels,
        consumers=tuple(
            _scaled_consumer(layer, covariance, weight, features)
            for layer, (covariance, weight, features) in consumers.items()
        ),
    )


def _scaled_consumer(layer: str, covariance: np.ndarray, weight: np.ndarray, features: np.ndarray) -> ConsumerProblem:
    order = features.ravel()
    gram = torch.from_numpy(np.ascontiguousarray(covariance[np.ix_(order, order)]))
    matrix = torch.from_numpy(np.ascontiguousarray(weight[:, order])).to(gram.dtype)
    block = features.shape[1]
    scale = gram.diagonal().clamp_min(0).reshape(-1, block).mean(1).sqrt()  # (c,)
    floor = _SCALE_FLOOR * scale.square().mean().sqrt()
    scale = scale.maximum(floor).clamp_min(1e-12).repeat_interleave(block)  # (d,)
    gram = gram / torch.outer(scale, scale)
    matrix = matrix * scale
    variance = _output_variance(weight, covariance)
    if variance > 0:
        matrix = matrix / variance**0.5
    return ConsumerProblem(layer=layer, gram=gram.float().numpy(), weight=matrix.float().numpy(), block=block)


def _output_variance(weight: np.ndarray, covariance: np.ndarray) -> float:
    """tr(W G W^T), of all that the layer reads."""
    matrix, gram = torch.from_numpy(np.ascontiguousarray(weight)), torch.from_numpy(np.ascontiguousarray(covariance))
    return float(((matrix.to(gram.dtype) @ gram) * matrix).sum())


def cholesky_with_ridge(matrix: Tensor, *, relative_ridge: float = _RELATIVE_RIDGE) -> Tensor:
    """Lower Cholesky factor of a symmetric positive semi-definite matrix plus a ridge relative to its mean diagonal.

    The ridge grows tenfold until the factorisation succeeds: rank-deficient Gram matrices are the rule in late layers.

    Raises:
        ConfigError: the matrix holds NaN or infinity, so that no ridge helps.
    """
    ridge = relative_ridge * float(matrix.diagonal().mean().clamp_min(1e-30))
    for _ in range(_MAX_RIDGE_ATTEMPTS):
        shifted = matrix.clone()
        shifted.diagonal().add_(ridge)
        factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) == 0:
            return torch.as_tensor(factor)
        ridge *= 10.0
    raise ConfigError(
        "expected a finite positive semi-definite Gram matrix, got one without a Cholesky factor; "
        "check the data for NaN."
    )


@dataclass(slots=True, eq=False)
class EntropicState:
    """Alive channels, their probabilities and the shrunken matrices: the state of one continuation.

    Attributes:
        alive: (a,) channel numbers still in the problem.
        probability: (a,) float64 point of the simplex.
        grams, targets, weights: per consumer (a*b, a*b) gram, (a*b, m) gram times dense weight, (m, a*b) dense weight.
        blocks: features per channel of each consumer.
        total: number of consumers with any variance to explain.
    """

    alive: Tensor
    probability: Tensor
    grams: list[Tensor]
    targets: list[Tensor]
    blocks: list[int]
    total: float


def initial_state(problem: GroupProblem, *, device: str = "cpu") -> EntropicState:
    """All channels, with the probabilities that the dense weights imply.

    The w step at Q = W, the limit of a vanishing L2 weight.
    """
    grams = [torch.from_numpy(consumer.gram).to(device) for consumer in problem.consumers]
    weights = [torch.from_numpy(consumer.weight).to(device) for consumer in problem.consumers]
    targets = [gram @ weight.T for gram, weight in zip(grams, weights, strict=True)]
    total = sum(float((target * weight.T).double().sum()) for target, weight in zip(targets, weights, strict=True))
    norm_squared = sum(
        (weight.double().square().sum(0).reshape(-1, consumer.block).sum(1).cpu()
         for weight, consumer in zip(weights, problem.consumers, strict=True)),
        torch.zeros(problem.num_channels, dtype=torch.float64),
    )  # fmt: skip
    return EntropicState(
        alive=torch.arange(problem.num_channels),
        probability=closed_form_probability(norm_squared),
        grams=grams,
        targets=targets,
        blocks=[consumer.block for consumer in problem.consumers],
        total=total,
    )


def weight_step(state: EntropicState, l2_weight: float) -> tuple[Tensor, float]:
    """Lambda step at fixed w: one ridge regression per consumer, written so that w_c -> 0 is harmless.

    Returns:
        (a,) squared norms s_c^2 of the channels' blocks of Q = Lambda D, and the objective without the entropy term.
    """
    norm_squared = torch.zeros_like(state.probability)
    explained = 0.0
    for gram, target, block in zip(state.grams, state.targets, state.blocks, strict=True):
        scale = state.probability.to(gram).repeat_interleave(block)  # (d,)
        system = gram * torch.outer(scale, scale)
        ridge = l2_weight + _RELATIVE_RIDGE * float(system.diagonal().mean())
        system.diagonal().add_(ridge)
        factor = _factor(system)
        right = target * scale[:, None]  # (d, m)
        solution = torch.cholesky_solve(right, factor)  # Lambda^T
        explained += float((solution * right).double().sum())
        blocks = (solution * scale[:, None]).square().sum(1).reshape(-1, block).sum(1)  # (a,)
        norm_squared += blocks.double().cpu()
    return norm_squared, state.total - explained


def _factor(system: Tensor) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(system)
    return factor if int(info) == 0 else cholesky_with_ridge(system, relative_ridge=1e-5)


def alternate(
    state: EntropicState, *, l2_weight: float, entropy_weight: float, iterations: int
) -> tuple[Tensor, list[float]]:
    """Alternate the two closed-form steps at fixed settings; no channel is dropped.

    Returns:
        (a,) probabilities after the last step, and J after every weight step (never rising).
    """
    history: list[float] = []
    for _ in range(iterations):
        norm_squared, loss = weight_step(state, l2_weight)
        history.append(loss + entropy_weight * float(entropy(state.probability)))
        state.probability = probability_step(
            norm_squared, l2_weight=l2_weight, entropy_weight=entropy_weight, current=state.probability
        )
    return state.probability, history


def keep_channels(state: EntropicState, kept: Tensor) -> None:
    """Remove every channel outside `kept` (positions into `alive`) with its rows and columns; renormalise w."""
    for number, block in enumerate(state.blocks):
        features = (kept[:, None] * block + torch.arange(block)).flatten().to(state.grams[number].device)
        state.grams[number] = state.grams[number].index_select(0, features).index_select(1, features)
        state.targets[number] = state.targets[number].index_select(0, features)
    state.alive = state.alive[kept]
    state.probability = state.probability[kept] / state.probability[kept].sum()


def nested_errors(problem: GroupProblem, order: Sequence[int], *, device: str = "cpu") -> np.ndarray:
    """Unexplained variance after refitting on the first k channels of an order, for every k.

    One factorisation per consumer serves all k.

    With G = L L^T in that order and Z = L^-1 G W^T, the first k blocks explain exactly the squared norm of the first k
    blocks of Z, because the leading part of L is the factor of the leading part of G.

    Args:
        order: all c channels, most important first.

    Returns:
        (c + 1,) float64: summed over consumers, entry k for k channels kept; entry 0 is the total variance.
    """
    channels = torch.as_tensor(np.asarray(order, dtype=np.int64))
    total, explained = 0.0, torch.zeros(len(order), dtype=torch.float64)
    for consumer in problem.consumers:
        features = (channels[:, None] * consumer.block + torch.arange(consumer.block)).flatten().to(device)
        gram = torch.from_numpy(consumer.gram).to(device)[features][:, features]
        weight = torch.from_numpy(consumer.weight).to(device)[:, features]
        factor = cholesky_with_ridge(gram)
        target = gram @ weight.T
        rotated = torch.linalg.solve_triangular(factor, target, upper=False)  # Z: (d, m)
        total += float((target * weight.T).double().sum())
        explained += rotated.double().square().sum(1).reshape(-1, consumer.block).sum(1).cpu()
    errors = np.concatenate([[total], total - np.cumsum(explained.numpy())])
    return np.minimum.accumulate(np.maximum(errors, 0.0))


def quadratic_probability_step(
    problem: GroupProblem,
    layer_weights: Sequence[Tensor],
    *,
    entropy_weight: float,
    current: Tensor,
    iterations: int = 500,
) -> Tensor:
    """Minimise J over w at fixed Lambda: form (b) of the w step, an independent check of form (a).

        min_w  w^T A w - 2 b^T w + eps_w H(w)    over the simplex,   A = block sums of (Lambda^T Lambda) o G

    Solved by entropic mirror descent with backtracking, so the objective never rises.

    Args:
        layer_weights: Lambda_j (m, d) per consumer.
        current: (c,) start.
    """
    quadratic, linear = _quadratic_form(problem, layer_weights)
    probability = current.double().clone()
    step = 1.0 / float(quadratic.abs().sum(1).max().clamp_min(1e-30))

    def value(candidate: Tensor) -> float:
        return float(candidate @ quadratic @ candidate - 2 * linear @ candidate + entropy_weight * entropy(candidate))

    present = value(probability)
    for _ in range(iterations):
        gradient = 2 * (quadratic @ probability - linear) - entropy_weight * (probability.clamp_min(1e-300).log() + 1)
        candidate = torch.softmax(probability.clamp_min(1e-300).log() - step * gradient, 0)
        proposed = value(candidate)
        if proposed <= present:
            probability, present, step = candidate, proposed, step * 1.3
        else:
            step *= 0.5
    return probability


def _quadratic_form(problem: GroupProblem, layer_weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    count = problem.num_channels
    quadratic = torch.zeros(count, count, dtype=torch.float64)
    linear = torch.zeros(count, dtype=torch.float64)
    for consumer, layer_weight in zip(problem.consumers, layer_weights, strict=True):
        gram = torch.from_numpy(consumer.gram).double()
        weight = torch.from_numpy(consumer.weight).double()
        dense = layer_weight.double()
        product = (dense.T @ dense) * gram
        quadratic += product.reshape(count, consumer.block, count, consumer.block).sum((1, 3))
        linear += (dense * (weight @ gram)).sum(0).reshape(count, consumer.block).sum(1)
    return quadratic, linear
