"""Fine-tuning as a Prefect task: epoch by epoch, each of which is stored."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import nn

from entprune.checkpoints import load_plain_state
from entprune.finetune import FinetuneConfig
from entprune.runner import Work
from entprune.storage import load_training, read_bundle, save_training, write_bundle
from tasks.keys import hash_images
from tasks.units import EpochItem, FinetuneJob, finetune_epoch
from tasks.workload import Engine, Workload, stage_task


@stage_task("finetune")
def finetune(
    work: Workload, engine: Engine, smaller: nn.Module, config: FinetuneConfig, *, num_rounds: int = 1
) -> nn.Module:
    """Train the smaller network on with the dense one as its teacher, on one worker with all cores to itself.

    It learns from all training images, unless what comes of the rounds is judged on some of them. After each epoch the
    state of the training is stored, so that a killed run repeats at most the epoch in flight.
    """
    held_out = work.validation_indices[:0] if work.tunes_on_validation(num_rounds) else work.validation_indices
    job = FinetuneJob(
        student=smaller,
        teacher=work.network.model,
        split=work.data.train,
        held_out=held_out,
        threads=engine.finetune_threads,
    )
    key = work.keys.finetuned(smaller, config, hash_images(work.data, "train", held_out))
    with engine.clock.stage("finetune"):
        state = engine.store.remember(
            "finetuned",
            key,
            lambda: train_epochs(job, config, engine, key),
            load=lambda path: read_bundle(path)[0],
            save=lambda state, path: write_bundle(path, state, {"kind": "fine-tuned weights"}),
        )
        engine.store.discard("finetuning", key)  # after the weights: one thread writes in this order
        return load_arrays(smaller, state)


def train_epochs(job: FinetuneJob, config: FinetuneConfig, engine: Engine, key: str) -> dict[str, np.ndarray]:
    """Weights after all epochs, the first of which an earlier run may have done."""
    state = engine.store.fetch("finetuning", key, load_training)
    handle = engine.runner.share(job)
    try:
        while state is None or state.epoch < config.epochs:
            item = EpochItem(config=config, state=state)
            with engine.counting("finetune", item.epoch, config.epochs):
                (state,) = engine.runner.run(finetune_epoch, [Work(shared=handle, item=item)], stage="finetune")
            engine.store.keep("finetuning", key, partial(save_training, state))
    finally:
        engine.runner.release(handle)
    return state.network_arrays(job.student)


def load_arrays(like: nn.Module, state: Mapping[str, np.ndarray]) -> nn.Module:
    """A copy of a network with other weights, in eval mode."""
    loaded = copy.deepcopy(like)
    load_plain_state(loaded, {name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return loaded.eval()
