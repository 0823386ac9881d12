"""The stages of a pruning run as Prefect tasks: each makes one call into the library, or recalls a result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import nn

from entprune.artifact import ModelCard, save_model
from entprune.assembly import RefitData
from entprune.calibration import LayerStatistics, Statistics, num_bytes
from entprune.candidates import CandidateJob, CandidateScore, answers_only
from entprune.certificate import Certificate
from entprune.config import Budget, PruneConfig
from entprune.errors import CertificateError
from entprune.evaluation import Measurement, Precision, measurement_of
from entprune.latency import measure_kept_latency
from entprune.path import SettingPath, SparsityPath
from entprune.plan import PruningPlan
from entprune.predictions import dense_reference, is_correct, predict
from entprune.pruning import certify_result
from entprune.report import write_report
from entprune.rounds import RoundRecord, judge_round
from entprune.runner import torch_threads
from entprune.search import SearchResult
from entprune.search import search as search_budget
from entprune.selection import DenseReference, StopRule
from entprune.stages import ImageSet, Part, SolveKey, sampling_plan
from entprune.stages import calibrate as calibrate_network
from entprune.stages import solve as solve_groups
from entprune.storage import (
    load_setting_path,
    load_statistics,
    read_bundle,
    save_setting_path,
    save_statistics,
    write_bundle,
)
from tasks import registry
from tasks.consumer_files import write_consumer_files
from tasks.progress import StageClock
from tasks.record import Entry, TrackedRun
from tasks.store import Store
from tasks.workload import Calibration, Engine, Inputs, Workload, stage_task

LATENCY_REPEATS = 5


# --- load, calibrate, solve -------------------------------------------------------------------------------------------


@stage_task("load")
def load(read: Callable[[], Inputs], config: PruneConfig, budget: Budget, clock: StageClock) -> Workload:
    """Read and check the inputs, and lay out which images serve what."""
    with clock.stage("load"):
        return Workload(read(), config, budget)


def recall_paths(work: Workload, store: Store) -> dict[SolveKey, SettingPath]:
    """Continuations that earlier runs finished on the same inputs."""
    found: dict[SolveKey, SettingPath] = {}
    for group in work.network.groups.groups:
        for setting in work.config.settings:
            path = store.fetch("paths", work.keys.path(group, setting), load_setting_path)
            if path is not None:
                found[group.name, setting] = path
    return found


@stage_task("calibrate")
def calibrate(work: Workload, engine: Engine, *, needs_moments: bool) -> Calibration:
    """Statistics of every layer; the moments, which are large, only where something is left to solve."""
    store, consumers = engine.store, work.network.consumers()
    answers_key, moments_key = work.keys.answers(work.network.refit_layers), work.keys.moments(consumers)
    with engine.clock.stage("calibrate"):
        answers = store.fetch("answers", answers_key, load_statistics)
        if answers is not None and not needs_moments:
            return Calibration(answers)
        moments = None if answers is None else store.fetch("moments", moments_key, load_statistics)
        if answers is not None and moments is not None:
            return Calibration({name: _joined(entry, moments.get(name)) for name, entry in answers.items()})
        statistics = _calibrate_shards(work, engine, (moments_key, answers_key))
        return Calibration(statistics)


def _calibrate_shards(work: Workload, engine: Engine, keys: tuple[str, str]) -> dict[str, LayerStatistics]:
    """Statistics of all images; those of each shard are stored until the sum is."""
    store, network, asked = engine.store, work.network, []

    def key(part: Part) -> str:
        return work.keys.shard(network.refit_layers, network.consumers(), part)

    def recall(part: Part) -> Statistics | None:
        asked.append(part)
        return store.fetch("shards", key(part), load_statistics)

    def keep(part: Part, statistics: Statistics) -> None:
        if store.has_room(work.config.calibration_shards * num_bytes(statistics)):
            store.keep("shards", key(part), partial(save_statistics, statistics))

    statistics = calibrate_network(network, work.calibration, work.config, engine.runner, known=recall, on_result=keep)
    store.keep("moments", keys[0], partial(save_statistics, _moments_only(statistics)))
    store.keep("answers", keys[1], partial(save_statistics, answers_only(statistics, network)))
    for part in asked:
        store.discard("shards", key(part))  # after the sum: one thread writes in this order
    return statistics


def _moments_only(statistics: Statistics) -> dict[str, LayerStatistics]:
    return {
        name: dataclasses.replace(entry, outputs=entry.outputs[:0])
        for name, entry in statistics.items()
        if entry.moments is not None
    }


def _joined(answers: LayerStatistics, moments: LayerStatistics | None) -> LayerStatistics:
    return answers if moments is None else dataclasses.replace(answers, moments=moments.moments)


@stage_task("solve")
def solve(
    work: Workload, engine: Engine, calibration: Calibration, known: dict[SolveKey, SettingPath]
) -> dict[str, SparsityPath]:
    """Sparsity paths of all groups; each continuation is stored, and known from then on, as soon as it is there."""
    num_stored = len(known)

    def keep(key: SolveKey, path: SettingPath) -> None:
        known[key] = path
        group, setting = work.network.groups.named(key[0]), key[1]
        engine.store.keep("paths", work.keys.path(group, setting), partial(save_setting_path, path))

    with engine.clock.stage("solve"):
        paths = solve_groups(
            work.network, calibration.statistics, work.config, engine.runner, known=known, on_result=keep
        )
        engine.clock.summarise(f"{len(paths)} groups, {num_stored} continuations from the store")
        return paths


# --- search -----------------------------------------------------------------------------------------------------------


@stage_task("search")
def search(
    work: Workload,
    engine: Engine,
    calibration: Calibration,
    paths: Mapping[str, SparsityPath],
    *,
    origin: Workload | None = None,
) -> tuple[SearchResult, float]:
    """The smallest network within the budget, and the dense network's accuracy on the validation images.

    Args:
        work: what is pruned.
        engine: runs it.
        calibration, paths: of this network.
        origin: in a later round, the workload of the original dense network that accuracy and floors refer to.
    """
    with engine.clock.stage("search"):
        reference = reference_of(origin or work, engine)
        job = candidate_job(work, calibration.statistics, reference)
        found = search_budget(
            paths,
            work.network.cost,
            job,
            work.budget,
            work.config,
            engine.runner,
            known=lambda plan: recall_score(job, engine.store, work.keys.candidate(plan)),
            on_score=lambda plan, score: keep_score(engine.store, work.keys.candidate(plan), score),
            kept_latency=partial(kept_latency, work, engine),
            dense_widths=(origin or work).network.full_widths(),
        )
        engine.clock.summarise(f"{len(found.candidates)} networks tried")
        return found, reference.accuracy()


def reference_of(work: Workload, engine: Engine) -> DenseReference:
    """The dense network's answers on the validation images."""
    logits = validation_logits(work, engine, work.network.model, step="validate dense")
    return dense_reference(logits, work.validation, work.config)


def validation_logits(work: Workload, engine: Engine, model: nn.Module, *, step: str) -> np.ndarray:
    """(n, k) logits of a network on the validation images, in the precision in which all are compared there."""
    key, precision = work.keys.validation, work.config.precision
    return logits_of(work, engine, model, work.validation, key, step=step, precision=precision)


def kept_latency(work: Workload, engine: Engine, plan: PruningPlan) -> float:
    """Fraction of the dense network's latency that a plan keeps.

    It is measured once on each machine, so that a resumed run goes on with the plans that it began with.
    """
    batch_size = work.budget.latency_batch

    def compute() -> np.ndarray:
        engine.runner.settle()
        return np.array([measure_kept_latency(work.network, plan, batch_size, work.config.threads)])

    stored = engine.store.remember(
        "latencies",
        work.keys.latency(plan, batch_size),
        compute,
        load=lambda path: read_bundle(path)[0]["kept"],
        save=lambda kept, path: write_bundle(path, {"kept": kept}, {"kind": "latency"}),
    )
    return float(stored[0])


def candidate_job(work: Workload, statistics: Statistics, reference: DenseReference) -> CandidateJob:
    """What candidate units of a workload read."""
    images, config = work.calibration, work.config
    return CandidateJob(
        network=work.network,
        data=RefitData(
            split=images.split,
            indices=images.indices,
            statistics=answers_only(statistics, work.network),
            sampling=sampling_plan(config, len(images)),
            residuals=work.network.residuals,
        ),
        refit=config.refit(),
        validation=work.validation,
        reference=reference,
        stop=StopRule(max_drop=work.budget.max_accuracy_drop, quantile=config.quantile),
        device=config.device,
        precision=config.precision,
    )


def keep_score(store: Store, key: str, score: CandidateScore) -> None:
    """Store an assembled network and its predictions."""
    arrays = {"predicted": score.predicted, **{f"state.{name}": value for name, value in score.state.items()}}
    store.keep("candidates", key, lambda path: write_bundle(path, arrays, {"kind": "candidate"}))


def recall_score(job: CandidateJob, store: Store, key: str) -> CandidateScore | None:
    """A stored network with as many predictions as the present stop rule asks for; None if there are too few."""
    bundle = store.fetch("candidates", key, read_bundle)
    if bundle is None or job.reference is None:
        return None
    predicted = bundle[0].pop("predicted")
    state = {name.removeprefix("state."): value for name, value in bundle[0].items()}
    total = len(job.reference)
    for stop in (*range(job.stop.chunk, total, job.stop.chunk), total):
        if stop > len(predicted):
            return None
        if stop == total or job.stop.is_decided(job.reference.drops(predicted[:stop])):
            return CandidateScore(state=state, predicted=predicted[:stop])
    return None


def logits_of(
    work: Workload,
    engine: Engine,
    model: nn.Module,
    images: ImageSet,
    images_key: str,
    *,
    step: str,
    precision: Precision = "float32",
) -> np.ndarray:
    """(n, k) logits of a network on some images."""
    store, key, parts = engine.store, work.keys.logits(model, images_key, precision), set[Part]()
    predicted = partial(predict, model, images, work.config, engine.runner, stage=step, precision=precision)

    def load_logits(path: Path) -> np.ndarray:
        return read_bundle(path)[0]["logits"]

    def save_logits(logits: np.ndarray, path: Path) -> None:
        write_bundle(path, {"logits": logits}, {"kind": "logits"})

    def recall(part: Part) -> np.ndarray | None:
        parts.add(part)
        return store.fetch("ranges", work.keys.logits_range(key, part), load_logits)

    def keep(part: Part, logits: np.ndarray) -> None:
        store.keep("ranges", work.keys.logits_range(key, part), partial(save_logits, logits))

    logits = store.remember(
        "logits",
        key,
        lambda: predicted(known=recall, on_result=keep),
        load=load_logits,
        save=save_logits,
    )
    for part in parts:
        store.discard("ranges", work.keys.logits_range(key, part))  # after the whole: one thread writes in this order
    return logits


# --- certify, measure -------------------------------------------------------------------------------------------------


@stage_task("certify")
def certify(work: Workload, engine: Engine, smaller: nn.Module, plan: PruningPlan) -> Certificate:
    """Prove that the smaller network equals the masked full-size one.

    Raises:
        CertificateError: it does not.
    """
    with engine.clock.stage("certify"):
        certificate = certify_result(work.network, smaller, plan, work.calibration, work.config)
        if not certificate.passed:
            raise CertificateError(
                "the smaller network differs from the masked full-size one by "
                f"{certificate.max_abs_difference:g}, expected at most {certificate.tolerance:g}; "
                "nothing was written or registered: please report the network."
            )
        return certificate


@stage_task("validate")
def validate(
    work: Workload,
    engine: Engine,
    tuned: nn.Module,
    plan: PruningPlan,
    *,
    number: int,
    num_rounds: int,
    networks_tried: int,
) -> RoundRecord:
    """Measure what a round came to against the original dense network, whose workload this is."""
    with engine.clock.stage("validate"):
        compared = None
        if not work.tunes_on_validation(num_rounds):
            logits = validation_logits(work, engine, tuned, step=f"validate round {number}")
            compared = logits, reference_of(work, engine)
        asks_latency = work.budget.latency_removed is not None
        record = judge_round(
            number, plan,
            compared=compared, network=work.network, budget=work.budget, config=work.config,
            latency_kept=kept_latency(work, engine, plan) if asks_latency else None, networks_tried=networks_tried,
        )  # fmt: skip
        drop = "" if record.accuracy_drop is None else f", drop {record.accuracy_drop:.2f}"
        engine.clock.summarise(f"round {number}: {record.parameters:,} parameters{drop}")
        return record


@stage_task("measure")
def measure(work: Workload, engine: Engine, models: Mapping[str, nn.Module]) -> dict[str, Measurement]:
    """Figures of each network; the only stage that reads the test split."""
    with engine.clock.stage("measure"):
        engine.runner.settle()
        return {name: _measure_one(work, engine, model, name) for name, model in models.items()}


def _measure_one(work: Workload, engine: Engine, model: nn.Module, name: str) -> Measurement:
    correct = is_correct(logits_of(work, engine, model, work.test, work.keys.test, step=f"measure {name}"), work.test)
    with torch_threads(work.config.threads):
        return measurement_of(model, correct, work.network.input_shape, repeats=LATENCY_REPEATS)


# --- report, track, register ------------------------------------------------------------------------------------------


@stage_task("save")
def save(model: nn.Module, plan: PruningPlan, card: ModelCard, directory: Path, *, extra: Mapping[str, Any]) -> None:
    """Write the portable artifact."""
    save_model(model, plan, card, directory, extra=extra)


@stage_task("report")
def report(content: Mapping[str, Any], paths: Mapping[str, SparsityPath], directory: Path) -> None:
    """Write the evidence."""
    write_report(content, paths, directory)


@stage_task("track")
def track(run: TrackedRun, content: Mapping[str, Any], paths: Mapping[str, SparsityPath]) -> None:
    """Log the figures of a run, of its candidates, its groups and its hyperparameter settings."""
    figures = {name: content[name] for name in ("dense", "one_shot", "fine_tuned") if content[name] is not None}
    others = {"certificate": content["certificate"], "seconds": content["timings_seconds"]}
    run.numbers({**figures, **others})
    for number, candidate in enumerate(content["candidates"], start=1):
        run.numbers({"candidate": {k: v for k, v in candidate.items() if k != "widths"}}, step=number)
    for entry in content.get("rounds", ()):
        figures = {name: value for name, value in entry.items() if name not in {"widths", "ranks", "budgets_missed"}}
        run.numbers({"round": figures}, step=entry["round"])
    run.groups(content)
    run.paths(paths)


@stage_task("register")
def register(
    run: TrackedRun,
    model: nn.Module,
    card: ModelCard,
    name: str,
    *,
    tags: Mapping[str, Any],
    description: str,
    place: str = ".",
) -> int | None:
    """Register a version of the network with everything that its users need; returns its number, None if it waits."""
    return run.register(name, tags, description, partial(register_network, model, card), place=place)


def register_network(model: nn.Module, card: ModelCard, run_id: str, entry: Entry) -> int:
    """Register what an entry of a record describes."""
    shape, known = card.input_shape, card.to_dict()
    with TemporaryDirectory(prefix="entprune-") as folder:
        files = write_consumer_files(model, shape, known, Path(folder))
        return registry.register(
            run_id, model, shape, entry["name"],
            tags=entry["tags"], card=known, files=files, description=entry["description"],
        )  # fmt: skip
