"""Servers are killed at seeded moments: the run finishes, and what MLflow missed is recorded later, once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.recording import record_again
from tasks.record import MARK, Record
from tests.faults.engines import Engines
from tests.faults.ground import Baseline, Ground, Row
from tests.faults.in_process import disturbed, killed_while_telling
from tests.faults.processes import Server, mlflow_server, prefect_server

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = mlflow_server(tmp_path / "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.health.removesuffix("/health"))
    yield server
    server.kill()


def assert_recorded_once(folder: Path, name: str) -> None:
    """Everything of the run in that folder is in MLflow, and telling it again changes nothing."""
    told, _record = record_again(folder)
    assert told > 0
    assert record_again(folder)[0] == 0
    client = MlflowClient()
    (parent, *children) = [entry for entry in Record.read(folder).entries if entry["kind"] == "run"]
    experiment = client.get_experiment_by_name("entprune")
    for entry in (parent, *children):
        (run,) = client.search_runs([experiment.experiment_id], f"tags.`{MARK}` = '{entry['run']}'")
        assert run.info.status == "FINISHED"
        assert run.data.params
        assert run.data.metrics
    names = {artifact.path for artifact in client.list_artifacts(parent["run_id"])}
    assert {"report.json", "report.html", "plan.json", "paths", "model"} <= names
    (version,) = client.search_model_versions(f"name = '{name}'")
    assert version.run_id == parent["run_id"]


def test_run_without_mlflow_is_recorded_later(
    engines: Engines, ground: Ground, baseline: Baseline, tracker: Server, table: list[Row]
) -> None:
    """Killed at a seeded unit, and down at the start."""
    tracker.start()
    parameters = ground.parameters("mlflow", register="killed-at-a-unit")
    kills = {random.Random(2).randrange(2, baseline.units): partial(killed, tracker, "MLflow server")}
    rows, events = disturbed(parameters, baseline, kills, at_stake=0)
    table += rows
    check_mlflow(rows, events.lines, parameters.output)

    down = ground.parameters("mlflow", register="down-at-the-start", output=ground.folder / "mlflow" / "down")
    rows, events = disturbed(down, baseline, {}, at_stake=0, down="MLflow server")
    table += rows
    check_mlflow(rows, events.lines, down.output)

    tracker.start()
    assert_recorded_once(parameters.output, "killed-at-a-unit")
    assert_recorded_once(down.output, "down-at-the-start")


def killed(server: Server, name: str) -> str:
    server.kill()
    return f"{name}, SIGKILL"


@pytest.mark.slow
def test_each_entry_may_be_the_last_that_mlflow_hears(
    engines: Engines, ground: Ground, baseline: Baseline, tracker: Server, table: list[Row]
) -> None:
    generator = random.Random(4)
    for entry in sorted(generator.sample(range(24), 8)):
        tracker.start()
        name = f"entry-{entry}"
        parameters = ground.parameters("mlflow entries", register=name, output=ground.folder / "entries" / name)
        rows, events = killed_while_telling(parameters, baseline, tracker.kill, entry)
        table += rows
        check_mlflow(rows, events.lines, parameters.output)
        tracker.start()
        assert_recorded_once(parameters.output, name)
        tracker.kill()


def check_mlflow(rows: list[Row], lines: list[str], output: Path) -> None:
    assert all(row.same_plan and row.redone == 0 for row in rows), rows
    assert len([line for line in lines if f"entprune log {output}" in line]) == 1, lines
    assert len(lines) == 1, lines


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (None, 1, 2, 3))]


@pytest.mark.parametrize("seed", SEEDS)
def test_run_goes_on_without_prefects_server(
    engines: Engines, ground: Ground, baseline: Baseline, tmp_path: Path, table: list[Row], seed: int | None
) -> None:
    """Down at the start (None), or killed at a seeded unit."""
    server = prefect_server(tmp_path / "prefect")
    kills: dict[int, Any] = {}
    if seed is not None:
        server.start()
        kills = {random.Random(seed).randrange(2, baseline.units): partial(killed, server, "Prefect server")}
    parameters = ground.parameters(f"prefect {seed}")
    try:
        address = server.health.removesuffix("/health")
        with temporary_settings({PREFECT_API_URL: address, PREFECT_CLIENT_MAX_RETRIES: 1}):
            down = "" if kills else "Prefect server"
            rows, events = disturbed(parameters, baseline, kills, at_stake=0, down=down)
    finally:
        server.kill()
    table += rows
    assert all(row.same_plan and row.redone == 0 for row in rows), rows
    (sentence,) = events.lines
    assert "Prefect's server" in sentence
