"""Ray actors that run the library's units, and the runner that hands them out. No mathematics here.

A worker keeps the values that its units share (the model replica among them), so that each is rebuilt once per worker;
arrays inside them lie once per node in the object store and are read in place.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from typing import Any, Self

import ray
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from entprune.errors import EngineError, EntpruneError
from entprune.runner import Divisible, OnResult, Progress, Unit, Work, largest_first
from tasks.cluster import Cluster
from tasks.termination import termination_heard
from tasks.unit_queue import UnitQueue

_logger = logging.getLogger(__name__)

_DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, ObjectLostError)  # what a unit can be tried again after
_NO_MEMORY = re.compile(r"can't allocate memory|out of memory", re.IGNORECASE)  # torch on a CPU raises RuntimeError
_KILLED_FOR_MEMORY = re.compile(r"low on memory|out of memory", re.IGNORECASE)
_HELD_VALUES = 4
_MAX_FAILED_STARTS = 3
_START_SECONDS = 300.0
_SETTLE_SECONDS = 30.0
_LOOK_SECONDS = 2.0  # between two looks at workers that do not come up


class Worker:
    """Runs units in a process of its own.

    Args:
        threads: of torch; equal everywhere, so that results do not depend on the machine.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        accept_read_only_arrays()
        self._held: OrderedDict[str, Any] = OrderedDict()

    def ready(self) -> str:
        """Answer once the process is up: the id of the node that it runs on."""
        return str(ray.get_runtime_context().get_node_id())

    def run(
        self, unit: Unit, key: str | tuple[str, ...], reference: list[Any], item: Any, chunk: int | None = None
    ) -> Any:
        """Run one unit, after one that lacked memory with fewer images at a time.

        The reference comes in a list, or Ray would rebuild the shared value for each call.
        """
        value = self._value(key, reference)
        if chunk is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return unit(value if chunk is None else _in_chunks(value, chunk), item)

    def forget(self, key: str) -> None:
        """Let go of a shared value."""
        self._held.pop(key, None)

    def _value(self, key: str | tuple[str, ...], reference: list[Any]) -> Any:
        if isinstance(key, tuple):
            return tuple(self._value(part, [inner]) for part, inner in zip(key, reference[0], strict=True))
        if key not in self._held:
            while len(self._held) >= _HELD_VALUES:
                self._held.popitem(last=False)
            self._held[key] = ray.get(reference[0])
        self._held.move_to_end(key)
        return self._held[key]


def accept_read_only_arrays() -> None:
    """Silence torch about arrays in the object store: they are read-only on purpose, and nothing writes to them."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)


class SharedValue:
    """Handle of a value in the object store."""

    def __init__(self, reference: Any) -> None:
        self.key = uuid.uuid4().hex
        self.reference: Any = reference


class _Pool:
    """Actors of one shape: idle, busy, or still starting."""

    def __init__(self, cluster: Cluster) -> None:
        shape = cluster.shape
        self._actor_class = ray.remote(Worker).options(
            num_cpus=shape.threads,
            num_gpus=shape.gpus,
            memory=shape.memory_bytes or None,
            scheduling_strategy="SPREAD",
        )
        self._cluster = cluster
        self._failed_starts = 0
        self.nodes: dict[Any, str] = {}  # actor -> node
        self.idle: list[Any] = []
        self.starting: dict[Any, Any] = {}  # reference of the answer -> actor
        self.busy: dict[Any, tuple[Any, int]] = {}  # reference of the result -> actor, number of the unit
        for _ in range(cluster.workers):
            self.start()

    def start(self) -> None:
        actor: Any = self._actor_class.remote(self._cluster.shape.threads)
        self.starting[actor.ready.remote()] = actor

    def wait(self, stage: str) -> list[Any]:
        """References of the results that came in; workers that became ready join the idle ones."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with termination_heard():
                ready, _ = ray.wait([*self.busy, *self.starting], num_returns=1, timeout=_LOOK_SECONDS)
            finished = [reference for reference in ready if reference in self.busy]
            for reference in ready:
                if reference in self.starting:
                    self._join(reference)
            if finished or self.idle:
                return finished
            if not self.busy and time.monotonic() > deadline:
                raise EngineError(
                    f"stage '{stage}': no worker of {self._cluster.shape.describe()} could be placed within "
                    f"{_START_SECONDS:g} s; free are {_free_resources()}; wait for the cluster or ask for less."
                )

    def _join(self, reference: Any) -> None:
        actor = self.starting.pop(reference)
        try:
            with termination_heard():
                self.nodes[actor] = ray.get(reference)
        except RayError as cause:
            self._failed_starts += 1
            if self._failed_starts > _MAX_FAILED_STARTS:
                raise EngineError(f"workers fail to start ({_reason(cause)}); see Ray's logs on that node.") from cause
            self.start()
        else:
            self._failed_starts = 0
            self.idle.append(actor)

    def stop_busy(self, *, replace: bool) -> None:
        """Stop what is running, and replace the workers that ran it if there is more to come."""
        for actor, _ in self.busy.values():
            ray.kill(actor)
            if replace:
                self.start()
        self.busy.clear()

    def actors(self) -> list[Any]:
        return [*self.idle, *self.starting.values(), *(actor for actor, _ in self.busy.values())]


class RayRunner:
    """Runs units on a pool of actors; each takes the largest unit left as soon as it is free.

    Args:
        cluster: what to run on; it must stay connected.
        progress: called after each unit.
    """

    def __init__(self, cluster: Cluster, *, progress: Progress | None = None) -> None:
        self._pool = _Pool(cluster)
        self.workers = cluster.workers
        self.progress = progress
        self.units_run: Counter[str] = Counter()
        self.units_by_node: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def settle(self) -> None:
        """Wait until no worker is starting, so that nothing disturbs a measurement of time on this machine."""
        if self._pool.starting:
            with termination_heard():
                ray.wait(list(self._pool.starting), num_returns=len(self._pool.starting), timeout=_SETTLE_SECONDS)

    def describe(self) -> dict[str, Any]:
        """How many workers there are, and what has been done on which node, by the start of its id."""
        workers = Counter(self._pool.nodes[actor] for actor in self._pool.actors() if actor in self._pool.nodes)
        names = dict.fromkeys([*workers, *self.units_by_node])
        nodes = {name[:12]: {"workers": workers[name], "units": self.units_by_node[name]} for name in names}
        return {"workers": sum(workers.values()), "nodes": nodes}

    def close(self) -> None:
        """Stop the workers."""
        for actor in self._pool.actors():
            ray.kill(actor)

    def share(self, value: Any) -> SharedValue:
        """Put a value into the object store, once for all workers.

        Raises:
            EngineError: it does not fit.
        """
        try:
            return SharedValue(ray.put(value))
        except RayError as cause:
            raise EngineError(
                f"cannot share data with the workers: {_reason(cause)}; free memory and disk space."
            ) from cause

    def release(self, handle: SharedValue) -> None:
        """Let go of the value, here and in every worker."""
        handle.reference = None
        for actor in self._pool.actors():
            actor.forget.remote(handle.key)

    def run(
        self, unit: Unit, work: Sequence[Work], *, stage: str, on_result: OnResult | None = None, keep: bool = True
    ) -> list[Any]:
        """Run all work; arguments as for :meth:`entprune.runner.Runner.run`.

        Raises:
            EntpruneError: a unit raised it.
            EngineError: a unit's worker died four times, a unit lacked memory even with few images at a time and
                nothing beside it, no worker could be placed, or the cluster is gone.
        """
        results: list[Any] = [None] * len(work)
        queue = UnitQueue(largest_first(work), stage)
        done = 0
        try:
            while done < len(work):
                self._hand_out(unit, work, queue)
                arrived = self._collect(self._pool.wait(stage), queue)
                self._hand_out(unit, work, queue)  # before the caller stores results: nobody waits for a disk
                while arrived:
                    number, result = arrived.popleft()
                    if keep:
                        results[number] = result
                    if on_result is not None:
                        on_result(number, result)
                    del result
                    done += 1
                    self._count(stage, done, len(work))
        except BaseException as error:
            self._pool.stop_busy(replace=isinstance(error, Exception))  # after Ctrl-C nothing follows
            if isinstance(error, RayError):
                raise EngineError(f"stage '{stage}': Ray failed ({_reason(error)}); see its logs.") from error
            raise
        return results

    def _hand_out(self, unit: Unit, work: Sequence[Work], queue: UnitQueue) -> None:
        pool = self._pool
        while pool.idle and (number := queue.take(num_busy=len(pool.busy))) is not None:
            actor = pool.idle.pop()
            key, value = _address(work[number].shared)
            reference = actor.run.remote(unit, key, [value], work[number].item, queue.chunk(number))
            pool.busy[reference] = (actor, number)
            _logger.debug("stage '%s': unit %d is handed out", queue.stage, number)

    def _collect(self, finished: Sequence[Any], queue: UnitQueue) -> deque[tuple[int, Any]]:
        """Fetch results; a unit whose worker died, or that lacked memory, goes back to the queue."""
        arrived: deque[tuple[int, Any]] = deque()
        for reference in finished:
            actor, number = self._pool.busy.pop(reference)
            queue.returned(number)
            try:
                with termination_heard():
                    result = ray.get(reference)
            except RayTaskError as error:
                self._pool.idle.append(actor)
                if not lacks_memory(error):
                    raise _original(error) from None
                queue.put_back_smaller(number, _reason(error.cause))
            except _DEATHS as error:
                self._replace(actor)
                if lacks_memory(error):
                    queue.put_back_smaller(number, _reason(error))
                else:
                    queue.put_back(number, _reason(error))
            else:
                self._pool.idle.append(actor)
                self.units_by_node[self._pool.nodes[actor]] += 1
                arrived.append((number, result))
                del result
        return arrived

    def _replace(self, actor: Any) -> None:
        ray.kill(actor)
        self._pool.start()

    def _count(self, stage: str, done: int, total: int) -> None:
        self.units_run[stage] += 1
        if self.progress is not None:
            self.progress(stage, done, total)


def _in_chunks(value: Any, images: int) -> Any:
    """A shared value, or each of several, with fewer images at a time where it can be divided."""
    if isinstance(value, tuple):
        return tuple(_in_chunks(part, images) for part in value)
    return value.in_chunks(images) if isinstance(value, Divisible) else value


def lacks_memory(error: BaseException) -> bool:
    """Whether a unit failed for want of memory: Ray stopped its worker, or Python, torch or a GPU had no more."""
    if isinstance(error, OutOfMemoryError):
        return True
    if isinstance(error, RayTaskError):
        cause = error.cause
        return isinstance(cause, (MemoryError, torch.OutOfMemoryError)) or (
            isinstance(cause, RuntimeError) and _NO_MEMORY.search(str(cause)) is not None
        )
    return isinstance(error, RayActorError) and _KILLED_FOR_MEMORY.search(str(error)) is not None


def _address(shared: SharedValue | tuple[SharedValue, ...]) -> tuple[str | tuple[str, ...], Any]:
    """Key and reference of a shared value, or those of several."""
    if isinstance(shared, tuple):
        return tuple(handle.key for handle in shared), [handle.reference for handle in shared]
    return shared.key, shared.reference


def _original(error: RayTaskError) -> BaseException:
    """What the unit itself raised; of a programming error the remote traceback comes along."""
    cause = error.cause
    if isinstance(cause, EntpruneError):
        return cause
    if isinstance(cause, Exception):
        cause.add_note(str(error))
        return cause
    return error


def _reason(error: BaseException) -> str:
    """The line that says why, out of the many that Ray writes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("The actor is dead because")]
    telling += [line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception): ", line)]
    return next(iter(telling or lines), type(error).__name__).rstrip(".")


def _free_resources() -> str:
    free = ray.available_resources()
    memory = f"{free.get('memory', 0.0) / 2**30:.1f} GiB of memory"
    return f"{free.get('CPU', 0.0):g} CPU cores and {free.get('GPU', 0.0):g} GPUs and {memory}"
