"""The sweep: one description in; the front of what its settings reach, a table, a plot and the chosen network out."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.logging.configuration import ensure_logging_setup

from entprune.path import SparsityPath
from entprune.pruning import build_smaller
from entprune.race import Entrant, Finish
from entprune.report.sweep_page import render_sweep
from entprune.storage import atomic_write_text, staging_directory
from flows.environment import store_location
from flows.flow_names import named_by
from flows.prune_model import finish, lineage_of, publish
from flows.rounds import Pruned
from flows.run_page import show_sweep, shown_progress
from flows.server import finished
from flows.sweep_content import Entry, choose, describe_setting, describe_sweep
from flows.sweep_inputs import SWEEP_NAME, preflight_sweep
from flows.sweep_parameters import SweepParameters, SweepSetting
from flows.tracked import run_name, tracked_run
from flows.workers import lone_worker_threads, memory_need, start_workers, worker_config
from tasks import sweeping
from tasks.actors import accept_read_only_arrays
from tasks.progress import StageClock
from tasks.record import Record, TrackedRun
from tasks.store import open_store
from tasks.workload import Engine, Workload


def _name(parameters: SweepParameters) -> str:
    return f"sweep of {run_name(parameters.settings()[0].parameters)}"


@flow(name="sweep", flow_run_name=named_by(SweepParameters, _name), persist_result=False, validate_parameters=True)
def sweep(parameters: SweepParameters) -> dict[str, Any]:
    """Search over hyperparameters; write, log and register what came out.

    Args:
        parameters: what all settings have in common, what they differ by, and how one is chosen.

    Returns:
        The content of sweep.json.

    Raises:
        EntpruneError: an input is unusable, the engine cannot do what was asked, or the certificate failed. Nothing is
            left in the output folder then; what was computed is found again by the next attempt.
    """
    ensure_logging_setup()  # MLflow brings its own, and Prefect drops its console if it comes second
    clock, settings = StageClock(), parameters.settings()
    lead = settings[0].parameters
    wishes = [(worker_config(setting.parameters), setting.parameters.budget()) for setting in settings]
    works = sweeping.load(partial(preflight_sweep, parameters), wishes, clock)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        accept_read_only_arrays()
        with clock.stage("start"):
            need = memory_need((work, setting.parameters) for work, setting in zip(works, settings, strict=True))
            cluster, runner = stack.enter_context(start_workers(lead, need))
            runner.progress = clock.advance
            asked = {"base": parameters.base, "swept": list(parameters.swept()), "settings": len(settings)}
            record, lineage = Record(parameters.output), lineage_of(works[0], lead)
            parent = tracked_run(record, lead.experiment, _name(parameters), lineage, asked)
            run = stack.enter_context(parent)
        store = stack.enter_context(open_store(store_location(lead.cache_dir)))
        engine = Engine(runner, store, clock, finetune_threads=lone_worker_threads(cluster))
        name = _name(parameters)
        with shown_progress(name):
            content = _Sweep(parameters, settings, works, engine, run).run(cluster.workers)
    finished(content)
    show_sweep(name, content, parameters.output, run.address)
    return content


class _Sweep:
    """What the stages of one sweep have in common. No dataclass: Prefect walks through those in search of futures."""

    def __init__(
        self,
        parameters: SweepParameters,
        settings: Sequence[SweepSetting],
        works: list[Workload],
        engine: Engine,
        tracked: TrackedRun,
    ) -> None:
        self.parameters, self.settings, self.works = parameters, settings, works
        self.engine, self.tracked = engine, tracked

    def run(self, workers: int) -> dict[str, Any]:
        """Everything between the inputs and the files."""
        works, engine = self.works, self.engine
        known = sweeping.recall_paths(works, engine.store)
        calibrations = sweeping.calibrate_all(works, engine, known)
        paths, counts = sweeping.solve(works, engine, calibrations, known)
        for work in works:
            calibrations[sweeping.calibration_key(work)].drop_moments(work.network)
        entrants, finishes = sweeping.search(works, engine, calibrations, paths, stop_early=self.parameters.early_stop)
        latencies = sweeping.measure_latencies(works, engine, [entry.chosen.plan for entry in finishes])
        entries = [
            Entry(setting=setting, work=work, finish=ended, latency_ms=latency)
            for setting, work, ended, latency in zip(self.settings, works, finishes, latencies, strict=True)
        ]
        solve = {
            "pairs_asked": counts.asked,
            "pairs_distinct": counts.distinct,
            "pairs_solved": counts.solved,
            "calibrations": counts.calibrations,
            "workers": workers,
        }
        return self._publish(entries, entrants, finishes, paths, solve)

    def _publish(
        self,
        entries: Sequence[Entry],
        entrants: Sequence[Entrant],
        finishes: Sequence[Finish],
        paths: Sequence[dict[str, SparsityPath]],
        solve: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Choose, assemble, certify, write, log and register; the folder appears when all of it succeeded."""
        parameters, engine = self.parameters, self.engine
        chosen = choose(entries, parameters.max_accuracy_drop(), parameters.choose.smallest)
        number = chosen.number
        self.tracked.record.try_to_catch_up()
        runs = {entry.setting.number: self._log_child(entry) for entry in entries if entry.setting.number != number}
        found = sweeping.assemble_chosen(entrants[number], finishes[number], engine)
        with staging_directory(parameters.output, marker=SWEEP_NAME) as folder:
            with self._child_run(entries[number]) as child:
                asked = entries[number].setting.parameters.model_copy(update={"output": folder / "chosen"})
                accuracy = sweeping.dense_accuracy(entrants[number])
                work = entries[number].work
                model = build_smaller(work.network, found)
                pruned = Pruned(paths=paths[number], found=found, validation_accuracy=accuracy, model=model)
                outcome = finish(asked, work, engine, pruned)
                report = publish(asked, work, outcome, child, engine, place="chosen")
            runs[number] = child.id
            content = describe_sweep(entries, chosen, report, runs) | {
                "swept": list(parameters.swept()),
                "early_stop": parameters.early_stop,
                "solve": dict(solve),
                "timings_seconds": engine.clock.timings(),
                "lineage": {**lineage_of(work, asked), "mlflow_run_id": self.tracked.id},
            }
            self._write(content, folder)
        self.tracked.record.settle()
        return content

    def _write(self, content: Mapping[str, Any], folder: Path) -> None:
        """Files for people and programs, and the parent's figures."""
        files = {
            "sweep.html": render_sweep(content),
            SWEEP_NAME: json.dumps(content, indent=1, allow_nan=False) + "\n",
        }
        for name, text in files.items():
            atomic_write_text(folder / name, text)
        self.tracked.artifacts(folder, names=list(files))  # the chosen network is with its own run
        figures = content["chosen"]["fine_tuned"] or content["chosen"]["one_shot"]
        self.tracked.numbers(
            {"chosen": {"number": content["chosen"]["number"], **figures}, "seconds": content["timings_seconds"]}
        )
        self.tracked.record.write(folder)

    def _child_run(self, entry: Entry) -> AbstractContextManager[TrackedRun]:
        setting, work = entry.setting, entry.work
        asked = {**setting.values, "config": work.config.to_dict(), "budget": work.budget.to_dict()}
        tags = {"status": entry.status, **lineage_of(work, setting.parameters)}
        name = f"{setting.number}: {setting.label()}"
        return tracked_run(self.tracked, setting.parameters.experiment, name, tags, asked)

    def _log_child(self, entry: Entry) -> str:
        """Figures of a setting that was not chosen; returns its run."""
        with self._child_run(entry) as child:
            child.numbers(describe_setting(entry)["result"])
        return child.id
