"""Channel labels: a union-find over the positions of parameter axes, and arrays of labels shaped like tensors.

Two channels that can only go together end with the same label. A label may be pinned, with the reason why its channel
must stay.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

#: Label of positions that hold no channel but zeros, put there by code that knows their number.
FIXED_ZERO = 0


class LabelSpace:
    """Union-find over integer labels; the smallest label of a class is its root."""

    def __init__(self) -> None:
        self._parent = np.arange(1, dtype=np.int64)
        self._count = 1
        self._reasons: dict[int, str] = {}

    def fresh(self, *shape: int) -> Tensor:
        """New labels, each a class of its own, in an array of that shape."""
        count = int(np.prod(shape, dtype=np.int64))
        start, self._count = self._count, self._count + count
        if self._count > len(self._parent):
            grown = np.arange(max(2 * len(self._parent), self._count), dtype=np.int64)
            grown[: len(self._parent)] = self._parent
            self._parent = grown
        return torch.arange(start, self._count).reshape(shape)

    def find(self, labels: Tensor) -> Tensor:
        """Root of every label, in an array of the same shape."""
        roots = self._parent[labels.numpy()]
        while True:
            further = self._parent[roots]
            if np.array_equal(further, roots):
                return torch.from_numpy(np.asarray(roots))
            roots = further

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Make one class of each pair of labels (broadcast); a fixed zero joins nothing, but pins its partner."""
        first, second = torch.broadcast_tensors(first, second)  # type: ignore[no-untyped-call]
        pairs = np.unique(np.stack([first.flatten().numpy(), second.flatten().numpy()], 1), axis=0).tolist()
        for one, other in pairs:
            if one > FIXED_ZERO and other > FIXED_ZERO:
                self._join(one, other)
            elif max(one, other) > FIXED_ZERO:
                self._reasons.setdefault(max(one, other), "a constant of fixed size is added to its channels")

    def _join(self, one: int, other: int) -> None:
        one, other = self._root(one), self._root(other)
        if one != other:
            self._parent[max(one, other)] = min(one, other)

    def _root(self, label: int) -> int:
        path = []
        while (parent := int(self._parent[label])) != label:
            path.append(label)
            label = parent
        for passed in path:
            self._parent[passed] = label
        return label

    def pin(self, labels: Tensor, reason: str) -> None:
        """The channels of these labels must stay; the first reason given counts."""
        for label in np.unique(labels.numpy()).tolist():
            if label > FIXED_ZERO:
                self._reasons.setdefault(label, reason)

    def pinned(self) -> dict[int, str]:
        """Roots of the classes that must stay, each with the reason given first."""
        found: dict[int, str] = {}
        for label, reason in self._reasons.items():
            found.setdefault(self._root(label), reason)
        return found


# --- arrays of labels, of zero stride along the axes on which they do not vary ----------------------------------------


def core(labels: Tensor) -> Tensor:
    """The array with size 1 on every axis of zero stride."""
    for axis, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if size > 1 and stride == 0:
            labels = labels.narrow(axis, 0, 1)
    return labels


def compact(space: LabelSpace, labels: Tensor) -> Tensor:
    """Roots of the labels, with zero stride along every axis on which they do not vary."""
    shape = labels.shape
    roots = space.find(core(labels))
    for axis in range(roots.ndim):
        first = roots.narrow(axis, 0, min(1, roots.shape[axis]))
        if roots.shape[axis] > 1 and bool((roots == first).all()):
            roots = first
    return roots.expand(shape)


def varying_axes(labels: Tensor) -> list[int]:
    """Axes along which a compact array of labels varies."""
    return [axis for axis, size in enumerate(core(labels).shape) if size > 1]


def along_axis(labels: Tensor, axis: int) -> Tensor | None:
    """(size,) labels along one axis, or None if they vary along another one."""
    axis %= labels.ndim
    if any(varying != axis for varying in varying_axes(labels)):
        return None
    index: list[int | slice] = [0] * labels.ndim
    index[axis] = slice(None)
    return labels[tuple(index)]


def spread(labels: Tensor, axis: int, shape: Iterable[int]) -> Tensor:
    """Array of that shape whose labels vary along one axis alone."""
    sizes = list(shape)
    view = [1] * len(sizes)
    view[axis] = -1
    return labels.reshape(view).expand(sizes)
