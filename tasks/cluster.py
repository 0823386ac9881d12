"""Where the work runs: a Ray cluster of this process's own, or one that is there already."""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from entprune.errors import ConfigError, EngineError
from tasks.termination import handler_kept

_logger = logging.getLogger(__name__)

_STARTS = 3  # of Ray on this machine, before it is given up
_OBJECT_STORE_FRACTION = 0.3  # of the memory that is free when the cluster starts
_SMALLEST_OBJECT_STORE = 256 * 2**20
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 -- Ray's object store lies there
_CLIENT_PREFIX = "ray://"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerShape:
    """What one worker occupies.

    Attributes:
        threads: CPU cores, and torch threads.
        gpus: devices; a fraction shares one device between workers.
        memory_bytes: of the node's memory beside the object store; 0 reserves none.
    """

    threads: int = 1
    gpus: float = 0.0
    memory_bytes: int = 0

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"expected at least one thread per worker, got {self.threads}.")
        if self.gpus < 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise ConfigError(
                f"expected gpus_per_worker to be 0, a fraction up to 1, or a whole number, got {self.gpus:g}; "
                "use 0.5 for two workers on each GPU."
            )
        if self.memory_bytes < 0:
            raise ConfigError(f"expected no less than 0 bytes of memory per worker, got {self.memory_bytes}.")

    def fit(self, resources: dict[str, float]) -> int:
        """How many such workers one node's resources hold."""
        fits = [int(resources.get("CPU", 0.0) / self.threads + 1e-9)]
        if self.gpus:
            fits.append(int(resources.get("GPU", 0.0) / self.gpus + 1e-9))
        if self.memory_bytes:
            fits.append(int(resources.get("memory", 0.0) / self.memory_bytes + 1e-9))
        return min(fits)

    def describe(self) -> str:
        """What one worker asks, in words."""
        cores = f"{self.threads} CPU core{'s' if self.threads > 1 else ''}"
        asked = [cores, f"{self.gpus:g} GPU"] if self.gpus else [cores]
        return " and ".join([*asked, _gib(self.memory_bytes)] if self.memory_bytes else asked)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """A cluster that this process is connected to.

    Attributes:
        workers: how many run side by side.
        shape: what each occupies.
        is_local: whether this process started it.
    """

    workers: int
    shape: WorkerShape
    is_local: bool


@contextmanager
def connect(
    address: str | None,
    *,
    workers: int | None = None,
    shape: WorkerShape | None = None,
    num_gpus: int | None = None,
    timeout_seconds: float = 20.0,
) -> Iterator[Cluster]:
    """Connect to a cluster, and on leaving shut down what was started here.

    Args:
        address: of a running cluster (`host:port`, `ray://host:port` or `auto`); None starts one on this machine.
            A connection that this process has already is used in either case.
        workers: wanted side by side; by default as many as the cluster holds.
        shape: of each worker.
        num_gpus: GPUs that a local cluster offers; by default those that Ray finds.
        timeout_seconds: for an address to answer.

    Raises:
        EngineError: the address does not answer, or the cluster can never hold the workers.
    """
    shape = shape or WorkerShape()
    if workers is not None and workers < 1:
        raise ConfigError(f"expected at least one worker, got {workers}.")
    was_connected = ray.is_initialized()
    if not was_connected and address is None:
        _start_local(None if workers is None else workers * shape.threads, num_gpus)
    elif not was_connected:
        _join(str(address), timeout_seconds)
    try:
        yield Cluster(workers=_count_workers(workers, shape), shape=shape, is_local=address is None)
    finally:
        if not was_connected:
            ray.shutdown()


def _start_local(num_cpus: int | None, num_gpus: int | None) -> None:
    """Start a cluster, again if need be.

    On a busy machine, or where Ray's files are not cached yet, Ray's agents take longer than the 15 s that its node
    allows them; the node ends, and Ray gives up. Each start finds more of those files cached.
    """
    for attempt in range(1, _STARTS + 1):
        try:
            with handler_kept():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    object_store_memory=object_store_bytes(),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except Exception as cause:  # Ray raises many kinds: a full disk, a forbidden socket, a timeout
            ray.shutdown()
            if attempt == _STARTS:
                raise EngineError(
                    f"cannot start Ray on this machine: {_first_line(cause)}; free memory and disk space."
                ) from cause
            _logger.warning("Ray did not start (%s); trying again, %d of %d", _first_line(cause), attempt + 1, _STARTS)
        else:
            return


def _join(address: str, timeout_seconds: float) -> None:
    _check_reachable(address, timeout_seconds)
    try:
        with handler_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as cause:  # a wrong token, another version, a cluster that is going down
        raise EngineError(
            f"cannot join the Ray cluster at '{address}': {_first_line(cause)}; "
            "it must run the same versions of Ray and Python, and if it asks for a token, as Ray does by default, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a copy of its token."
        ) from cause


def _check_reachable(address: str, timeout_seconds: float) -> None:
    """Knock on the door first: Ray itself waits for minutes."""
    host, _, port = address.removeprefix(_CLIENT_PREFIX).rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise EngineError(f"expected a Ray address such as host:6379, ray://host:10001 or auto, got '{address}'.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_seconds).close()
    except OSError as cause:
        raise EngineError(
            f"no Ray cluster answers at '{address}' ({cause.strerror or cause}); "
            "start one, or leave the address (and RAY_ADDRESS) out to work on this machine."
        ) from cause


def _count_workers(wanted: int | None, shape: WorkerShape) -> int:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(shape.fit(resources) for resources in nodes)
    if room < (wanted or 1):
        total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU", "memory")}
        has = f"{total['CPU']:g} CPU cores and {total['GPU']:g} GPUs"
        less = ""
        if shape.memory_bytes:
            has += f" and {_gib(total['memory'])}"
            less = ", reserve less for each (--memory-per-worker) or calibrate on fewer images,"
        raise EngineError(
            f"asked for {wanted or 'at least 1'} worker(s) of {shape.describe()} each, but the cluster has "
            f"{has} on {len(nodes)} node(s), which hold {room}; ask for fewer{less} or add nodes."
        )
    return wanted or room


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB of memory"


def object_store_bytes() -> int | None:
    """Memory of a local object store: a share of what is free; None where that is unknown and Ray shall decide."""
    free = free_memory_bytes()
    if free is None or not _SHARED_MEMORY.is_dir():
        return None
    room = int(0.9 * shutil.disk_usage(_SHARED_MEMORY).free)
    if room < _SMALLEST_OBJECT_STORE:
        return None
    return max(_SMALLEST_OBJECT_STORE, min(int(_OBJECT_STORE_FRACTION * free), room))


def free_memory_bytes() -> int | None:
    """Memory that this process may still use: the machine's, or its control group's if that is less."""
    machine = _read_entry(Path("/proc/meminfo"), "MemAvailable:")
    if machine is None:
        return None
    free = machine * 1024
    group = Path("/sys/fs/cgroup")
    limit, used = (_read_number(group / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        cache = _read_entry(group / "memory.stat", "inactive_file") or 0
        free = min(free, max(0, limit - used + cache))
    return free


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_entry(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
