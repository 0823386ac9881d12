"""One Ray cluster, one Prefect server and one undisturbed run for all fault tests; they end with the last of these."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from tests.faults.engines import Engines
from tests.faults.ground import WORKERS, Baseline, Ground, Row, lay_ground, write_table
from tests.faults.in_process import undisturbed
from tests.faults.processes import Server, prefect_server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", metavar="FILE", help="JSON file for what came of each kill point")


@pytest.fixture(scope="package")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return lay_ground(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="package")
def prefect_address(ground: Ground) -> Iterator[str]:
    server: Server = prefect_server(ground.folder / "prefect")
    server.start()
    yield server.health.removesuffix("/health")
    server.kill()


@pytest.fixture(scope="package")
def engines(ground: Ground) -> Iterator[Engines]:
    started = Engines(WORKERS)
    yield started
    started.close()


@pytest.fixture(autouse=True)
def in_local_files(ground: Ground, prefect_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's records beside the results, and the shared Prefect server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{ground.folder / 'mlflow.db'}")
    with temporary_settings({PREFECT_API_URL: prefect_address}):
        yield


@pytest.fixture(scope="package")
def baseline(ground: Ground, engines: Engines, prefect_address: str) -> Baseline:
    with pytest.MonkeyPatch.context() as patch, temporary_settings({PREFECT_API_URL: prefect_address}):
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{ground.folder / 'mlflow.db'}")
        return undisturbed(ground.parameters("undisturbed"))


@pytest.fixture(scope="package")
def table(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """Rows of all kill points; written where `--fault-table` says."""
    rows: list[Row] = []
    begin = time.monotonic()
    yield rows
    path = request.config.getoption("--fault-table", default=None)
    if path is not None:
        write_table(Path(path), rows, time.monotonic() - begin)
