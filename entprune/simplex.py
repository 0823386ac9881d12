"""Exact numerics on the probability simplex: entropy and the two closed forms of the channel-probability step.

Axes: c channels. Every function works in float64 and returns float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BISECTION_STEPS = 64
_NEWTON_STEPS = 60
_ROUNDING = 1e-14
_TINY = 1e-300


def entropy(channel_probability: Tensor) -> Tensor:
    """Shannon entropy H(w) = - sum_c w_c log w_c in nats, with 0 log 0 = 0.

    Args:
        channel_probability: (c,) point of the simplex.

    Returns:
        Scalar tensor in [0, log c].
    """
    terms: Tensor = torch.special.entr(channel_probability.double())
    return terms.sum()


def effective_channels(channel_probability: Tensor) -> float:
    """Return exp H(w), the number of equally used channels that would have the same entropy."""
    return float(entropy(channel_probability).exp())


def probability_step(
    channel_norm_squared: Tensor, *, l2_weight: float, entropy_weight: float, current: Tensor
) -> Tensor:
    """Minimise the w-dependent part of the objective at fixed Q: form (a) of the w step.

        min_w  l2_weight * sum_c s_c^2 / w_c^2  +  entropy_weight * H(w)     over the simplex

    Without entropy the minimiser is w_c proportional to s_c^(2/3). With a positive weight H is concave: it is
    replaced by its tangent at `current`, a majorant, so the true objective cannot rise. With a negative weight the
    problem is convex and solved exactly.

    Args:
        channel_norm_squared: (c,) s_c^2 >= 0, squared norm of channel c's block of Q over all consumers.
        l2_weight: eps_l2 > 0.
        entropy_weight: signed eps_w.
        current: (c,) present w, the point of tangency.

    Returns:
        (c,) the next w, float64, on the simplex.

    Source:
        Method notes, section 2: "w step", form (a).
    """
    norm_squared = channel_norm_squared.double().clamp_min(_TINY)
    if entropy_weight == 0.0:
        return closed_form_probability(norm_squared)
    ratio = entropy_weight / (2.0 * l2_weight)
    if entropy_weight > 0.0:
        slope = -ratio * (current.double().clamp_min(_TINY).log() + 1.0)
        return _tangent_probability(norm_squared, slope)
    return _convex_probability(norm_squared, -ratio)


def closed_form_probability(channel_norm_squared: Tensor) -> Tensor:
    """Minimiser of sum_c s_c^2 / w_c^2 over the simplex: w_c proportional to s_c^(2/3)."""
    root = channel_norm_squared.double().clamp_min(_TINY).pow(1.0 / 3.0)
    return root / root.sum()


def _tangent_probability(norm_squared: Tensor, slope: Tensor) -> Tensor:
    """w_c = (s_c^2 / (slope_c + nu))^(1/3) with nu such that w sums to one (stationarity of the majorant).

    nu is counted from its pole, the smallest slope, and bisected on a logarithmic scale: small norms beside large
    slopes would cancel otherwise.
    """
    gap = slope - slope.min()

    def candidate(nu: Tensor) -> Tensor:
        return (norm_squared / (gap + nu)).pow(1.0 / 3.0)

    # At the lower end the smallest denominator alone makes some w_c >= 1; at the upper end every w_c <= 1/c.
    low = (norm_squared - gap).max()
    high = (norm_squared * norm_squared.numel() ** 3 - gap).max()
    for _ in range(_BISECTION_STEPS):
        middle = low.sqrt() * high.sqrt()
        if float(candidate(middle).sum()) > 1.0:
            low = middle
        else:
            high = middle
    probability = candidate(high)
    return probability / probability.sum()


def _convex_probability(norm_squared: Tensor, strength: float) -> Tensor:
    """Solve -s_c^2 / w_c^3 + strength (log w_c + shift) = 0 for every c, with the shift such that w sums to one.

    With t = 3 (log w_c + shift) the equation reads t + log t = z: t is Wright's omega function of z, and
    w_c^3 = 3 s_c^2 / (strength t) gives log w_c without subtracting the shift again.
    """
    log_ratio = (3.0 * norm_squared / strength).log()
    # Where the largest norm alone has w_c = 1 the sum is at least one; its logarithm is convex and falls with the
    # shift, so
    # Newton's method approaches the root from this side without passing it.
    shift = float(norm_squared.max()) / strength
    for _ in range(_NEWTON_STEPS):
        log_t = _log_wright_omega(log_ratio + 3.0 * shift)
        log_probability = (log_ratio - log_t) / 3.0
        probability = torch.softmax(log_probability, 0)
        excess = float(torch.logsumexp(log_probability, 0))
        if excess <= _ROUNDING:
            break
        shift += excess / float((probability / (1.0 + log_t.exp())).sum())
    return probability


def _log_wright_omega(z: Tensor) -> Tensor:
    """Logarithm of the solution t > 0 of t + log t = z, by Newton's method on v = log t."""
    log_t = torch.where(z > 1.0, z.clamp_min(1.0).log(), z.clamp_max(1.0) - 0.5)
    for _ in range(6):  # e^v + v = z: convex, so Newton converges from everywhere
        exponential = log_t.exp()
        log_t = log_t - (exponential + log_t - z) / (exponential + 1.0)
    return log_t
