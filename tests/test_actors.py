"""Ray workers: same bits as in process, one copy of what is shared, deaths survived, errors unwrapped."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle

from entprune import Budget, PathSetting, PruneConfig, scoring
from entprune.candidates import CandidateScore
from entprune.datasets import ArraySplit
from entprune.errors import ConfigError, DataError, EngineError
from entprune.models import build_model
from entprune.moments import Moments, RowMoments
from entprune.plan import GroupPlan, PruningPlan
from entprune.pruning import candidate_job
from entprune.runner import InProcessRunner, Runner, Work
from entprune.search import search
from entprune.stages import ImageSet, Network, analyse, calibrate, solve, solve_group
from tasks import actors, unit_queue
from tasks.actors import RayRunner
from tasks.cluster import Cluster, WorkerShape, connect, free_memory_bytes, object_store_bytes

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find the tests


# --- units ------------------------------------------------------------------------------------------------------------


def look_at(shared: dict[str, np.ndarray], _: int) -> tuple[int, int, bool, bool, int]:
    array = shared["array"]
    return os.getpid(), id(shared), array.flags.writeable, array.flags.owndata, torch.get_num_threads()


def add(shared: int, item: int) -> int:
    return shared + item


def subtract_all(shared: tuple[dict[str, np.ndarray], ...], _: int) -> float:
    first, second = shared
    return float((first["array"] - second["array"]).mean())


def refuse(shared: Any, item: int) -> int:
    if item == 2:
        raise DataError("expected another item, got 2; leave it out.")
    return item


def stumble(shared: Any, item: int) -> float:
    return 1 / item


def see_gpus(shared: Any, item: int) -> tuple[int, str]:
    time.sleep(0.05)
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES", "")


def read_moments(shared: Moments | None, item: int) -> tuple[int, float, dict[str, int]]:
    total = 0.0 if shared is None else float(shared.scatter.sum())  # every page is touched
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]]
    time.sleep(0.05)
    return os.getpid(), total, {name.rstrip(":"): int(size) * 1024 for name, size, _ in lines}


def die(shared: Any, item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(shared: tuple[Path, Any], item: PathSetting) -> Any:
    marker, job = shared
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return solve_group(job, item)


# --- set-up -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with connect(None, workers=6, num_gpus=2) as connected:  # more than there are cores: pools of several tests at once
        yield dataclasses.replace(connected, workers=2)


@pytest.fixture(scope="module")
def runner(cluster: Cluster) -> Iterator[RayRunner]:
    with RayRunner(cluster) as pool:
        meet_all_workers(pool, 2)
        yield pool


def own_pid(shared: Any, item: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def meet_all_workers(runner: Runner, count: int) -> None:
    """Wait until every worker has run a unit: on a busy machine one may start much later than the other."""
    seen: set[int] = set()
    for _ in range(200):
        seen.update(run_shared(runner, own_pid, None, list(range(2 * count))))
        if len(seen) == count:
            return


def run_shared(runner: Runner, unit: Any, value: Any, items: list[Any], **options: Any) -> list[Any]:
    handle = runner.share(value)
    try:
        return runner.run(unit, [Work(shared=handle, item=item) for item in items], stage="test", **options)
    finally:
        runner.release(handle)


@pytest.fixture(scope="module")
def config() -> PruneConfig:
    settings = (PathSetting(), PathSetting(entropy_weight=0.3))
    return PruneConfig(calibration_samples=96, batch_size=16, min_rows=400, settings=settings)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, 96)
    pixels = generator.integers(0, 255, (96, 1, 8, 8), dtype=np.uint8)
    return ImageSet(split=ArraySplit(images=pixels, labels=labels, mean=(0.5,), std=(0.3,)), indices=np.arange(96))


@pytest.fixture(scope="module")
def network(config: PruneConfig) -> Network:
    return analyse(build_model("digits_cnn", num_classes=10, input_shape=(1, 8, 8)), (1, 8, 8), config)


# --- the runner -------------------------------------------------------------------------------------------------------


def test_stages_give_the_same_bits_as_in_process(
    runner: RayRunner, config: PruneConfig, images: ImageSet, network: Network
) -> None:
    outcomes = []
    budget = Budget(parameters_removed=0.5)
    for worker in (runner, InProcessRunner()):
        statistics = calibrate(network, images, config, worker)
        paths = solve(network, statistics, config, worker)
        job = candidate_job(network, images, statistics, images, budget, config, worker)
        found = search(paths, network.cost, job, budget, config, worker)
        outcomes.append((statistics, paths, found))
    (statistics, paths, found), (own_statistics, own_paths, own_found) = outcomes
    for layer, entry in own_statistics.items():
        np.testing.assert_array_equal(statistics[layer].outputs, entry.outputs)
        if entry.moments is not None:
            form = "rows" if isinstance(entry.moments, RowMoments) else "scatter"
            np.testing.assert_array_equal(getattr(statistics[layer].moments, form), getattr(entry.moments, form))
    for group, path in own_paths.items():
        np.testing.assert_array_equal(paths[group].errors, path.errors)
    assert found.chosen.plan.digest() == own_found.chosen.plan.digest()
    for name, value in own_found.state.items():
        np.testing.assert_array_equal(found.state[name], value)


def test_shared_value_is_put_once_and_read_in_place(runner: RayRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    puts: list[Any] = []
    real_put = ray.put
    monkeypatch.setattr(ray, "put", lambda value: puts.append(value) or real_put(value))
    seen = run_shared(runner, look_at, {"array": np.arange(100_000)}, list(range(40)))
    assert len(puts) == 1
    assert len({pid for pid, *_ in seen}) == 2
    assert not any(writeable or owns for _, _, writeable, owns, _ in seen)
    assert len({(pid, identity) for pid, identity, *_ in seen}) == 2  # rebuilt once per worker, not once per unit


def test_unit_may_read_several_shared_values(runner: RayRunner) -> None:
    handles = tuple(runner.share({"array": np.full(100_000, fill)}) for fill in (1.0, 2.0))
    work = [Work(shared=handles[::step], item=item) for step in (1, -1) for item in range(4)]
    assert runner.run(subtract_all, work, stage="test") == [-1.0] * 4 + [1.0] * 4
    for handle in handles:
        runner.release(handle)


def test_candidate_in_pieces_is_the_same_on_workers(
    cluster: Cluster, config: PruneConfig, images: ImageSet, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_MUCH_WORK", 0.0)
    own = InProcessRunner()
    job = candidate_job(
        network, images, calibrate(network, images, config, own), images, Budget(max_accuracy_drop=1.0), config, own
    )
    (group, *others) = network.groups.groups
    kept = [
        GroupPlan(name=g.name, num_channels=g.num_channels, kept_channels=tuple(range(g.num_channels))) for g in others
    ]
    half = GroupPlan(
        name=group.name, num_channels=group.num_channels, kept_channels=tuple(range(group.num_channels // 2))
    )
    plan = PruningPlan(groups=(half, *kept))
    scores: list[CandidateScore] = []
    steps: list[str] = []
    with RayRunner(cluster, progress=lambda stage, *_: steps.append(stage)) as pool:
        for worker in (pool, own):
            handle = worker.share(job)
            task = scoring.ScoreTask(handle=handle, job=job, plan=plan, stop=job.stop)
            scoring.score_all([task], worker, stage="search", on_score=lambda _, score: scores.append(score))
            worker.release(handle)
    assert steps == ["search", *["search, validation"] * 2]  # 96 images are two batches
    np.testing.assert_array_equal(scores[0].predicted, scores[1].predicted)
    assert all(np.array_equal(scores[0].state[name], value) for name, value in scores[1].state.items())


def test_workers_use_the_threads_they_were_given(runner: RayRunner) -> None:
    seen = run_shared(runner, look_at, {"array": np.zeros(1)}, list(range(4)))
    assert {threads for *_, threads in seen} == {1}


def test_released_values_are_forgotten(runner: RayRunner) -> None:
    run_shared(runner, look_at, {"array": np.zeros(1)}, list(range(8)))
    for actor in runner._pool.actors():
        assert ray.get(actor.__ray_call__.remote(lambda worker: list(worker._held))) == []


def test_results_keep_the_order_of_the_work(runner: RayRunner) -> None:
    assert run_shared(runner, add, 10, list(range(30))) == list(range(10, 40))


def test_no_work_is_done_at_once(runner: RayRunner) -> None:
    assert run_shared(runner, add, 10, []) == []


def test_largest_work_starts_first_and_results_arrive_in_this_thread(cluster: Cluster) -> None:
    arrivals: list[tuple[int, int, int]] = []
    progress: list[tuple[str, int, int]] = []
    alone = dataclasses.replace(cluster, workers=1)  # the order of arrival is the order of starting
    with RayRunner(alone, progress=lambda *step: progress.append(step)) as pool:
        handle = pool.share(0)
        work = [Work(shared=handle, item=item, cost=cost) for item, cost in enumerate((1.0, 3.0, 2.0))]
        pool.run(
            add, work, stage="test", on_result=lambda n, result: arrivals.append((n, result, threading.get_ident()))
        )
    assert [number for number, *_ in arrivals] == [1, 2, 0]
    assert {thread for *_, thread in arrivals} == {threading.get_ident()}
    assert progress == [("test", 1, 3), ("test", 2, 3), ("test", 3, 3)]


def test_results_that_are_not_kept_go_to_the_caller_alone(runner: RayRunner) -> None:
    seen: dict[int, int] = {}
    assert run_shared(runner, add, 1, [1, 2], on_result=seen.__setitem__, keep=False) == [None, None]
    assert seen == {0: 2, 1: 3}


def test_library_errors_come_out_as_themselves(runner: RayRunner) -> None:
    with pytest.raises(DataError, match="expected another item, got 2") as caught:
        run_shared(runner, refuse, None, [1, 2, 3])
    assert type(caught.value) is DataError
    assert run_shared(runner, add, 1, [1]) == [2]


def test_programming_errors_bring_the_remote_traceback(runner: RayRunner) -> None:
    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        run_shared(runner, stumble, None, [0])
    assert any("in stumble" in note for note in caught.value.__notes__)


def test_unit_of_a_killed_worker_is_done_again(
    runner: RayRunner, config: PruneConfig, images: ImageSet, network: Network, tmp_path: Path
) -> None:
    from entprune.stages import SolveJob, group_problem

    statistics = calibrate(network, images, config, InProcessRunner())
    job = SolveJob(problem=group_problem(network, network.groups.groups[0], statistics), device="cpu")
    marker = tmp_path / "died"
    paths = run_shared(runner, die_once, (marker, job), list(config.settings))
    assert marker.exists()
    for setting, path in zip(config.settings, paths, strict=True):
        expected = solve_group(job, setting)
        np.testing.assert_array_equal(path.order, expected.order)
        np.testing.assert_array_equal(path.errors, expected.errors)


def test_unit_that_always_kills_its_worker_is_given_up(runner: RayRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_queue, "_MAX_DEATHS", 1)
    with pytest.raises(EngineError, match=r"stage 'test': the worker of one unit died 2 times .* more memory"):
        run_shared(runner, die, None, [0])
    assert run_shared(runner, add, 1, [1]) == [2]


@pytest.mark.parametrize(("workers", "gpus", "per_device"), [(2, 1.0, 1), (4, 0.5, 2)])
def test_workers_are_spread_over_the_gpus_that_they_reserve(
    cluster: Cluster, workers: int, gpus: float, per_device: int
) -> None:
    placed: dict[int, str] = {}
    with RayRunner(dataclasses.replace(cluster, workers=workers, shape=WorkerShape(gpus=gpus))) as pool:
        for _ in range(200):
            placed |= dict(run_shared(pool, see_gpus, None, list(range(2 * workers))))
            if len(placed) == workers:
                break
    assert Counter(placed.values()) == {"0": per_device, "1": per_device}


def private(memory: dict[str, int]) -> int:
    return memory["Private_Clean"] + memory["Private_Dirty"]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system does not tell shared memory")
def test_large_moments_are_resident_once_for_all_workers_of_a_node(runner: RayRunner) -> None:
    width = 3000
    moments = Moments(count=width, mean=np.zeros(width), scatter=np.full((width, width), 0.5))
    before = {pid: memory for pid, _, memory in run_shared(runner, read_moments, None, list(range(40)))}
    seen = run_shared(runner, read_moments, moments, list(range(40)))
    after = {pid: memory for pid, _, memory in seen}
    assert len(after) == 2
    assert {total for _, total, _ in seen} == {0.5 * width**2}
    size = moments.scatter.nbytes
    for pid, memory in after.items():
        assert memory["Rss"] - before[pid]["Rss"] > 0.9 * size  # it is there, and counted
    copies = sum(private(memory) - private(before[pid]) for pid, memory in after.items())
    assert copies < 0.25 * size  # two copies would be 2


def test_memory_of_a_node_bounds_its_workers(cluster: Cluster) -> None:
    (node,) = (node["Resources"] for node in ray.nodes() if node["Alive"])
    third = WorkerShape(memory_bytes=int(node["memory"] / 3.1))
    with connect(None, shape=third) as inner:
        assert inner.workers == 3
    with (
        pytest.raises(
            EngineError, match=r"asked for 4 worker\(s\) of 1 CPU core and [\d.]+ GiB of memory each, .* has 6 "
        ),
        connect(None, workers=4, shape=third),
    ):
        pass


def test_workers_reserve_their_memory(cluster: Cluster) -> None:
    (node,) = (node["Resources"] for node in ray.nodes() if node["Alive"])
    half = WorkerShape(memory_bytes=int(node["memory"] / 2.2))
    with RayRunner(dataclasses.replace(cluster, workers=2, shape=half)) as pool:
        meet_all_workers(pool, 2)
        assert ray.available_resources().get("memory", 0.0) < node["memory"] / 2


def test_workers_that_cannot_be_placed_end_the_run(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "_START_SECONDS", 1.0)
    greedy = dataclasses.replace(cluster, shape=WorkerShape(gpus=3.0))
    with (
        RayRunner(greedy) as pool,
        pytest.raises(EngineError, match=r"no worker of 1 CPU core and 3 GPU could be placed"),
    ):
        run_shared(pool, add, 1, [1])


# --- the cluster ------------------------------------------------------------------------------------------------------


def test_connection_of_this_process_is_used_again(cluster: Cluster) -> None:
    with connect(None, workers=1) as inner:
        assert inner.workers == 1
    assert ray.is_initialized()


@pytest.mark.parametrize(
    ("workers", "shape", "message"),
    [
        (64, WorkerShape(), r"asked for 64 worker\(s\) of 1 CPU core each, .* has 6 CPU cores and 2 GPUs .* hold 6"),
        (2, WorkerShape(gpus=2.0), r"asked for 2 worker\(s\) of 1 CPU core and 2 GPU each, .* hold 1; ask for fewer"),
        (None, WorkerShape(threads=16), r"asked for at least 1 worker\(s\) of 16 CPU cores each"),
        (1, WorkerShape(memory_bytes=2**50), r"asked for 1 worker\(s\) of 1 CPU core and 1048576.0 GiB of memory each"),
    ],
)
def test_workers_that_never_fit_are_refused(
    cluster: Cluster, workers: int | None, shape: WorkerShape, message: str
) -> None:
    with pytest.raises(EngineError, match=message), connect(None, workers=workers, shape=shape):
        pass


def test_default_is_as_many_workers_as_fit(cluster: Cluster) -> None:
    with connect(None, shape=WorkerShape(gpus=1.0)) as inner:
        assert inner.workers == 2


@pytest.mark.parametrize("gpus", [-1.0, 1.5])
def test_gpu_share_out_of_range_is_refused(gpus: float) -> None:
    with pytest.raises(ConfigError, match="expected gpus_per_worker to be 0, a fraction up to 1, or a whole number"):
        WorkerShape(gpus=gpus)


def test_object_store_fits_into_free_memory() -> None:
    free, store = free_memory_bytes(), object_store_bytes()
    if free is None or store is None:
        pytest.skip("this system does not tell its free memory")
    assert 0 < store < free
