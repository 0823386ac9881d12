"""Measure once what each unit of a ResNet-50's pruning costs: random weights, random images of 224 x 224, one thread.

    python -m infra.scheduling.measure --output infra/scheduling/resnet50.json

A few images stand for many: what depends on their number is measured at two numbers and taken as linear between and
beyond them. Solving does not depend on it. Peaks of memory are those of this process, above what it held before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from entprune.allocation import allocate
from entprune.assembly import RefitData, slice_network
from entprune.calibration import LayerStatistics, ShardSum, Statistics
from entprune.candidates import CandidateJob, answers_only, score_candidate
from entprune.config import PruneConfig
from entprune.evaluation import measure_latency
from entprune.models import build_model
from entprune.path import SparsityPath, lower_envelope
from entprune.planning import allocation_problem, plan_for_widths
from entprune.predictions import PredictJob, logits_range
from entprune.pruning import certify_result
from entprune.runner import Work, torch_threads
from entprune.selection import StopRule
from entprune.stages import (
    CalibrationJob,
    ImageSet,
    Network,
    SolveJob,
    analyse,
    calibrate_shard,
    group_problem,
    sampling_plan,
    solve_group,
)
from entprune.storage import atomic_write_text
from infra.benchmark.memory import NoiseSplit
from infra.benchmark.records import describe_run
from tasks.actors import RayRunner
from tasks.cluster import connect

MODEL, CLASSES, SHAPE = "torchvision:resnet50", 1000, (3, 224, 224)
FEW, MANY = 64, 128  # images of the two measurements of what is linear in their number
MACS_REMOVED = 0.5  # of the network whose assembly is timed
_EMPTY_UNITS = 50


class Meter:
    """Seconds and peak memory of steps, by name."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time one step, and see how much memory it takes above what is held."""
        before = _restart_peak()
        start = time.process_time()  # one thread: what a unit costs, however busy the machine is
        yield
        seconds = time.process_time() - start
        peak = _status("VmHWM:") - before
        self.steps[name] = {"seconds": seconds, "peak_mib": peak}
        print(f"{name}: {seconds:.2f} s, {peak:.0f} MiB", file=sys.stderr, flush=True)


def _restart_peak() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier steps have freed would hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    return _status("VmRSS:")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**10


def nothing(shared: Any, item: Any) -> None:
    """Unit: none."""


def measure(config: PruneConfig) -> dict[str, Any]:
    """All units of one run."""
    meter = Meter()
    model = build_model(MODEL, num_classes=CLASSES, input_shape=SHAPE, seed=0).eval()
    with meter.step("analyse"):
        network = analyse(model, SHAPE, config)
    config = config.sized_for(network.dense_macs())
    statistics = _calibrate(meter, network, config)
    problems, paths = _solve(meter, network, statistics, config)
    plan = plan_for_widths(paths, allocate(allocation_problem(paths, network.cost, config, "macs"), 1.0 - MACS_REMOVED))
    smaller = _assemble(meter, network, statistics, plan, config)
    _predict(meter, {"dense": network.model, "pruned": smaller}, config)
    with meter.step("certify"):
        certify_result(network, smaller, plan, _images(MANY), config)
    for name, network_measured in (("dense", network.model), ("pruned", smaller)):
        with meter.step(f"latency {name}"):
            measure_latency(network_measured, SHAPE, repeats=5)
    return {
        "model": MODEL, "calibration_samples": config.calibration_samples,
        "validation_samples": config.validation_samples, "batch_size": config.batch_size,
        "few": FEW, "many": MANY, "groups": problems, "steps": meter.steps,
        "engine": _engine(network, statistics),
    }  # fmt: skip


def _images(count: int) -> ImageSet:
    return ImageSet(split=NoiseSplit(count, SHAPE), indices=np.arange(count))


def _calibrate(meter: Meter, network: Network, config: PruneConfig) -> dict[int, Statistics]:
    """Shards as they are in a run, then the statistics that the later steps read: as many rows from fewer images."""
    shards = []
    for count in (FEW, MANY):
        sampling = sampling_plan(config, config.calibration_samples or count)
        job = CalibrationJob(network=network, images=_images(count), sampling=sampling, device="cpu")
        with meter.step(f"calibrate {count}"):
            shards.append(calibrate_shard(job, (0, count)))
    with meter.step("merge"):
        total = ShardSum()
        total.add(0, shards[0])
        total.add(1, shards[1])
    found: dict[int, Statistics] = {}
    del shards, total
    for count in (FEW, MANY):
        job = CalibrationJob(
            network=network, images=_images(count), sampling=sampling_plan(config, count), device="cpu"
        )
        statistics = calibrate_shard(job, (0, count))
        found[count] = statistics if count == MANY else answers_only(statistics, network)
    return found


def _solve(
    meter: Meter, network: Network, statistics: dict[int, Statistics], config: PruneConfig
) -> tuple[list[dict[str, Any]], dict[str, SparsityPath]]:
    groups, paths = [], {}
    for group in network.groups.groups:
        start = time.process_time()
        problem = group_problem(network, group, statistics[MANY])
        building = time.process_time() - start
        job, solved = SolveJob(problem=problem, device="cpu"), []
        seconds: dict[str, float] = {}
        for setting in config.settings:
            alone = replace(job)  # nothing is shared between settings: they may be on different workers
            with meter.step(f"solve {group.name} {setting.method}"):
                solved.append(solve_group(alone, setting))
            seconds[setting.method] = meter.steps.pop(f"solve {group.name} {setting.method}")["seconds"]
        paths[group.name] = lower_envelope(group.name, len(group.consumers), solved)
        bytes_shared = sum(value.nbytes for consumer in problem.consumers for value in _arrays(consumer))
        groups.append(
            {"group": group.name, "channels": problem.num_channels, "consumers": len(problem.consumers),
             "cost": problem.solve_cost(), "bytes": bytes_shared, "build_seconds": building, "seconds": seconds}
        )  # fmt: skip
    return groups, paths


def _arrays(consumer: Any) -> list[np.ndarray]:
    names = getattr(consumer, "__slots__", ()) or vars(consumer)
    return [value for name in names if isinstance(value := getattr(consumer, name), np.ndarray)]


def _assemble(meter: Meter, network: Network, statistics: dict[int, Statistics], plan: Any, config: PruneConfig) -> Any:
    for count in (FEW, MANY):
        job = CandidateJob(
            network=network,
            data=RefitData(
                split=NoiseSplit(count, SHAPE), indices=np.arange(count),
                statistics=answers_only(statistics[count], network), sampling=sampling_plan(config, count),
                residuals=network.residuals,
            ),
            refit=config.refit(), validation=None, reference=None,
            stop=StopRule(max_drop=None, quantile=config.quantile), device="cpu",
        )  # fmt: skip
        with meter.step(f"assemble {count}"):
            score = score_candidate(job, plan)
    smaller = slice_network(network.model, network.groups, plan)
    smaller.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in score.state.items()})
    return smaller.eval()


def _predict(meter: Meter, models: dict[str, nn.Module], config: PruneConfig) -> None:
    for name, model in models.items():
        job = PredictJob(model=model, images=_images(MANY), device=config.device)
        for count in (FEW, MANY):
            with meter.step(f"predict {name} {count}"):
                logits_range(job, (0, count))


def _engine(network: Network, statistics: dict[int, Statistics]) -> dict[str, Any]:
    """What Ray itself takes: a round trip without work, and sharing the largest problem."""
    problems = [group_problem(network, group, statistics[MANY]) for group in network.groups.groups[-6:]]
    jobs = [SolveJob(problem=problem, device="cpu") for problem in problems]
    sizes = [sum(value.nbytes for part in job.problem.consumers for value in _arrays(part)) for job in jobs]
    with connect(None, workers=1) as cluster, RayRunner(cluster) as runner:
        handle = runner.share(None)
        runner.run(nothing, [Work(shared=handle, item=None)], stage="warm-up")
        start = time.perf_counter()
        runner.run(nothing, [Work(shared=handle, item=None)] * _EMPTY_UNITS, stage="empty")
        unit = (time.perf_counter() - start) / _EMPTY_UNITS
        runner.share(jobs[0])
        start = time.perf_counter()
        handles: list[Any] = [runner.share(job) for job in jobs[1:]]
        rate = sum(sizes[1:]) / (time.perf_counter() - start)
        del handles
    return {"seconds_per_unit": unit, "share_bytes_per_second": rate, "shard_bytes": _bytes(statistics[MANY])}


def _bytes(statistics: Statistics) -> int:
    return sum(entry.outputs.nbytes + _moment_bytes(entry) for entry in statistics.values())


def _moment_bytes(entry: LayerStatistics) -> int:
    arrays = [getattr(entry.moments, name, None) for name in ("rows", "mean", "scatter")]
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


def main(work: Callable[[PruneConfig], dict[str, Any]] = measure) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    config = PruneConfig(threads=1)
    run = describe_run("python -m infra.scheduling.measure --output FILE", config.threads)
    with torch_threads(config.threads):
        content = work(config)
    atomic_write_text(arguments.output, json.dumps({"run": run, **content}, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
