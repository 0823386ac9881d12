"""Peak memory of one pruning in a process of its own; prints one JSON object.

python -m infra.benchmark.memory IMAGES (solve|assemble) THREADS
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from entprune.allocation import allocate
from entprune.candidates import score_candidate
from entprune.config import Budget, PruneConfig
from entprune.models import build_model
from entprune.planning import allocation_problem, plan_for_widths
from entprune.pruning import candidate_job
from entprune.runner import InProcessRunner
from entprune.stages import ImageSet, analyse, calibrate, solve

NETWORK, SHAPE = "lenet", (1, 28, 28)


@dataclass(frozen=True, slots=True)
class NoiseSplit:
    """Random images (C, H, W) that are made when they are asked for, so that none is held."""

    count: int
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        """Return the number of images."""
        return self.count

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """All zero."""
        return np.zeros(self.count, dtype=np.int64)

    def batch(self, indices: npt.NDArray[np.integer[Any]]) -> Tensor:
        """Images of these numbers."""
        generator = torch.Generator().manual_seed(int(indices[0]))
        return torch.randn(len(indices), *self.shape, generator=generator)


def main() -> None:
    """Calibrate and solve, and assemble if asked."""
    count, stage, threads = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.manual_seed(0)
    config = PruneConfig(calibration_samples=count, threads=threads)
    before = _peak_mib()
    network = analyse(build_model(NETWORK, num_classes=10, input_shape=SHAPE), SHAPE, config)
    images = ImageSet(split=NoiseSplit(count, SHAPE), indices=np.arange(count))
    runner = InProcessRunner(threads=threads)
    statistics = calibrate(network, images, config, runner)
    paths = solve(network, statistics, config, runner)
    if stage == "assemble":
        budget = Budget(parameters_removed=0.5)
        job = candidate_job(network, images, statistics, None, budget, config, runner)
        widths = allocate(allocation_problem(paths, network.cost, config, "parameters"), 1.0 - budget.value)
        score_candidate(job, plan_for_widths(paths, widths))
    print(json.dumps({"network": NETWORK, "peak_mib": _peak_mib(), "libraries_mib": before}))


def _peak_mib() -> float:
    """Since this program began: getrusage's figure would start from that of the process that called it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**10  # kB on Linux


if __name__ == "__main__":
    main()
