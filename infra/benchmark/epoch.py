"""Part `epoch`: a whole one-shot prune against one training epoch of the same network, same machine, same run.

The epoch is timed on some steps of this project's own training loop, half of them before the pruning and half after it,
for a machine's speed wanders, and scaled to the steps of a whole one. Where the processor only emulates bfloat16,
float32 is timed too: the faster of the two is what a user would train in.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from entprune.evaluation import has_native_bfloat16
from entprune.runner import torch_threads
from entprune.training import TrainConfig, fit
from infra.benchmark.budgets import prune_within
from infra.benchmark.networks import NETWORKS, Bench
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject

WARM_UP, STEPS = 3, 20  # before the pruning, and again after it
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
        is_native = has_native_bfloat16(self._bench.config.device)
        formats = {"bfloat16": True} if is_native else {"bfloat16": True, "float32": False}
        before = {name: epoch_seconds(self._bench, amp=amp) for name, amp in formats.items()}
        report = prune_within(self._bench, key["max_accuracy_drop"], is_tested=False).report
        stages = {name: value for name, value in report["timings_seconds"].items() if name not in _NOT_PRUNING}
        pruning = sum(stages.values())
        after = {name: epoch_seconds(self._bench, amp=amp) for name, amp in formats.items()}
        epochs = {name: (before[name] + after[name]) / 2 for name in formats}
        return {
            "prune_seconds": round(pruning, 2),
            "stages_seconds": stages,
            "candidates": len(report["candidates"]),
            "epoch_seconds": epochs,
            "epoch_seconds_before": before,
            "epoch_seconds_after": after,
            "bfloat16_is_native": is_native,
            "ratio": pruning / min(epochs.values()),
            "steps_timed": STEPS,
            "steps_per_epoch": steps_per_epoch(self._bench),
            "threads": self._bench.config.threads,
        }


def steps_per_epoch(bench: Bench) -> int:
    """Steps of one pass over the train split."""
    return len(bench.data.train) // TrainConfig().batch_size


def epoch_seconds(bench: Bench, *, amp: bool) -> float:
    """Seconds of one epoch, from a few steps after a few more that warm up."""
    stamps: list[float] = []

    def loss(logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001 -- one signature for all losses
        return F.cross_entropy(logits, labels)

    def stamp(done: int, total: int, text: str) -> None:  # noqa: ARG001 -- one signature for all progress
        stamps.append(time.perf_counter())

    config = TrainConfig(epochs=1, learning_rate=1e-3, amp=amp, seed=bench.config.seed)
    indices = np.resize(np.arange(len(bench.data.train)), (WARM_UP + STEPS) * config.batch_size)
    with torch_threads(bench.config.threads):
        fit(copy.deepcopy(bench.model), bench.data.train, indices, loss, config, stamp)
    return (stamps[-1] - stamps[WARM_UP - 1]) / STEPS * steps_per_epoch(bench)


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """One cell: both times belong to the same minutes of the same machine."""
    return [(Subject(part="epoch", network=request.network, seed=request.seed), {"max_accuracy_drop": _POINTS})]


PART = Part(
    name="epoch", networks=tuple(NETWORKS), threads=2, cells=cells, meter=EpochMeter,
    headline=("prune_seconds", "epoch_seconds", "ratio"),
)  # fmt: skip
