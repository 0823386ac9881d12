"""The pruning run: a checkpoint, data and a budget in; a smaller network, its evidence and a registered version out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prefect import flow
from prefect.logging.configuration import ensure_logging_setup
from prefect.runtime import flow_run
from torch import nn

from entprune.certificate import Certificate
from entprune.evaluation import Measurement
from entprune.finetune import FinetuneConfig
from entprune.plan import PruningPlan
from entprune.pruning import RunFacts, build_report
from entprune.storage import staging_directory
from flows.environment import code_version, store_location
from flows.flow_names import named_by
from flows.parameters import PruneParameters
from flows.preflight import REPORT_NAME, preflight
from flows.rounds import Pruned, Rounds, prune_in_rounds, prune_once
from flows.run_page import result_sentences, show_result, shown_progress
from flows.server import finished
from flows.tracked import run_name, tracked_run
from flows.version_page import version_page, version_tags
from flows.workers import lone_worker_threads, memory_need, start_workers, worker_config
from tasks import stages
from tasks.actors import accept_read_only_arrays
from tasks.progress import StageClock
from tasks.record import Record, TrackedRun
from tasks.store import open_store
from tasks.tuning import finetune
from tasks.workload import Engine, Workload


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outcome:
    """What the stages of one run found.

    Attributes:
        pruned: the (first) pruning of the dense network.
        plan: of the network that is handed out, against the dense one.
        certificate: of that network.
        models: "dense", "one_shot" and, if asked for, "fine_tuned".
        measured: their figures on the test split.
        rounds: of a run that prunes and tunes in turns.
    """

    pruned: Pruned
    plan: PruningPlan
    certificate: Certificate
    models: Mapping[str, nn.Module]
    measured: Mapping[str, Measurement]
    rounds: Rounds | None = None

    @property
    def result(self) -> nn.Module:
        """The network that is handed out."""
        return self.models.get("fine_tuned", self.models["one_shot"])


@flow(
    name="prune-model",
    flow_run_name=named_by(PruneParameters, run_name),
    persist_result=False,
    validate_parameters=True,
)
def prune_model(parameters: PruneParameters) -> dict[str, Any]:
    """Prune a network; write, log and register the result.

    Args:
        parameters: the network, the data, the budget, and where the result goes.

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
            cluster, runner = stack.enter_context(start_workers(parameters, memory_need([(work, parameters)])))
            runner.progress = clock.advance
            run = stack.enter_context(_tracked(parameters, work))
        store = stack.enter_context(open_store(store_location(parameters.cache_dir)))
        engine = Engine(runner, store, clock, finetune_threads=lone_worker_threads(cluster))
        with shown_progress(run_name(parameters)):
            outcome = _run_stages(parameters, work, engine)
        content = publish(parameters, work, outcome, run, engine)
    finished(content)
    show_result(run_name(parameters), content, parameters.output, run.address)
    return content


def _run_stages(parameters: PruneParameters, work: Workload, engine: Engine) -> Outcome:
    """Everything between the inputs and the files."""
    finetuning = _finetuning(parameters, work)
    if finetuning is not None and parameters.rounds > 1:
        return _run_rounds(work, engine, finetuning, parameters.rounds)
    return finish(parameters, work, engine, prune_once(work, engine))


def _finetuning(parameters: PruneParameters, work: Workload) -> FinetuneConfig | None:
    asked = parameters.finetuning()
    return None if asked is None else replace(asked, device=work.config.device)


def finish(parameters: PruneParameters, work: Workload, engine: Engine, pruned: Pruned) -> Outcome:
    """Everything after the choice: certify, fine-tune where asked, measure on the test split.

    Raises:
        CertificateError: the smaller network differs from the masked full-size one.
    """
    finetuning, plan = _finetuning(parameters, work), pruned.found.chosen.plan
    models: dict[str, nn.Module] = {"dense": work.network.model, "one_shot": pruned.model}
    certificate = stages.certify(work, engine, pruned.model, plan)
    if finetuning is not None:
        models["fine_tuned"] = finetune(work, engine, pruned.model, finetuning)
        certificate = stages.certify(work, engine, models["fine_tuned"], plan)
    return Outcome(
        pruned=pruned,
        plan=plan,
        certificate=certificate,
        models=models,
        measured=stages.measure(work, engine, models),
    )


def _run_rounds(work: Workload, engine: Engine, finetuning: FinetuneConfig, num_rounds: int) -> Outcome:
    """The same with pruning and tuning in turns."""
    rounds = prune_in_rounds(work, engine, finetuning, num_rounds)
    models = {"dense": work.network.model, "one_shot": rounds.first.model, "fine_tuned": rounds.tuned}
    return Outcome(
        pruned=rounds.first,
        plan=rounds.plan,
        certificate=stages.certify(work, engine, rounds.tuned, rounds.plan),
        models=models,
        measured=stages.measure(work, engine, models),
        rounds=rounds,
    )


# --- what comes out ---------------------------------------------------------------------------------------------------


def publish(
    parameters: PruneParameters, work: Workload, outcome: Outcome, run: TrackedRun, engine: Engine, place: str = "."
) -> dict[str, Any]:
    """Write the output folder, log and register; the folder appears when all of it succeeded.

    What MLflow does not hear waits in the folder's record.

    Args:
        parameters, work, outcome, clock: of the run.
        run: in MLflow.
        place: of the folder in the one that has the record.
    """
    run.record.try_to_catch_up()
    plan, card = outcome.plan, work.card(parameters.model)
    lineage = lineage_of(work, parameters) | {"mlflow_run_id": run.id, "registered_version": None}
    clock = engine.clock
    content = _report(parameters, work, outcome, lineage, clock) | {"engine": engine.runner.describe()}
    with staging_directory(parameters.output, marker=REPORT_NAME) as folder, clock.stage("publish"):
        stages.save(outcome.result, plan, card, folder / "model", extra={"lineage": lineage})
        stages.track(run, content, outcome.pruned.paths)
        run.describe("\n\n".join([*result_sentences(content), "Read `report.html` under Artifacts."]))
        if parameters.register is not None:
            tags, page = version_tags(content), version_page(content, parameters.register)
            version = stages.register(
                run, outcome.result, card, parameters.register, tags=tags, description=page, place=place
            )
            content["lineage"]["registered_version"] = version
        stages.report(content, outcome.pruned.paths, folder)
        run.artifacts(folder, place=place)
        written: dict[str, Any] = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
        if place == ".":
            run.record.write(folder)
    if place == ".":
        run.record.settle()
    return written


def _report(
    parameters: PruneParameters, work: Workload, outcome: Outcome, lineage: Mapping[str, Any], clock: StageClock
) -> dict[str, Any]:
    data = work.data
    return build_report(
        RunFacts(
            network=work.network,
            paths=outcome.pruned.paths,
            found=outcome.pruned.found,
            certificate=outcome.certificate,
            budget=work.budget,
            config=work.config,
            plan=outcome.plan,
            rounds=() if outcome.rounds is None else outcome.rounds.records,
            chosen_round=None if outcome.rounds is None else outcome.rounds.chosen,
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
            "validation_split": work.validation_split,
            "test_samples": len(work.test),
        },
        validation_accuracy=outcome.pruned.validation_accuracy,
        timings=clock.timings(),
        lineage=lineage,
    )


def lineage_of(work: Workload, parameters: PruneParameters) -> dict[str, Any]:
    """What a run's result was made from."""
    return {
        "dense_version": parameters.dense_version,
        "checkpoint_sha256": work.checkpoint_sha256,
        "data_sha256": work.data.sha256,
        "code_version": code_version(),
        "prefect_flow_run_id": str(flow_run.id) if flow_run.id else None,
    }


def _tracked(parameters: PruneParameters, work: Workload) -> AbstractContextManager[TrackedRun]:
    asked = parameters.model_dump(mode="json", exclude={"overrides"}) | {"config": work.config.to_dict()}
    record, lineage = Record(parameters.output), lineage_of(work, parameters)
    return tracked_run(record, parameters.experiment, run_name(parameters), lineage, asked)
