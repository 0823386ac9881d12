"""Units of work that the library does not have: what a worker does in one call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from entprune.evaluation import ImageSplit
from entprune.finetune import FinetuneConfig, finetune
from entprune.resumption import TrainingState
from entprune.runner import torch_threads


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FinetuneJob:
    """What fine-tuning reads.

    Attributes:
        student, teacher: the pruned and the dense network.
        split: training images.
        held_out: those of them that must not be trained on.
        threads: of torch; the other workers have nothing to do meanwhile.
    """

    student: nn.Module
    teacher: nn.Module
    split: ImageSplit
    held_out: np.ndarray
    threads: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EpochItem:
    """Which epoch is fine-tuned.

    Attributes:
        config: of the whole run.
        state: after the epoch before, None at the start.
    """

    config: FinetuneConfig
    state: TrainingState | None

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 1."""
        return 1 if self.state is None else self.state.epoch + 1


def finetune_epoch(job: FinetuneJob, item: EpochItem) -> TrainingState:
    """Unit: one epoch of fine-tuning; returns the state after it."""
    states: list[TrainingState] = []
    with torch_threads(job.threads):
        finetune(
            job.student, job.teacher, job.split, item.config, validation_indices=job.held_out,
            state=item.state, on_epoch=states.append, last_epoch=item.epoch,
        )  # fmt: skip
    return states[-1]
