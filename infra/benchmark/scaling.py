"""Part `scaling`: what the number of images costs, on synthetic images, so that nothing has to be at hand.

- solve: seconds of one setting of one 3x3 layer's group of 512 channels, with moments of more and more images, a few
  sampled positions of each;
- moments: rate at which such inputs are accumulated, beside the machine's own float32 product of the same shapes;
- memory: peak of a process that calibrates and solves, and of one that assembles too.

Axes: n images, t rows, d features.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
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
POSITIONS = 5  # sampled per image: no fewer rows than features even at the least number of images
SOLVE_IMAGES = (1000, 4000, 16_000, 50_000)
MEMORY_IMAGES = (256, 1024, 4096, 16_384, 65_536)
_CHUNK, _CHUNKS = 2048, 4  # as many rows as are summed up in float32 before they are carried over into float64
_ROUNDS = 3
_LATENT = 384  # independent directions of the synthetic activations


class ScalingMeter:
    """Measures on synthetic inputs."""

    def __init__(self, request: Request) -> None:
        self._config, self._seed, self._stream = request.config(), request.seed, Stream(request.seed)

    def facts(self, record: Record) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """Sizes of the layer."""
        return {"channels": CHANNELS, "taps": TAPS, "outputs": OUTPUTS, "positions": POSITIONS}

    def measure(self, subject: Subject, key: Key) -> Mapping[str, Any]:  # noqa: ARG002 -- one signature for all parts
        """One quantity at one number of images."""
        with torch_threads(self._config.threads):
            if key["quantity"] == "solve":
                return self._solve(key["images"])
            if key["quantity"] == "moments":
                return self._rate()
            return self._memory(key["images"], key["stage"])

    def _solve(self, images: int) -> dict[str, Any]:
        """Solving reads the moments alone, whatever the number of images behind them."""
        start = time.perf_counter()
        problem = self._stream.problem(images * POSITIONS)
        prepared = time.perf_counter()
        path = solve_setting(problem, self._config.settings[0])
        seconds = time.perf_counter() - prepared
        return {
            "rows": images * POSITIONS,
            "preparation_seconds": prepared - start,
            "solve_seconds": seconds,
            "levels": len(path.snapshots),
            **self._threads(),
        }

    def _rate(self) -> dict[str, Any]:
        """Useful operations per second of the accumulation, t d (d + 1), beside a full product's, 2 t d^2.

        The product x^T x is symmetric: one half of it and the diagonal are all that is needed.
        """
        features, count = CHANNELS * TAPS, _CHUNK * _CHUNKS
        rows = activations(_CHUNK, torch.Generator().manual_seed(self._seed))
        accumulator, product = MomentAccumulator(features), torch.empty(features, features)
        actions = (lambda: accumulator.update(rows), lambda: torch.mm(rows.T, rows, out=product))
        rounds = [[_timed(action, _CHUNKS) for action in actions] for _ in range(1 + _ROUNDS)][1:]
        moments, matmul = (float(np.median(column)) for column in zip(*rounds, strict=True))
        useful, full = count * features * (features + 1), 2 * count * features**2
        return {
            "rows": count,
            "moments_gflops": useful / moments / 1e9,
            "moments_gflops_if_full": full / moments / 1e9,
            "matmul_gflops": full / matmul / 1e9,
            **self._threads(),
        }

    def _memory(self, images: int, stage: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "infra.benchmark.memory", str(images), stage, str(self._config.threads)]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)  # noqa: S603 -- our own
        return {**json.loads(done.stdout), **self._threads()}

    def _threads(self) -> dict[str, int]:
        return {"threads": self._config.threads}


class Stream:
    """Moments of the first so many rows of one stream; more rows go on from fewer."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._restart()

    def _restart(self) -> None:
        self._rows, self._generator = 0, torch.Generator().manual_seed(self._seed)
        self._accumulator = MomentAccumulator(CHANNELS * TAPS)

    def problem(self, rows: int) -> GroupProblem:
        """Regression of one group from the moments of the first so many rows."""
        if rows < self._rows:
            self._restart()
        while self._rows < rows:
            count = min(_CHUNK, rows - self._rows)
            self._accumulator.update(activations(count, self._generator))
            self._rows += count
        weight = np.random.default_rng(1).normal(size=(OUTPUTS, CHANNELS * TAPS)).astype(np.float32)
        features = np.arange(CHANNELS * TAPS).reshape(CHANNELS, TAPS)
        return build_problem("group", CHANNELS, {"layer": (self._accumulator.result().covariance(), weight, features)})


def activations(count: int, generator: torch.Generator) -> Tensor:
    """(count, d) correlated inputs of a 3x3 layer: rectified mixtures whose neighbouring taps are alike."""
    mixing = torch.randn(_LATENT, CHANNELS, generator=torch.Generator().manual_seed(0)) / _LATENT**0.5
    latent = torch.randn(count, TAPS, _LATENT, generator=generator).mul_(0.7)
    latent += torch.randn(count, 1, _LATENT, generator=generator)
    return (latent @ mixing).relu_().transpose(1, 2).flatten(1)  # (count, taps, channels) -> (count, channels * taps)


def _timed(action: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
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


_HEADLINE = ("solve_seconds", "preparation_seconds", "moments_gflops", "matmul_gflops", "peak_mib")
PART = Part(name="scaling", networks=("synthetic",), threads=2, cells=cells, meter=ScalingMeter, headline=_HEADLINE)
