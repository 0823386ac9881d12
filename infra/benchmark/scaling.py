"""Part `scaling`: what the number of images costs, on synthetic images, so that nothing has to be at hand.

- solve: seconds of one 3x3 layer's group of 512 channels, with moments of more and more images;
- moments: rate at which such inputs are accumulated, beside the machine's own float32 matrix product;
- memory: peak of a process that calibrates and solves, and of one that assembles too.

Axes: n images, t rows, d features.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entprune.moments import MomentAccumulator
from entprune.path import solve_setting
from entprune.regression import GroupProblem, build_problem
from entprune.runner import torch_threads
from infra.benchmark.parts import Key, Part, Request
from infra.benchmark.records import Record, Subject

CHANNELS, TAPS, OUTPUTS = 512, 9, 512
SOLVE_IMAGES = (1000, 2000, 5000, 10_000, 20_000, 50_000)
MEMORY_IMAGES = (512, 1024, 2048, 4096, 8192)
_CHUNK = 2048
_LATENT = 384  # independent directions of the synthetic activations


class ScalingMeter:
    """Measures on synthetic inputs."""

    def __init__(self, request: Request) -> None:
        self._config, self._seed = request.config(), request.seed

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Sizes of the layer."""
        return {"channels": CHANNELS, "taps": TAPS, "outputs": OUTPUTS}

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """One quantity at one number of images."""
        with torch_threads(self._config.threads):
            if key["quantity"] == "solve":
                return self._solve(key["images"])
            if key["quantity"] == "moments":
                return self._rate()
            return self._memory(key["images"], key["stage"])

    def _solve(self, images: int) -> dict[str, Any]:
        """One row per image at least, as many as a calibration samples; solving reads moments alone."""
        rows = max(images, self._config.min_rows, int(self._config.rows_per_feature * CHANNELS * TAPS))
        start = time.perf_counter()
        problem = synthetic_problem(rows, self._seed)
        prepared = time.perf_counter()
        for setting in self._config.settings:
            solve_setting(problem, setting)
        seconds = time.perf_counter() - prepared
        return {"rows": rows, "moments_seconds": prepared - start, "solve_seconds": seconds, **self._threads()}

    def _rate(self) -> dict[str, Any]:
        """Useful operations per second: t d (d + 1) for the symmetric product, 2 d^3 for a square one."""
        features = CHANNELS * TAPS
        rows = activations(_CHUNK, np.random.default_rng(self._seed))
        accumulator, square = MomentAccumulator(features), torch.randn(features, features)
        passes = [(_timed(lambda: accumulator.update(rows)), _timed(lambda: square @ square)) for _ in range(6)][1:]
        moments, product = (float(np.median(column)) for column in zip(*passes, strict=True))
        useful, nominal = _CHUNK * features * (features + 1), 2 * _CHUNK * features**2
        return {
            "rows": _CHUNK,
            "moments_gflops": useful / moments / 1e9,
            "moments_gflops_if_full": nominal / moments / 1e9,
            "matmul_gflops": 2 * features**3 / product / 1e9,
            **self._threads(),
        }

    def _memory(self, images: int, stage: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "infra.benchmark.memory", str(images), stage, str(self._config.threads)]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)  # noqa: S603 -- our own
        return {**json.loads(done.stdout), **self._threads()}

    def _threads(self) -> dict[str, int]:
        return {"threads": self._config.threads}


def activations(count: int, generator: np.random.Generator) -> Tensor:
    """(count, d) correlated inputs of a 3x3 layer: rectified mixtures whose neighbouring taps are alike."""
    mixing = np.random.default_rng(0).normal(size=(_LATENT, CHANNELS)).astype(np.float32) / _LATENT**0.5
    latent = generator.normal(size=(count, 1, _LATENT)) + 0.7 * generator.normal(size=(count, TAPS, _LATENT))
    values = np.maximum(latent.astype(np.float32) @ mixing, 0.0)  # (count, taps, channels)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(count, -1))


def synthetic_problem(rows: int, seed: int) -> GroupProblem:
    """Regression of one group from the moments of that many rows."""
    generator = np.random.default_rng(seed)
    accumulator = MomentAccumulator(CHANNELS * TAPS)
    for start in range(0, rows, _CHUNK):
        accumulator.update(activations(min(_CHUNK, rows - start), generator))
    weight = np.random.default_rng(1).normal(size=(OUTPUTS, CHANNELS * TAPS)).astype(np.float32)
    features = np.arange(CHANNELS * TAPS).reshape(CHANNELS, TAPS)
    return build_problem("group", CHANNELS, {"layer": (accumulator.result().covariance(), weight, features)})


def _timed(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def cells(request: Request) -> list[tuple[Subject, Key]]:
    """All quantities."""
    subject = Subject(part="scaling", network=request.network, seed=request.seed)
    keys: list[Key] = [{"quantity": "moments"}]
    keys += [{"quantity": "solve", "images": images} for images in SOLVE_IMAGES]
    keys += [
        {"quantity": "memory", "stage": stage, "images": images}
        for stage in ("solve", "assemble")
        for images in MEMORY_IMAGES
    ]
    return [(subject, key) for key in keys]


PART = Part(name="scaling", networks=("synthetic",), threads=2, cells=cells, meter=ScalingMeter)
