"""Workers of a run, which can be started while the rest of the engine is still coming up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING

from entprune.config import PruneConfig
from entprune.footprint import Activations, measure_activations, worker_bytes
from flows.environment import cluster_address
from flows.parameters import PruneParameters
from tasks.actors import RayRunner
from tasks.cluster import Cluster, WorkerShape, connect

if TYPE_CHECKING:  # it imports Prefect, which need not be there yet when workers start
    from tasks.workload import Inputs

_started: ContextVar[tuple[PruneParameters, Cluster, RayRunner] | None] = ContextVar("started_workers", default=None)


@contextmanager
def start_workers(parameters: PruneParameters, memory_bytes: int = 0) -> Iterator[tuple[Cluster, RayRunner]]:
    """Connect to the run's cluster and start its workers; they come up in the background and stop with this block.

    Inside another such block for the same parameters, the workers of that one are lent.

    Args:
        parameters: of the run.
        memory_bytes: that each worker reserves, see :func:`memory_need`.

    Raises:
        EngineError: the cluster does not answer, or can never hold the workers.
    """
    started = _started.get()
    if started is not None and started[0] == parameters:
        yield started[1], started[2]
        return
    address = cluster_address(parameters.ray_address)
    with (
        connect(address, workers=parameters.workers, shape=worker_shape(parameters, memory_bytes)) as cluster,
        RayRunner(cluster) as runner,
    ):
        token = _started.set((parameters, cluster, runner))
        try:
            yield cluster, runner
        finally:
            _started.reset(token)


def worker_config(parameters: PruneParameters) -> PruneConfig:
    """Settings of the library's stages; a worker sees its own GPUs alone, so a device's number means nothing there."""
    config = parameters.config()
    return replace(config, device=config.device.partition(":")[0])


def worker_shape(parameters: PruneParameters, memory_bytes: int = 0) -> WorkerShape:
    """Cores, GPUs and memory of each worker: one GPU where the device is one and nothing else was asked."""
    config = parameters.config()
    needs_gpu = config.device.startswith("cuda") and parameters.gpus_per_worker == 0.0
    gpus = 1.0 if needs_gpu else parameters.gpus_per_worker
    return WorkerShape(threads=config.threads, gpus=gpus, memory_bytes=memory_bytes)


def memory_need(runs: Iterable[tuple[Inputs, PruneParameters]]) -> int:
    """Bytes that a worker reserves to be able to serve all of these runs: what was asked for, or else an estimate.

    Args:
        runs: dense network and data of each run, and what is asked.
    """
    measured: dict[int, Activations] = {}
    needs: dict[str, int] = {}
    for inputs, parameters in runs:
        if parameters.memory_per_worker is not None:
            return int(parameters.memory_per_worker * 2**30)
        network = inputs.network
        config = worker_config(parameters).sized_for(network.dense_macs())
        config = replace(config, calibration_samples=min(config.calibration_samples or 1, len(inputs.data.train)))
        tuning_batch = parameters.finetune_batch_size if parameters.finetune_epochs else None
        name = f"{id(network)} {config} {tuning_batch}"
        if id(network) not in measured:
            measured[id(network)] = measure_activations(network)
        if name not in needs:
            needs[name] = worker_bytes(network, measured[id(network)], config, tuning_batch=tuning_batch)
    return max(needs.values(), default=0)


def lone_worker_threads(cluster: Cluster) -> int:
    """Threads for a unit that runs while the other workers wait; what nodes elsewhere could spare is not known."""
    return cluster.shape.threads * (cluster.workers if cluster.is_local else 1)
