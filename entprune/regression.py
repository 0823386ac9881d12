"""The entropic regression of one channel group.

Alternating closed-form steps for the layer weights and the channel probabilities.

Objective, with every consumer j scaled so that its output variance is one and its inputs have unit scale per channel:

    J(w, Lambda) = sum_j tr[(W_j - Lambda_j D) G_j (W_j - Lambda_j D)^T] + eps_l2 sum_j ||Lambda_j||_F^2 + eps_w H(w)

Axes: t rows, d features, m outputs, c channels, b features per channel (d = c * b, channel-major after
:func:`build_problem`).

Source: method notes, section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from entprune.heldout import held_out_errors
from entprune.moments import RowMoments
from entprune.ridge import GramRidge, Ridge, RowRidge, cholesky_with_ridge, compressed_answers
from entprune.simplex import closed_form_probability, entropy, probability_step

_SCALE_FLOOR = 1e-2


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

    def step_cost(self) -> float:
        """Floating-point operations of one Lambda step."""
        outputs, features = self.weight.shape
        return float(features**3 / 3 + 2 * features**2 * outputs)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowProblem:
    """The same of a consumer with fewer rows than features, whose Gram matrix is never formed: gram = factor^T factor.

    Attributes:
        layer, weight, block: as in :class:`ConsumerProblem`.
        factor: (t, d) float32 centred, scaled rows over sqrt(t), t < d.
    """

    layer: str
    factor: np.ndarray
    weight: np.ndarray
    block: int

    def step_cost(self) -> float:
        """Floating-point operations of one Lambda step."""
        rows, features = self.factor.shape
        return float(4 * rows**2 * features + rows**3 / 3 + 4 * rows**2 * min(rows, len(self.weight)))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupProblem:
    """Regressions of all consumers that share one vector of channel probabilities."""

    name: str
    num_channels: int
    consumers: tuple[ConsumerProblem | RowProblem, ...]

    def solve_cost(self) -> float:
        """Floating-point operations of one Lambda step at full width: the unit by which work is ordered."""
        return float(sum(consumer.step_cost() for consumer in self.consumers))


def build_problem(
    name: str,
    num_channels: int,
    consumers: Mapping[str, tuple[np.ndarray | RowMoments, np.ndarray, np.ndarray]],
    variances: Mapping[str, float] | None = None,
) -> GroupProblem:
    """Scale and reorder the regressions of one group.

    Args:
        name: group name.
        num_channels: c.
        consumers: per layer the covariance (d, d) or the rows (t, d), the dense weight (m, d), and the features of each
            channel (c, b); features of other groups stay as they are, and the output variance is that of the whole
            layer.
        variances: what a layer's errors are measured against, where it is not the variance of its outputs: that of the
            sum for the last layer of a residual branch.

    Returns:
        The problem in scaled float32 units.
    """
    known = variances or {}
    return GroupProblem(
        name=name,
        num_channels=num_channels,
        consumers=tuple(
            _scaled_rows(layer, inputs, weight, features, known.get(layer))
            if isinstance(inputs, RowMoments)
            else _scaled_consumer(layer, inputs, weight, features, known.get(layer))
            for layer, (inputs, weight, features) in consumers.items()
        ),
    )


def _scaled_consumer(
    layer: str, covariance: np.ndarray, weight: np.ndarray, features: np.ndarray, variance: float | None
) -> ConsumerProblem:
    order = features.ravel()
    gram = torch.from_numpy(np.ascontiguousarray(covariance[np.ix_(order, order)]))
    matrix = torch.from_numpy(np.ascontiguousarray(weight[:, order])).to(gram.dtype)
    block = features.shape[1]
    scale = _feature_scale(gram.diagonal(), block)
    gram = gram / torch.outer(scale, scale)
    matrix = matrix * scale
    variance = variance or _output_variance(weight, covariance)
    if variance > 0:
        matrix = matrix / variance**0.5
    return ConsumerProblem(layer=layer, gram=gram.float().numpy(), weight=matrix.float().numpy(), block=block)


def _scaled_rows(
    layer: str, moments: RowMoments, weight: np.ndarray, features: np.ndarray, variance: float | None
) -> ConsumerProblem | RowProblem:
    """The same from rows (t, d); a Gram matrix if the group's own features are no more than the rows."""
    order, block = features.ravel(), features.shape[1]
    whole, weight = moments.factor(), weight.astype(np.float32, copy=False)
    factor, matrix = whole[:, order], weight[:, order]  # indexing copies
    scale = _feature_scale(torch.from_numpy(np.einsum("td,td->d", factor, factor, dtype=np.float64)), block).numpy()
    variance = variance or _row_output_variance(weight, whole)
    factor /= scale.astype(np.float32)
    matrix *= (scale / variance**0.5 if variance > 0 else scale).astype(np.float32)
    if len(order) > moments.count:
        return RowProblem(layer=layer, factor=factor, weight=matrix, block=block)
    exact = factor.astype(np.float64)
    return ConsumerProblem(layer=layer, gram=(exact.T @ exact).astype(np.float32), weight=matrix, block=block)


def _feature_scale(variance: Tensor, block: int) -> Tensor:
    """(d,) scale of each feature's channel from the variances (d,), floored: silent channels stay quiet."""
    scale = variance.clamp_min(0).reshape(-1, block).mean(1).sqrt()  # (c,)
    floor = _SCALE_FLOOR * scale.square().mean().sqrt()
    return scale.maximum(floor).clamp_min(1e-12).repeat_interleave(block)


def _output_variance(weight: np.ndarray, covariance: np.ndarray) -> float:
    """tr(W G W^T), of all that the layer reads."""
    matrix, gram = torch.from_numpy(np.ascontiguousarray(weight)), torch.from_numpy(np.ascontiguousarray(covariance))
    return float(((matrix.to(gram.dtype) @ gram) * matrix).sum())


def _row_output_variance(weight: np.ndarray, factor: np.ndarray) -> float:
    """The same from the factor (t, d) of G: ||F W^T||^2."""
    return float((torch.from_numpy(factor) @ torch.from_numpy(weight).T).double().square().sum())


@dataclass(slots=True, eq=False)
class EntropicState:
    """Alive channels, their probabilities and the shrunken regressions: the state of one continuation.

    Attributes:
        alive: (a,) channel numbers still in the problem.
        probability: (a,) float64 point of the simplex.
        ridges: one regression per consumer, on the features of the alive channels.
        total: number of consumers with any variance to explain.
    """

    alive: Tensor
    probability: Tensor
    ridges: list[Ridge]
    total: float


def initial_state(problem: GroupProblem, *, device: str = "cpu") -> EntropicState:
    """All channels, with the probabilities that the dense weights imply.

    The w step at Q = W, the limit of a vanishing L2 weight.
    """
    ridges: list[Ridge] = []
    total, norm_squared = 0.0, torch.zeros(problem.num_channels, dtype=torch.float64)
    for consumer in problem.consumers:
        ridge, variance = _full_ridge(consumer, device)
        ridges.append(ridge)
        total += variance
        norm_squared += _dense_norms(consumer, device).reshape(-1, consumer.block).sum(1).cpu()
    return EntropicState(
        alive=torch.arange(problem.num_channels),
        probability=closed_form_probability(norm_squared),
        ridges=ridges,
        total=total,
    )


def _full_ridge(consumer: ConsumerProblem | RowProblem, device: str) -> tuple[Ridge, float]:
    """The regression on all channels, and the variance that its dense weight makes of them."""
    weight = torch.from_numpy(consumer.weight).to(device)
    if isinstance(consumer, RowProblem):
        factor = torch.from_numpy(consumer.factor).to(device)
        answers = compressed_answers(factor, weight)
        return RowRidge(factor=factor, answers=answers, block=consumer.block), float(answers.square().sum())
    gram = torch.from_numpy(consumer.gram).to(device)
    target = gram @ weight.T
    ridge = GramRidge(gram=gram, target=target, block=consumer.block)
    return ridge, float((target * weight.T).double().sum())


def _dense_norms(consumer: ConsumerProblem | RowProblem, device: str) -> Tensor:
    """(d,) float64 squared norms of the columns of the dense weight."""
    if isinstance(consumer, ConsumerProblem):
        return torch.from_numpy(consumer.weight).to(device).double().square().sum(0)
    return torch.from_numpy(np.einsum("md,md->d", consumer.weight, consumer.weight, dtype=np.float64))  # no (m, d) copy


def weight_step(state: EntropicState, l2_weight: float) -> tuple[Tensor, float]:
    """Lambda step at fixed w: one ridge regression per consumer, written so that w_c -> 0 is harmless.

    Returns:
        (a,) squared norms s_c^2 of the channels' blocks of Q = Lambda D, and the objective without the entropy term.
    """
    norm_squared = torch.zeros_like(state.probability)
    explained = 0.0
    for ridge in state.ridges:
        norms, share = ridge.step(state.probability, l2_weight)
        norm_squared += norms
        explained += share
    return norm_squared, state.total - explained


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
    """Remove every channel outside `kept` (positions into `alive`) with its features; renormalise w."""
    state.ridges = [ridge.keep(kept) for ridge in state.ridges]
    state.alive = state.alive[kept]
    state.probability = state.probability[kept] / state.probability[kept].sum()


def nested_errors(problem: GroupProblem, order: Sequence[int], *, device: str = "cpu") -> np.ndarray:
    """Unexplained variance after refitting on the first k channels of an order, for every k.

    One factorisation per consumer serves all k: with G = L L^T in that order and Z = L^-1 G W^T, the first k blocks
    explain exactly the squared norm of the first k blocks of Z, because the leading part of L is the factor of the
    leading part of G. A consumer with fewer rows than features explains everything of its own rows long before k = c:
    its error is measured on held-out rows, see :func:`entprune.heldout.held_out_errors`.

    Args:
        order: all c channels, most important first.

    Returns:
        (c + 1,) float64: summed over consumers, entry k for k channels kept; entry 0 is the total variance.
    """
    channels = torch.as_tensor(np.asarray(order, dtype=np.int64))
    total, explained = 0.0, torch.zeros(len(order), dtype=torch.float64)
    held_out = np.zeros(len(order) + 1)
    for consumer in problem.consumers:
        features = (channels[:, None] * consumer.block + torch.arange(consumer.block)).to(device)  # (c, b)
        weight = torch.from_numpy(consumer.weight).to(device)
        if isinstance(consumer, RowProblem):
            held_out += held_out_errors(torch.from_numpy(consumer.factor).to(device), weight, features)
            continue
        gram = torch.from_numpy(consumer.gram).to(device)
        variance, blocks = _explained_blocks(gram, weight, features)
        total += variance
        explained += blocks
    errors = np.concatenate([[total], total - np.cumsum(explained.numpy())])
    return np.asarray(np.minimum.accumulate(np.maximum(errors, 0.0)) + held_out)


def _explained_blocks(gram: Tensor, weight: Tensor, features: Tensor) -> tuple[float, Tensor]:
    """Total variance, and (c,) what each channel explains beyond those before it."""
    columns = features.flatten()
    gram, weight = gram[columns][:, columns], weight[:, columns]
    target = gram @ weight.T
    rotated = torch.linalg.solve_triangular(cholesky_with_ridge(gram), target, upper=False)  # Z: (d, m)
    blocks = rotated.double().square().sum(1).reshape(features.shape).sum(1).cpu()
    return float((target * weight.T).double().sum()), blocks


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
        weight = torch.from_numpy(consumer.weight).double()
        dense = layer_weight.double()
        if isinstance(consumer, RowProblem):
            factor = torch.from_numpy(consumer.factor).double()
            blocks = factor.reshape(-1, count, consumer.block), dense.reshape(-1, count, consumer.block)
            answers = torch.einsum("tcb,mcb->ctm", *blocks).flatten(1)  # what each channel alone contributes
            quadratic += answers @ answers.T
            linear += answers @ (factor @ weight.T).flatten()
            continue
        gram = torch.from_numpy(consumer.gram).double()
        product = (dense.T @ dense) * gram
        quadratic += product.reshape(count, consumer.block, count, consumer.block).sum((1, 3))
        linear += (dense * (weight @ gram)).sum(0).reshape(count, consumer.block).sum(1)
    return quadratic, linear
