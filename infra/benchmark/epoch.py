"""Part `epoch`: a whole one-shot prune against one training epoch of the same network, same machine, same run.

The epoch is timed on a few steps of this project's own training loop and scaled to the steps of a whole one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from entprune.runner import torch_threads
from entprune.training import TrainConfig, fit, has_native_bfloat16
from infra.benchmark.budgets import prune_within
from infra.benchmark.networks import NETWORKS, Bench
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject

STEPS = 12
_POINTS = 0.5
_NOT_PRUNING = ("measure", "total")  # test accuracy and latency are a report's, not a pruning's


class EpochMeter:
    """Times pruning and training of one network."""

    def __init__(self, request: Request) -> None:
        self._bench = request.bench()

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Hashes of the inputs."""
        return self._bench.facts

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Seconds of both and their ratio."""
        report = prune_within(self._bench, key["max_accuracy_drop"]).report
        stages = {name: value for name, value in report["timings_seconds"].items() if name not in _NOT_PRUNING}
        epochs = {name: epoch_seconds(self._bench, amp=amp) for name, amp in (("bfloat16", True), ("float32", False))}
        pruning = sum(stages.values())
        return {
            "prune_seconds": round(pruning, 2),
            "stages_seconds": stages,
            "candidates": len(report["candidates"]),
            "epoch_seconds": epochs,
            "bfloat16_is_native": has_native_bfloat16(torch.device(self._bench.config.device)),
            "ratio": {name: pruning / seconds for name, seconds in epochs.items()},
            "steps_timed": STEPS,
            "steps_per_epoch": steps_per_epoch(self._bench),
            "threads": self._bench.config.threads,
        }


def steps_per_epoch(bench: Bench) -> int:
    """Steps of one pass over the train split."""
    return len(bench.data.train) // TrainConfig().batch_size


def epoch_seconds(bench: Bench, *, amp: bool) -> float:
    """Seconds of one epoch, from the second pass over a few batches: the first one warms up."""

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001 -- one signature for all losses
        return F.cross_entropy(logits, labels)

    config = TrainConfig(epochs=2, learning_rate=1e-3, amp=amp, seed=bench.config.seed)
    with torch_threads(bench.config.threads):
        history = fit(copy.deepcopy(bench.model), bench.data.train, np.arange(STEPS * config.batch_size), loss, config)
    return history[-1].seconds / STEPS * steps_per_epoch(bench)


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """One cell: both times belong to the same minutes of the same machine."""
    return [(Subject(part="epoch", network=request.network, seed=request.seed), {"max_accuracy_drop": _POINTS})]


PART = Part(name="epoch", networks=tuple(NETWORKS), threads=2, cells=cells, meter=EpochMeter)
