"""Which of many networks are worth a look: those that no other beats in size and accuracy alike."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """Numbers of the points that no other one dominates, by rising first coordinate.

    A point dominates another if it is at most as large in both coordinates and smaller in one. Of equal points the
    first one stands for all.

    Args:
        points: (cost, accuracy drop), both the smaller the better; a point with an unknown coordinate takes no part.
    """
    numbered = enumerate(points)
    known = [(cost, drop, number) for number, (cost, drop) in numbered if cost is not None and drop is not None]
    front: list[int] = []
    least = float("inf")
    for _, drop, number in sorted(known):
        if drop < least:
            front.append(number)
            least = drop
    return front
