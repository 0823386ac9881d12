"""Small regressions of a channel group, in float64, for the tests of the solver and of the path."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from entprune.regression import ConsumerProblem, GroupProblem


def random_covariance(num_features: int, seed: int, *, rank: int | None = None) -> np.ndarray:
    """Correlated features (d, d); with a rank below d some are linear combinations of others."""
    rows = np.random.default_rng(seed).normal(size=(num_features if rank is None else rank, num_features))
    rows = np.concatenate([rows, rows[:1] + rows]) + 0.5 * rows.mean(1).mean()
    return rows.T @ rows / len(rows)


def random_problem(num_channels: int, blocks: Sequence[int], seed: int, *, num_outputs: int = 3) -> GroupProblem:
    """A well-conditioned problem with unit output variance and unit input scale, one consumer for each block size."""
    generator = np.random.default_rng(seed)
    consumers = []
    for number, block in enumerate(blocks):
        size = num_channels * block
        factor = generator.normal(size=(size, size)) / size**0.5 + 0.5 * np.eye(size)
        gram = factor @ factor.T + 0.1 * np.eye(size)
        scale = np.sqrt(gram.diagonal())
        gram /= np.outer(scale, scale)
        weight = generator.normal(size=(num_outputs, size))
        weight /= np.sqrt(np.trace(weight @ gram @ weight.T))
        consumers.append(ConsumerProblem(layer=f"layer{number}", gram=gram, weight=weight, block=block))
    return GroupProblem(name="group", num_channels=num_channels, consumers=tuple(consumers))


def refit_error(problem: GroupProblem, kept: Sequence[int]) -> float:
    """Unexplained variance after least squares on the kept channels alone, consumer by consumer."""
    error = 0.0
    for consumer in problem.consumers:
        gram, weight = consumer.gram.astype(np.float64), consumer.weight.astype(np.float64)
        columns = [channel * consumer.block + tap for channel in kept for tap in range(consumer.block)]
        total = np.trace(weight @ gram @ weight.T)
        cross = weight @ gram[:, columns]
        error += total - np.trace(cross @ np.linalg.pinv(gram[np.ix_(columns, columns)], rcond=1e-9) @ cross.T)
    return error
