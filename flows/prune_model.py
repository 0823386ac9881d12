"""The pruning run: a checkpoint, data and a budget in; a smaller network, its evidence and a registered version out."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from prefect import flow
from prefect.logging.configuration import ensure_logging_setup
from prefect.runtime import flow_run
from torch import nn

from entprune.certificate import Certificate
from entprune.errors import EngineError
from entprune.evaluation import Measurement
from entprune.finetune import FinetuneConfig
from entprune.path import SparsityPath
from entprune.pruning import RunFacts, build_report, build_smaller
from entprune.search import SearchResult
from entprune.storage import staging_directory
from flows.environment import cache_folder, code_version
from flows.parameters import PruneParameters
from flows.preflight import REPORT_NAME, preflight
from flows.version_page import data_name, version_page, version_tags
from flows.workers import lone_worker_threads, start_workers, worker_config
from tasks import stages, tracking
from tasks.actors import accept_read_only_arrays
from tasks.progress import StageClock
from tasks.stages import Engine, Workload
from tasks.store import Store

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outcome:
    """What the stages of one run found.

    Attributes:
        paths: sparsity path of each group.
        found: what the search tried and chose.
        validation_accuracy: of the dense network, percent.
        certificate: of the network that is handed out.
        models: "dense", "one_shot" and, if asked for, "fine_tuned".
        measured: their figures on the test split.
    """

    paths: Mapping[str, SparsityPath]
    found: SearchResult
    validation_accuracy: float
    certificate: Certificate
    models: Mapping[str, nn.Module]
    measured: Mapping[str, Measurement]

    @property
    def result(self) -> nn.Module:
        """The network that is handed out."""
        return self.models.get("fine_tuned", self.models["one_shot"])


@flow(name="prune-model", persist_result=False, validate_parameters=True)
def prune_model(parameters: PruneParameters) -> dict[str, Any]:
    """Prune a network; write, log and register the result.

    Returns:
        The content of report.json.

    Raises:
        EntpruneError: an input is unusable, the engine cannot do what was asked, or the certificate failed. Nothing is
            left in the output folder then, and the MLflow run is marked as failed.
    """
    ensure_logging_setup()  # MLflow brings its own, and Prefect drops its console if it comes second
    clock = StageClock()
    work = stages.load(partial(preflight, parameters), worker_config(parameters), parameters.budget(), clock)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        accept_read_only_arrays()
        with clock.stage("start"):
            cluster, runner = stack.enter_context(start_workers(parameters))
            runner.progress = clock.advance
            run_id = stack.enter_context(_tracked_run(parameters, work))
        store = stack.enter_context(Store(cache_folder(parameters.cache_dir) / "store"))
        engine = Engine(runner, store, clock, finetune_threads=lone_worker_threads(cluster))
        outcome = _run_stages(parameters, work, engine)
        return _publish(parameters, work, outcome, run_id, clock)


def _run_stages(parameters: PruneParameters, work: Workload, engine: Engine) -> Outcome:
    """Everything between the inputs and the files."""
    known = stages.recall_paths(work, engine.store)
    is_solved = len(known) == len(work.network.groups.groups) * len(work.config.settings)
    calibration = stages.calibrate(work, engine, needs_moments=not is_solved)
    paths = stages.solve(work, engine, calibration, known)
    calibration.drop_moments(work.network)
    found, validation_accuracy = stages.search(work, engine, calibration, paths)
    models: dict[str, nn.Module] = {"dense": work.network.model, "one_shot": build_smaller(work.network, found)}
    certificate = stages.certify(work, engine, models["one_shot"], found.chosen.plan)
    if parameters.finetune_epochs:
        finetuning = FinetuneConfig(epochs=parameters.finetune_epochs, seed=parameters.seed, device=work.config.device)
        models["fine_tuned"] = stages.finetune(work, engine, models["one_shot"], finetuning)
        certificate = stages.certify(work, engine, models["fine_tuned"], found.chosen.plan)
    return Outcome(
        paths=paths,
        found=found,
        validation_accuracy=validation_accuracy,
        certificate=certificate,
        models=models,
        measured=stages.measure(work, engine, models),
    )


# --- what comes out ---------------------------------------------------------------------------------------------------


def _publish(
    parameters: PruneParameters, work: Workload, outcome: Outcome, run_id: str, clock: StageClock
) -> dict[str, Any]:
    """Write the output folder, log and register; the folder appears when all of it succeeded."""
    plan, card = outcome.found.chosen.plan, work.card(parameters.model)
    lineage = _lineage(parameters, work) | {"mlflow_run_id": run_id, "registered_version": None}
    content = _report(parameters, work, outcome, lineage, clock)
    with staging_directory(parameters.output, marker=REPORT_NAME) as folder, clock.stage("publish"):
        stages.save(outcome.result, plan, card, folder / "model", extra={"lineage": lineage})
        stages.track(run_id, content, outcome.paths)
        if parameters.register is not None:
            version = stages.register(
                run_id,
                outcome.result,
                work,
                parameters.register,
                card=card,
                tags=version_tags(content),
                description=version_page(content, parameters.register),
            )
            content["lineage"]["registered_version"] = version
        stages.report(content, outcome.paths, folder)
        tracking.log_artifacts(run_id, folder)
        written: dict[str, Any] = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    return written


def _report(
    parameters: PruneParameters, work: Workload, outcome: Outcome, lineage: Mapping[str, Any], clock: StageClock
) -> dict[str, Any]:
    data = work.data
    return build_report(
        RunFacts(
            network=work.network,
            paths=outcome.paths,
            found=outcome.found,
            certificate=outcome.certificate,
            budget=work.budget,
            config=work.config,
        ),
        dense=outcome.measured["dense"],
        one_shot=outcome.measured["one_shot"],
        fine_tuned=outcome.measured.get("fine_tuned"),
        model={"spec": parameters.model, "input_shape": list(data.input_shape), "num_classes": data.num_classes},
        data={
            "spec": parameters.data,
            "sha256": data.sha256,
            "mean": list(data.mean),
            "std": list(data.std),
            "calibration_samples": len(work.calibration),
            "validation_samples": len(work.validation),
            "test_samples": len(work.test),
        },
        validation_accuracy=outcome.validation_accuracy,
        timings=clock.timings(),
        lineage=lineage,
    )


def _lineage(parameters: PruneParameters, work: Workload) -> dict[str, Any]:
    return {
        "dense_version": parameters.dense_version,
        "checkpoint_sha256": work.checkpoint_sha256,
        "data_sha256": work.data.sha256,
        "code_version": code_version(),
        "prefect_flow_run_id": str(flow_run.id) if flow_run.id else None,
    }


@contextmanager
def _tracked_run(parameters: PruneParameters, work: Workload) -> Iterator[str]:
    """An MLflow run that ends as this block does."""
    name = f"{parameters.model} on {data_name(parameters.data)}"
    run_id = tracking.open_run(parameters.experiment, name, _lineage(parameters, work))
    try:
        asked = parameters.model_dump(mode="json", exclude={"overrides"})
        tracking.log_settings(run_id, asked | {"config": work.config.to_dict()})
        yield run_id
    except BaseException as error:
        with suppress(EngineError):
            tracking.close_run(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    try:
        tracking.close_run(run_id, "FINISHED")
    except EngineError as error:  # everything is written, logged and registered by now
        _logger.warning("%s", error)
