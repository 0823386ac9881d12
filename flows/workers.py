"""Workers of a run, which can be started while the rest of the engine is still coming up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from entprune.config import PruneConfig
from flows.environment import cluster_address
from flows.parameters import PruneParameters
from tasks.actors import RayRunner
from tasks.cluster import Cluster, WorkerShape, connect

_started: ContextVar[tuple[PruneParameters, Cluster, RayRunner] | None] = ContextVar("started_workers", default=None)


@contextmanager
def start_workers(parameters: PruneParameters) -> Iterator[tuple[Cluster, RayRunner]]:
    """Connect to the run's cluster and start its workers; they come up in the background and stop with this block.

    Inside another such block for the same parameters, the workers of that one are lent.

    Raises:
        EngineError: the cluster does not answer, or can never hold the workers.
    """
    started = _started.get()
    if started is not None and started[0] == parameters:
        yield started[1], started[2]
        return
    address = cluster_address(parameters.ray_address)
    with (
        connect(address, workers=parameters.workers, shape=worker_shape(parameters)) as cluster,
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


def worker_shape(parameters: PruneParameters) -> WorkerShape:
    """Cores and GPUs of each worker: one GPU where the device is one and nothing else was asked."""
    config = parameters.config()
    needs_gpu = config.device.startswith("cuda") and parameters.gpus_per_worker == 0.0
    return WorkerShape(threads=config.threads, gpus=1.0 if needs_gpu else parameters.gpus_per_worker)


def lone_worker_threads(cluster: Cluster) -> int:
    """Threads for a unit that runs while the other workers wait; what nodes elsewhere could spare is not known."""
    return cluster.shape.threads * (cluster.workers if cluster.is_local else 1)
