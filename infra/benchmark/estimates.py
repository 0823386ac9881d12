"""Part `estimates`: what training images, plain and perturbed, say about the accuracy drop, and what test images say.

The network's posterior is calibrated on each kind of image by itself (of those that candidates are compared on, on the
perturbed quarter), on test images to see what it could say at best.
Networks are pruned to sizes, not by accuracy, so that nothing was chosen on the images that are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from entprune.config import Budget
from entprune.predictions import dense_reference, predict, with_perturbed
from entprune.runner import InProcessRunner
from entprune.stages import ImageSet
from infra.benchmark.contest import Contest, budget_label
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject

IMAGES = 4000  # of the validation images, at most
SIZES = {
    "lenet": (Budget(parameters_removed=0.96), Budget(parameters_removed=0.88)),
    "vgg16_cifar": (Budget(parameters_removed=0.89), Budget(parameters_removed=0.81)),
    "resnet18_cifar": (Budget(parameters_removed=0.84), Budget(parameters_removed=0.7)),
    "resnet56_cifar": (Budget(macs_removed=0.53), Budget(macs_removed=0.35)),
    "vgg16_cifar_long": (Budget(parameters_removed=0.89), Budget(parameters_removed=0.81)),
    "resnet18_cifar_long": (Budget(parameters_removed=0.84), Budget(parameters_removed=0.7)),
}


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """Two sizes of each network, one where about half a point is lost and one where it is a tenth."""
    subject = Subject(part="estimates", network=request.network, seed=request.seed)
    labels = [budget_label(budget) for budget in SIZES[request.network]]
    return [(subject, {"budget": label}) for label in labels if request.budget in {"", label}]


class EstimateMeter:
    """Measures one network and seed.

    Args:
        request: what is asked.
        budgets: the sizes; those of SIZES by default.
    """

    def __init__(self, request: Request, budgets: Sequence[Budget] = ()) -> None:
        self._bench = request.bench()
        self._contest = Contest(self._bench, budgets or SIZES[request.network])
        self._runner = InProcessRunner(threads=self._bench.config.threads)
        plain = ImageSet(split=self._bench.validation.split, indices=self._bench.validation.indices[:IMAGES])
        config = self._bench.config
        self._sets = {
            "plain": plain,
            "perturbed": with_perturbed(plain, replace(config, perturbed_share=1.0)),
            "compared": with_perturbed(plain, config),
            "test": self._bench.test,
        }
        self._references = {
            name: dense_reference(self._logits(self._bench.network.model, images), images, config)
            for name, images in self._sets.items()
        }

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Hashes of the inputs and numbers of images."""
        images = {f"{name}_images": len(images) for name, images in self._sets.items()}
        return self._bench.facts | images | {"calibration_samples": self._bench.config.calibration_samples}

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Estimates of the drop on each set of images."""
        smaller = self._contest.build(self._contest.plan("ours", key["budget"], "allocated"), refit=True)
        found = {name: self._estimate(name, smaller) for name in self._sets}
        return {**found, "threads": self._bench.config.threads}

    def _estimate(self, name: str, smaller: nn.Module) -> dict[str, Any]:
        """Accuracy, and the drop by labels and by posterior with standard errors, in points."""
        reference, chosen = self._references[name], self._logits(smaller, self._sets[name]).argmax(1)
        found: dict[str, Any] = {
            "dense_accuracy": reference.accuracy(),
            "disagreement": 100.0 * float((reference.probabilities.argmax(1) != chosen).mean()),
        }
        for estimate in ("labels", "posterior"):
            drops = reference.drops(chosen, estimate)
            found |= {estimate: float(drops.mean()), f"{estimate}_error": float(drops.std(ddof=1)) / len(drops) ** 0.5}
        return found

    def _logits(self, model: nn.Module, images: ImageSet) -> np.ndarray:
        return predict(model, images, self._bench.config, self._runner, stage="estimates")


PART = Part(
    name="estimates", networks=tuple(SIZES), threads=2, cells=cells, meter=EstimateMeter,
    headline=("compared", "test"),
)  # fmt: skip
