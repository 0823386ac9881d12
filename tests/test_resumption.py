"""Fine-tuning through the store: a killed run repeats the epoch in flight alone, and ends with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from entprune.datasets import ArraySplit
from entprune.finetune import FinetuneConfig
from entprune.runner import InProcessRunner, Work
from tasks import workload
from tasks.progress import StageClock, report_to
from tasks.store import Store
from tasks.tuning import finetune

CONFIG = FinetuneConfig(epochs=3, batch_size=8, learning_rate=0.01)


class Killed(BaseException):
    """The process ended."""


class CountingRunner(InProcessRunner):
    """Counts epochs and dies in the one that it is told to."""

    def __init__(self, dies_in: int | None = None) -> None:
        super().__init__()
        self.dies_in, self.epochs = dies_in, list[int]()
        self.progress: Any = None

    def run(self, unit: Any, work: Sequence[Work], **options: Any) -> list[Any]:
        (entry,) = work
        if entry.item.epoch == self.dies_in:
            raise Killed
        self.epochs.append(entry.item.epoch)
        result = super().run(unit, work, **options)
        self.progress("finetune", 1, 1)
        return result


class Reporter:
    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def started(self, stage: str) -> None:
        """Nothing to note."""

    def advanced(self, stage: str, step: str, done: int, total: int) -> None:
        self.calls.append((done, total))

    def finished(self, stage: str, seconds: float, summary: str) -> None:
        """Nothing to note."""


def make_network(width: int) -> nn.Module:
    torch.manual_seed(width)
    layers = [nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16 * width, 3)).eval()


def tune(folder: Path, dies_in: int | None = None) -> tuple[dict[str, torch.Tensor], CountingRunner]:
    """One run, which may be killed in an epoch; its store is closed as a run closes it."""
    pixels = np.random.default_rng(0).normal(size=(24, 1, 4, 4)).astype(np.float32)
    split = ArraySplit(images=pixels, labels=np.arange(24, dtype=np.int64) % 3, mean=(0.0,), std=(1.0,))
    keys = SimpleNamespace(finetuned=lambda *_: "key")
    data = SimpleNamespace(train=split, sha256="0" * 64, mean=(0.0,), std=(1.0,), input_shape=(1, 4, 4))
    work = SimpleNamespace(
        network=SimpleNamespace(model=make_network(6)), data=data,
        tunes_on_validation=lambda _: False, validation_indices=np.arange(4), keys=keys,
    )  # fmt: skip
    runner = CountingRunner(dies_in)
    with Store(folder) as store:
        engine = workload.Engine(cast("Any", runner), store, StageClock())
        tuned = finetune.fn(cast("Any", work), engine, make_network(4), CONFIG)
    return tuned.state_dict(), runner


@pytest.mark.parametrize("dies_in", [1, 2, 3])
def test_killed_run_repeats_the_epoch_in_flight_alone(tmp_path: Path, dies_in: int) -> None:
    undisturbed, runner = tune(tmp_path / "undisturbed")
    assert runner.epochs == [1, 2, 3]
    with pytest.raises(Killed):
        tune(tmp_path / "store", dies_in)
    resumed, runner = tune(tmp_path / "store")
    assert runner.epochs == list(range(dies_in, 4))
    assert all(torch.equal(value, undisturbed[name]) for name, value in resumed.items())


def test_state_is_gone_once_the_weights_are_stored(tmp_path: Path) -> None:
    first, _ = tune(tmp_path)
    assert [path.name for path in tmp_path.rglob("*.safetensors")] == ["key.safetensors"]
    again, runner = tune(tmp_path)
    assert runner.epochs == []
    assert all(torch.equal(value, first[name]) for name, value in again.items())


def test_damaged_state_is_not_gone_on_from(tmp_path: Path) -> None:
    undisturbed, _ = tune(tmp_path / "undisturbed")
    with pytest.raises(Killed):
        tune(tmp_path / "store", 3)
    (path,) = (tmp_path / "store").rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    redone, runner = tune(tmp_path / "store")
    assert runner.epochs == [1, 2, 3]
    assert all(torch.equal(value, undisturbed[name]) for name, value in redone.items())


def test_progress_counts_epochs(tmp_path: Path) -> None:
    reporter = Reporter()
    with report_to(reporter):
        tune(tmp_path)
    assert reporter.calls == [(1, 3), (2, 3), (3, 3)]
