"""Units of work that the library does not have: what a worker does in one call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from entprune.evaluation import ImageSplit
from entprune.finetune import FinetuneConfig, finetune
from entprune.runner import torch_threads
from entprune.stages import state_arrays


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FinetuneJob:
    """What fine-tuning reads.

    Attributes:
        student, teacher: the pruned and the dense network.
        split: training images.
        validation_indices: those that must not be trained on.
        threads: of torch; the other workers have nothing to do meanwhile.
    """

    student: nn.Module
    teacher: nn.Module
    split: ImageSplit
    validation_indices: np.ndarray
    threads: int


def finetune_student(job: FinetuneJob, config: FinetuneConfig) -> dict[str, np.ndarray]:
    """Unit: the student's weights after fine-tuning, name to array."""
    with torch_threads(job.threads):
        tuned = finetune(job.student, job.teacher, job.split, config, validation_indices=job.validation_indices)
    return state_arrays(tuned)
