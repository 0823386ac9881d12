"""How much accuracy a candidate loses, estimated on validation images in pairs with the dense network.

Estimates of the drop on *unseen* images, in points per image:

- "labels": dense right minus candidate right. Unbiased on images that the dense network was not trained on. On training
  images, which are all there is without a separate validation set, nearly every dense answer is right by memory, so
  each disagreement counts in full and the drop is overestimated.
- "posterior": p(dense choice) - p(candidate's choice) under the dense network's own class probabilities p: the expected
  drop if labels were drawn from p. Disagreements where the dense network hesitates count little, as they do on new
  images, and the variance is several times smaller. It trusts p to be calibrated, and so p's temperature is fitted to
  the labels of validation images (Guo et al., ICML 2017). On training images, which are easier than new ones, there
  are too few disagreements, and the drop is underestimated; on perturbed ones (see
  :mod:`entprune.datasets.perturbed`) there are about as many as on new ones, but the dense network still knows their
  labels, and each costs too much. Of training images a quarter is therefore perturbed, and the temperature is fitted
  on that quarter.
- "blend": the mean of the two, whose errors on training images have opposite signs. On unseen images all three agree in
  expectation.

Axes: n images, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from entprune.errors import ConfigError

DropEstimate = Literal["labels", "posterior", "blend"]
DROP_ESTIMATES: tuple[DropEstimate, ...] = ("labels", "posterior", "blend")
_LARGEST_DROP = 100.0  # of one image, in points
_MOST_TEMPERATURE, _BISECTIONS = 4.0, 24
NO_CLASS = -1  # of an image whose logits are not finite
_TWO_SIDED_95 = 1.959964  # standard normal quantile


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DenseReference:
    """The dense network's answers on the validation images.

    Attributes:
        labels: (n,) true classes.
        probabilities: (n, k) float32 calibrated class probabilities of the dense network.
        estimate: which estimate of the drop is used.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    estimate: DropEstimate

    def __post_init__(self) -> None:
        if self.estimate not in DROP_ESTIMATES:
            raise ConfigError(f"drop_estimate must be one of {', '.join(DROP_ESTIMATES)}, got {self.estimate!r}.")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def accuracy(self) -> float:
        """Percent of the images that the dense network classifies correctly."""
        return 100.0 * float((self.probabilities.argmax(1) == self.labels).mean())

    def drops(self, predicted: np.ndarray, estimate: DropEstimate | None = None) -> np.ndarray:
        """Estimated drop of each of the first images, in points.

        Args:
            predicted: (j,) classes that the candidate chose for the first j images.
            estimate: another estimate than the reference's own.

        Returns:
            (j,) float64 in [-100, 100].
        """
        wanted = estimate or self.estimate
        if wanted == "blend":
            return np.asarray(0.5 * (self.drops(predicted, "labels") + self.drops(predicted, "posterior")))
        count = len(predicted)
        probabilities = self.probabilities[:count].astype(np.float64)
        dense = probabilities.argmax(1)
        if wanted == "labels":
            labels = self.labels[:count]
            return np.asarray(100.0 * ((dense == labels).astype(np.float64) - (predicted == labels)))
        rows = np.arange(count)
        chosen = np.where(predicted == NO_CLASS, 0.0, probabilities[rows, np.maximum(predicted, 0)])
        return np.asarray(100.0 * (probabilities[rows, dense] - chosen))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Temperature T in [1/4, 4] under which the softmax of logits / T makes the labels most likely.

    With b = 1 / T the mean negative log-likelihood is convex, and its derivative, the mean over images of the expected
    logit less the label's, is brought to zero by bisection.

    Args:
        logits: (n, k), finite.
        labels: (n,) classes.
    """
    centred = logits.astype(np.float64) - logits.max(1, keepdims=True)
    known = centred[np.arange(len(labels)), labels]
    low, high = -np.log(_MOST_TEMPERATURE), np.log(_MOST_TEMPERATURE)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        weights = np.exp(np.exp(middle) * centred)
        slope = float(((weights * centred).sum(1) / weights.sum(1) - known).mean())
        low, high = (middle, high) if slope < 0.0 else (low, middle)
    return float(np.exp(-0.5 * (low + high)))


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRule:
    """Stops scoring a candidate once its accuracy drop is clearly within or clearly beyond the budget.

    Attributes:
        max_drop: budget in points, None to score every image.
        quantile: standard normal quantile of the confidence.
        chunk: images between two looks.
    """

    max_drop: float | None
    quantile: float
    chunk: int = 1024

    def bounds(self, drops: np.ndarray) -> tuple[float, float, float]:
        """Mean of paired drops (n,) in points with its lower and upper confidence bounds.

        Few images differ, so the upper bound is that of a count (the score interval, with jumps J in place of ones):
        with z the quantile and e the standard error, mean + z^2 J / (2 n) + z sqrt(e^2 + z^2 J^2 / (4 n^2)). Where no
        image differs at all it is z^2 J / n above zero, not zero.
        """
        mean, count, z = float(drops.mean()), len(drops), self.quantile
        if count < 2:
            return mean, float("-inf"), float("inf")
        error = float(drops.std(ddof=1)) / count**0.5
        size = float(np.abs(drops).sum())
        jump = float(np.square(drops).sum()) / size if size > 0.0 else _LARGEST_DROP
        shift = z**2 * jump / (2.0 * count)
        return mean, mean - z * error, mean + shift + (z**2 * error**2 + shift**2) ** 0.5

    def is_decided(self, drops: np.ndarray) -> bool:
        """Whether looking at more images can hardly change the verdict (twice the usual quantile).

        What may be chosen in the end is looked at in full: candidates share the images, so a lucky beginning is lucky
        for all of them. Only one that is clearly within half the budget is not looked at further.
        """
        if self.max_drop is None or len(drops) < self.chunk:
            return False
        mean, low, high = self.bounds(drops)
        return mean - 2.0 * (mean - low) > self.max_drop or mean + 2.0 * (high - mean) < 0.5 * self.max_drop


def paired_interval(dense: np.ndarray, smaller: np.ndarray) -> tuple[float, float]:
    """Interval (95 %, two-sided) of the accuracy drop on new images, from both outcomes on n test images.

    With b images that the dense network alone classifies correctly and c that the smaller one alone does, the Wald
    interval of the paired difference after half an image is added to each of the four kinds (Agresti and Min,
    Statistics in Medicine 24, 2005): with p = (b + 1/2) / (n + 2), q = (c + 1/2) / (n + 2),

        (p - q) +- z sqrt((p + q - (p - q)^2) / (n + 2)).

    Args:
        dense: (n,) bool, whether the dense network classifies each image correctly.
        smaller: (n,) bool, the same of the smaller one.

    Returns:
        Lower and upper end in points; positive is a loss.
    """
    count = len(dense) + 2
    lost = (float((dense & ~smaller).sum()) + 0.5) / count
    won = (float((smaller & ~dense).sum()) + 0.5) / count
    middle = lost - won
    reach = _TWO_SIDED_95 * float(np.sqrt((lost + won - middle**2) / count))
    return 100.0 * (middle - reach), 100.0 * (middle + reach)
