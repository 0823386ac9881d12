"""One candidate of the search: assembled from a plan, and classified on validation images until its verdict is clear.

Axes: j validation images that were scored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from entprune.assembly import RefitConfig, RefitData, assemble
from entprune.calibration import LayerStatistics, Statistics
from entprune.evaluation import Precision, chunks, placed, predict_classes
from entprune.plan import PruningPlan
from entprune.predictions import EVALUATION_BATCH
from entprune.selection import DenseReference, StopRule
from entprune.stages import ImageSet, Network, Part


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CandidateJob:
    """What every candidate unit reads.

    Attributes:
        data: calibration images and dense answers.
        validation: held-out images, None where nothing is selected on them.
        reference: the dense network's answers on them.
        stop: decides after each chunk whether the drop is known well enough.
        precision: in which candidates are scored, as the dense network was.
    """

    network: Network
    data: RefitData
    refit: RefitConfig
    validation: ImageSet | None
    reference: DenseReference | None
    stop: StopRule
    device: str
    chunk: int = EVALUATION_BATCH
    precision: Precision = "float32"

    def in_chunks(self, images: int) -> CandidateJob:
        """The same in smaller forward passes, and without holding activations or the rows of a layer."""
        return replace(self, chunk=images, data=replace(self.data, held_numbers=0, held_bytes=0))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CandidateScore:
    """One assembled network and how it did.

    Attributes:
        state: its weights, name to array.
        predicted: (j,) classes chosen for the first j validation images; empty without validation.
    """

    state: dict[str, np.ndarray]
    predicted: np.ndarray


def score_candidate(job: CandidateJob, plan: PruningPlan) -> CandidateScore:
    """Unit: assemble one plan and classify validation images until the stop rule is satisfied."""
    smaller = assemble(
        job.network.model, job.network.groups, plan,
        data=job.data, config=job.refit, graph=job.network.graph, device=job.device,
    )  # fmt: skip
    return CandidateScore(state=state_arrays(smaller), predicted=_score(job, smaller))


def _score(job: CandidateJob, smaller: nn.Module) -> np.ndarray:
    """(j,) classes of the first validation images, as many as the stop rule wants."""
    predicted = np.zeros(0, dtype=np.int64)
    if job.validation is None or job.reference is None:
        return predicted
    with placed(smaller, job.device, job.precision) as network:
        while len(predicted) < len(job.validation):
            part = (len(predicted), len(predicted) + job.stop.chunk)
            predicted = np.concatenate([predicted, classify(job, network, part)])
            if job.stop.is_decided(job.reference.drops(predicted)):
                break
    return predicted


def classify(job: CandidateJob, network: nn.Module, part: Part) -> np.ndarray:
    """(n,) classes that a placed network chooses for a range of the validation images."""
    if job.validation is None:
        raise ValueError("expected validation images, got none; share the job that has them.")
    split, indices = job.validation.split, job.validation.indices[slice(*part)]
    return np.concatenate(
        [
            predict_classes(network, split, chosen, len(chosen), job.device)
            for chosen in chunks(indices, EVALUATION_BATCH, job.chunk)
        ]
    )


def state_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """State dict as numpy arrays."""
    return {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}


def answers_only(statistics: Statistics, network: Network) -> dict[str, LayerStatistics]:
    """All that assembly needs: answers, and moments of the layers alone that it cannot refit where it reaches them."""
    once = set(network.refit_layers)
    return {
        layer: LayerStatistics(moments=None if layer in once else entry.moments, outputs=entry.outputs)
        for layer, entry in statistics.items()
    }
