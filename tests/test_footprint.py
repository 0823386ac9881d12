"""Memory that a worker asks for: it follows what the worker holds, and holds what the worker takes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from entprune import PruneConfig
from entprune.assembly import HELD_BYTES
from entprune.footprint import LIBRARY_BYTES, measure_activations, worker_bytes
from entprune.models import build_model
from entprune.stages import Network, analyse

SHAPE = (3, 32, 32)


@pytest.fixture(scope="module")
def network() -> Network:
    return analyse(build_model("vgg16_cifar", num_classes=10, input_shape=SHAPE), SHAPE, PruneConfig())


class Tower(nn.Module):
    """Two convolutions, an addition that keeps the first one's output alive, and a rectifier in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 36, 2)

    def forward(self, images: Tensor) -> Tensor:
        stream = torch.relu_(self.first(images))
        return self.head((stream + self.second(stream)).flatten(1))


def test_values_count_until_their_last_use_and_once_where_they_share_memory() -> None:
    network = analyse(Tower(), (1, 6, 6), PruneConfig())
    found = measure_activations(network)
    plane = 4 * 36 * 4  # bytes of four channels of 6 x 6
    assert found.image == 36 * 4
    assert found.live == 3 * plane  # both summands and the sum
    assert found.positions == {"first": 36, "second": 36, "head": 1}
    assert found.alive == {"first": found.image + plane, "second": 2 * plane, "head": plane + 2 * 4}


def test_need_grows_with_tuning_but_not_with_activations_on_another_device(network: Network) -> None:
    activations, config = measure_activations(network), PruneConfig(calibration_samples=1536)
    assert worker_bytes(network, activations, config, tuning_batch=4096) > worker_bytes(network, activations, config)
    many = replace(config, calibration_samples=20_000)
    on_device = worker_bytes(network, activations, replace(many, device="cuda"))
    assert LIBRARY_BYTES < on_device < worker_bytes(network, activations, many)


def test_need_grows_with_the_images_until_their_activations_are_spilled() -> None:
    live = measure_activations(lenet(PruneConfig())).live
    some = HELD_BYTES // live
    assert _need(some) - _need(some // 2) > 0.4 * HELD_BYTES
    assert _need(10 * some) - _need(5 * some) < 5 * some * 0.2 * live  # rows and dense answers, a few numbers an image


MEASURE = """
from pathlib import Path
from infra.benchmark import memory

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10

memory._peak_mib = peak  # the resource module would tell the peak of the process that started this one, too
memory.main()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell the peak of a process")
def test_need_grows_as_a_process_does() -> None:
    """Growth with images: what the libraries load at first use differs between machines, and is not of the stages."""
    few, many = 1024, 8192
    taken = _peak_bytes(many) - _peak_bytes(few)
    needed = _need(many) - _need(few)
    assert 0.6 * needed < taken < 1.6 * needed


def _peak_bytes(images: int) -> float:
    command = [sys.executable, "-c", MEASURE, str(images), "assemble", "1"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    return float(json.loads(done.stdout)["peak_mib"]) * 2**20


def _need(images: int) -> int:
    config = PruneConfig(calibration_samples=images)
    network = lenet(config)
    return worker_bytes(network, measure_activations(network), config)


def lenet(config: PruneConfig) -> Network:
    return analyse(build_model("lenet", num_classes=10, input_shape=(1, 28, 28)), (1, 28, 28), config)
