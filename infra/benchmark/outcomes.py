"""Which test images a network gets wrong, in few bytes, and the noise of a difference of two accuracies.

Two networks are measured on the same images and mostly err on the same ones, so their difference is known better than
either accuracy. With x_i the difference of the two outcomes (right 1, wrong 0; means over seeds) on image i of n:

    standard error = sqrt(sum_i x_i^2) / n

which is McNemar's: that of two networks that are equally good.

Axes: n test images, s seeds.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def pack_outcomes(wrong: npt.NDArray[np.bool_]) -> str:
    """Text of (n,) outcomes: bits, compressed, in base 64."""
    return base64.b64encode(zlib.compress(np.packbits(wrong).tobytes(), 9)).decode("ascii")


def unpack_outcomes(text: str, count: int) -> npt.NDArray[np.bool_]:
    """Inverse of :func:`pack_outcomes` for n = `count`."""
    packed = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return np.unpackbits(packed, count=count).astype(bool)


def paired_error(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], count: int) -> float:
    """Standard error, in accuracy points, of the difference of two cells on the same test images.

    Args:
        first, second: values of either cell, one entry for each seed.
        count: n.

    Returns:
        The paired standard error; without stored outcomes the largest that it can be: with no error in common.
    """
    if all("wrong" in values for values in (*first, *second)):
        difference = _mean_outcomes(first, count) - _mean_outcomes(second, count)
        return 100.0 * math.sqrt(float(np.square(difference).sum())) / count
    wrong = sum(1.0 - float(np.mean([values["accuracy"] for values in cell])) / 100.0 for cell in (first, second))
    return 100.0 * math.sqrt(max(wrong, 0.0) / count)


def _mean_outcomes(cell: Sequence[Mapping[str, Any]], count: int) -> npt.NDArray[np.float64]:
    """(n,) share of the seeds that get an image wrong."""
    return np.asarray(np.mean([unpack_outcomes(values["wrong"], count) for values in cell], axis=0))
