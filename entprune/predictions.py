"""What a network answers to many images, computed in ranges side by side, and the dense network's answers as reference.

Axes: n images, k classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from entprune.config import PruneConfig
from entprune.datasets.perturbed import PerturbedSplit, perturb_share
from entprune.errors import DataError
from entprune.evaluation import Precision, chunks, placed, predict_logits
from entprune.runner import Runner
from entprune.selection import DenseReference, fit_temperature
from entprune.stages import ImageSet, Part, run_parts, shards

EVALUATION_BATCH = 64
_PREDICTION_IMAGES, _PREDICTIONS = 256, 8  # of one unit at most, and so many units at least


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PredictJob:
    """What every prediction unit reads."""

    model: nn.Module
    images: ImageSet
    device: str
    chunk: int = EVALUATION_BATCH
    precision: Precision = "float32"

    def in_chunks(self, images: int) -> PredictJob:
        """The same in smaller forward passes."""
        return replace(self, chunk=images)


def logits_range(job: PredictJob, part: Part) -> np.ndarray:
    """Unit: (n, k) logits of a range of images."""
    indices = job.images.indices[slice(*part)]
    with placed(copy.deepcopy(job.model), job.device, job.precision) as model:
        return np.concatenate(
            [
                predict_logits(model, job.images.split, chosen, len(chosen), job.device)
                for chosen in chunks(indices, EVALUATION_BATCH, job.chunk)
            ]
        )


def predict(
    model: nn.Module,
    images: ImageSet,
    config: PruneConfig,
    runner: Runner,
    *,
    stage: str,
    precision: Precision = "float32",
    known: Callable[[Part], np.ndarray | None] = lambda _: None,
    on_result: Callable[[Part, np.ndarray], None] | None = None,
) -> np.ndarray:
    """(n, k) float32 logits of a network on some images, computed in fixed ranges.

    Args:
        precision: of the products; images on which candidates are compared are predicted in the settings'.
        known: logits of a range from an earlier run on the same inputs.
        on_result: called with each new range's as they come in.
    """
    job = runner.share(PredictJob(model=model, images=images, device=config.device, precision=precision))
    parts = shards(len(images), prediction_units(len(images), runner.workers), EVALUATION_BATCH)
    found: dict[int, np.ndarray] = {}
    try:
        run_parts(logits_range, job, parts, runner, stage, known, on_result, found.__setitem__)
    finally:
        runner.release(job)
    return np.concatenate([found[number] for number in range(len(parts))])


def prediction_units(count: int, workers: int) -> int:
    """Units into which the prediction of so many images is divided: as many for each worker.

    They start at multiples of the batch size, so batches and results are the same for any number of them.
    """
    return max(_PREDICTIONS, workers * -(-count // (workers * _PREDICTION_IMAGES)))


def is_correct(logits: np.ndarray, images: ImageSet) -> np.ndarray:
    """(n,) bool: whether the largest logit is that of the image's class; never where a logit is not finite."""
    right = logits.argmax(1) == images.split.labels[images.indices]
    return np.asarray(right & np.isfinite(logits).all(1))


def with_perturbed(images: ImageSet, config: PruneConfig) -> ImageSet:
    """The images that candidates are compared on, with the share of them perturbed that the settings ask for."""
    if not config.perturbed_share:
        return images
    split = perturb_share(images.split, images.indices, config.perturbed_share, config.seed)
    return ImageSet(split=split, indices=np.arange(len(images)))


def dense_reference(logits: np.ndarray, images: ImageSet, config: PruneConfig) -> DenseReference:
    """What candidates are compared with, from the dense network's logits (n, k).

    The temperature of its probabilities is fitted on the perturbed images where there are any: where it knows the
    labels by heart, a network seems surer than it is of new images.

    Raises:
        DataError: a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise DataError(
            "expected finite network outputs on the validation images, got NaN or infinity; check data and weights."
        )
    labels = images.split.labels[images.indices]
    asked = _least_known(images)
    temperature = fit_temperature(logits[asked], labels[asked])
    return DenseReference(
        labels=labels,
        probabilities=torch.from_numpy(logits / temperature).softmax(1).numpy(),
        estimate=config.drop_estimate or "posterior",
    )


def _least_known(images: ImageSet) -> np.ndarray:
    """(n,) bool: the perturbed images where there are any, else all."""
    if isinstance(images.split, PerturbedSplit):
        perturbed = np.asarray(images.split.is_perturbed[images.indices])
        if perturbed.any():
            return perturbed
    return np.ones(len(images), dtype=bool)
