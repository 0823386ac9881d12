"""Continuations of one group at several settings, computing once what they have in common.

Settings often start alike: from the same probabilities, at the same L2 weight, and, while the largest allowed number of
channels leaves after each level, with the same channels left. A step is found again under the exact bits of the state
that it starts from, so a continuation comes out bit by bit as it would alone, whichever others are solved beside it.

Axes: a alive channels, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from entprune.regression import (
    EntropicState,
    GroupProblem,
    initial_state,
    keep_channels,
    nested_errors,
    weight_step,
)
from entprune.simplex import probability_step

_MAX_BYTES = 64 * 2**20  # of remembered steps


class SharedSteps:
    """Steps of one group's continuations that were done before, in this process.

    Args:
        problem: scaled regressions of the group.
        device: torch device of the matrices.

    Attributes:
        num_computed: steps that were not found.
    """

    def __init__(self, problem: GroupProblem, *, device: str = "cpu") -> None:
        self.problem, self.device = problem, device
        self.num_computed = 0
        self._start: EntropicState | None = None
        self._steps: dict[tuple[bytes | float, ...], Tensor] = {}
        self._errors: dict[bytes, np.ndarray] = {}
        self._bytes = 0

    def begin(self) -> Continuation:
        """All channels, with the probabilities that the dense weights imply."""
        if self._start is None:
            self._start = initial_state(self.problem, device=self.device)
        start = self._start
        state = EntropicState(
            alive=start.alive, probability=start.probability, ridges=list(start.ridges), total=start.total
        )
        return Continuation(self, state)

    def step(self, name: tuple[bytes | float, ...], compute: Callable[[], Tensor]) -> Tensor:
        """Return an earlier result of that name, or compute it; once there are too many, they are no longer kept."""
        known = self._steps.get(name)
        if known is None:
            self.num_computed += 1
            known = compute()
            size = known.numel() * known.element_size() + sum(len(part) for part in name if isinstance(part, bytes))
            if self._bytes + size <= _MAX_BYTES:
                self._bytes += size
                self._steps[name] = known
        return known

    def errors(self, order: Sequence[int]) -> np.ndarray:
        """(c + 1,) refit error of the first k channels of an order, see `entprune.regression.nested_errors`."""
        name = np.asarray(order, dtype=np.int64).tobytes()
        if name not in self._errors:
            self._errors[name] = nested_errors(self.problem, order, device=self.device)
        return self._errors[name].copy()


class Continuation:
    """The state of one continuation; its matrices follow only when a step has to be computed.

    Attributes:
        alive: (a,) channel numbers still in the problem.
        probability: (a,) float64 point of the simplex.
    """

    def __init__(self, shared: SharedSteps, state: EntropicState) -> None:
        self._shared, self._state = shared, state
        self._behind: list[Tensor] = []  # kept positions that the matrices have not been cut to yet
        self.alive, self.probability = state.alive, state.probability

    def alternate(self, *, l2_weight: float, entropy_weight: float, iterations: int) -> None:
        """The two closed-form steps by turns at fixed settings, as `entprune.regression.alternate`."""
        for _ in range(iterations):
            name = (_bits(self.alive), _bits(self.probability), l2_weight)
            norm_squared = self._shared.step(name, partial(self._weight_step, l2_weight))
            following = partial(
                probability_step,
                norm_squared,
                l2_weight=l2_weight,
                entropy_weight=entropy_weight,
                current=self.probability,
            )
            self.probability = self._shared.step((*name, entropy_weight), following)

    def keep(self, kept: Tensor) -> None:
        """Remove every channel outside `kept` (positions into `alive`); renormalise w."""
        self._behind.append(kept)
        self.alive = self.alive[kept]
        self.probability = self.probability[kept] / self.probability[kept].sum()

    def _weight_step(self, l2_weight: float) -> Tensor:
        for kept in self._behind:
            keep_channels(self._state, kept)
        self._behind.clear()
        self._state.probability = self.probability
        return weight_step(self._state, l2_weight)[0]


def _bits(values: Tensor) -> bytes:
    return values.numpy().tobytes()
