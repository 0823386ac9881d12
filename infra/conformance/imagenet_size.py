"""One-shot prune of torchvision networks at ImageNet size: random weights, random images, time and memory.

Not accuracy: that random weights are pruned says nothing about trained ones. What is shown is that the regression
itself (moments, paths, refit of every layer) goes through at 224 x 224 in bounded memory.

    python infra/conformance/imagenet_size.py --output infra/conformance/imagenet_size.json resnet50 mobilenet_v2
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

import entprune
from entprune.models import build_model

IMAGES, SIZE, REMOVED, SEED, THREADS = 256, 224, 0.5, 0, 2


def prune_one(name: str) -> dict[str, Any]:
    """Prune half of the parameters of one network and tell what it took."""
    torch.set_num_threads(THREADS)
    images = np.random.default_rng(SEED).standard_normal((IMAGES, 3, SIZE, SIZE), dtype=np.float32)
    model = build_model(f"torchvision:{name}", num_classes=1000, input_shape=(3, SIZE, SIZE), seed=SEED).eval()
    before = _peak_gib()
    config = entprune.PruneConfig(calibration_samples=IMAGES, threads=THREADS, seed=SEED)
    start = time.perf_counter()
    result = entprune.prune(
        model, images, budget=entprune.Budget(parameters_removed=REMOVED), config=config, progress=_show
    )
    seconds = time.perf_counter() - start
    report = result.report
    return {
        "network": name,
        "groups": len(report["groups"]),
        "parameters": report["dense"]["parameters"],
        "parameters_removed": round(report["one_shot"]["parameters_removed"], 4),
        "macs_removed": round(report["one_shot"]["macs_removed"], 4),
        "certificate": report["certificate"],
        "widest_regression": max(path.num_channels for path in result.paths.values()),
        "seconds": round(seconds, 1),
        "seconds_per_stage": report["timings_seconds"],
        "peak_memory_gib": _peak_gib(),
        "before_pruning_gib": before,
    }


def _show(stage: str, done: int, total: int) -> None:
    print(f"  {stage} {done}/{total}", file=sys.stderr)


def _peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def main() -> None:
    """Run each network in a process of its own, so that its peak memory is its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.output is None:
        print(json.dumps(prune_one(arguments.networks[0])))
        return
    rows = []
    for name in arguments.networks:
        command = [sys.executable, __file__, name]
        completed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 -- this script
        rows.append(json.loads(completed.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]))
    content = {
        "command": f"python infra/conformance/imagenet_size.py --output FILE {' '.join(arguments.networks)}",
        "images": IMAGES, "size": SIZE, "seed": SEED, "threads": THREADS,
        "versions": {"entprune": entprune.__version__, "torch": torch.__version__.split("+")[0],
                     "torchvision": torchvision.__version__.split("+")[0], "python": platform.python_version()},
        "networks": rows,
    }  # fmt: skip
    staging = arguments.output.with_suffix(".tmp")
    staging.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    staging.replace(arguments.output)


if __name__ == "__main__":
    main()
