"""MLflow: a run for each pruning run, a child run for each hyperparameter setting, and the way to the server.

The only module that imports mlflow, and only when a function needs it. Everything goes through a client and a run id:
no run is ever "active", so threads, tasks and actors cannot close each other's runs.

Axes: c channels of a group.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from entprune.errors import EngineError
from entprune.path import SettingPath, SparsityPath
from tasks.redaction import clean_cause, redact
from tasks.tracked_values import flatten, key, parts, text, texts

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

# Read by mlflow when it is imported, whichever function comes first: its own log lines are for its developers.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")

_METRICS_PER_REQUEST, _PARAMS_PER_REQUEST = 1000, 100  # MLflow's own limits
_MAX_POINTS = 200  # of one curve: more cannot be seen and only cost time
_DATABASE_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}
_PROBE_SECONDS = 5


# --- server -----------------------------------------------------------------------------------------------------------


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, or else the database `mlflow.db` of the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def check() -> None:
    """Require that the tracking server answers; a database of this machine's own is made on first use.

    Raises:
        EngineError: it does not answer within seconds, or the address is none.
    """
    uri = tracking_uri()
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_PROBE_SECONDS)}
    mendable: tuple[type[Exception], ...] = (ImportError, ValueError, *failures())  # no driver, no address
    try:
        with _environment(patience):
            _knock(uri)
            client().search_experiments(max_results=1)
    except mendable as cause:
        raise EngineError(
            f"no MLflow server answers at '{redact(uri)}' ({redact(_root_cause(cause))}); start it, correct "
            "MLFLOW_TRACKING_URI, or unset it to keep the runs in mlflow.db here."
        ) from clean_cause(cause)


def database_file() -> Path | None:
    """The SQLite database that is used, None for a server's."""
    scheme, _, path = tracking_uri().partition(":///")
    return Path(path).absolute() if scheme.startswith("sqlite") and path else None


def _knock(uri: str) -> None:
    """Open and close a connection to a database server, whose own drivers wait for minutes."""
    parts = urlsplit(uri)
    port = parts.port or _DATABASE_PORTS.get(parts.scheme.split("+", 1)[0])
    if parts.hostname and port and not parts.scheme.startswith("http"):
        socket.create_connection((parts.hostname, port), timeout=_PROBE_SECONDS).close()


# --- runs -------------------------------------------------------------------------------------------------------------


def open_run(experiment: str, run_name: str, tags: Mapping[str, Any]) -> str:
    """Start a run and return its id; the experiment is made if it is new.

    Raises:
        EngineError: the server refuses, or the experiment was deleted.
    """
    with reported(f"open a run in experiment '{experiment}'"):
        return _create_run(_experiment_id(experiment), run_name, tags)


def log_settings(run_id: str, params: Mapping[str, Any]) -> None:
    """Record what the run was asked to do; nested mappings get dotted names, and None is left out."""
    from mlflow.entities import Param

    entries = [Param(key(name), text(value)) for name, value in flatten(params) if value is not None]
    with reported("log parameters"):
        for part in parts(entries, _PARAMS_PER_REQUEST):
            client().log_batch(run_id, params=part)


def log_stage(run_id: str, metrics: Mapping[str, Any], step: int | None = None) -> None:
    """Record numbers; nested mappings get dotted names, and what is not a number is left out."""
    numbers = [(name, value) for name, value in flatten(metrics) if isinstance(value, (bool, int, float))]
    _log_metrics(run_id, [_metric(name, value, step or 0) for name, value in numbers])


def log_paths(run_id: str, paths: Mapping[str, SparsityPath]) -> list[str]:
    """Record the sparsity paths: a child run for each hyperparameter setting, its error curve of each group by width.

    Args:
        run_id: of the parent.
        paths: of each group; all were solved for the same settings.

    Returns:
        Ids of the child runs, in the order of the settings.
    """
    with reported("log the sparsity paths"):
        experiment_id = client().get_run(run_id).info.experiment_id
        settings = [entry.setting for entry in next(iter(paths.values())).settings] if paths else []
        children = []
        for number, setting in enumerate(settings):
            child = _create_run(experiment_id, setting.label(), {"mlflow.parentRunId": run_id})
            log_settings(child, setting.to_dict())
            log_stage(child, _summarise_setting(paths, number))
            for path in paths.values():
                _log_metrics(child, _error_curve(path.settings[number], path))
            close_run(child)
            children.append(child)
    return children


def log_groups(run_id: str, report: Mapping[str, Any]) -> None:
    """Record what became of each group; the step is the group's number in execution order."""
    metrics: list[Metric] = []
    for number, group in enumerate(report["groups"]):
        numbers = {name: group[name] for name in ("reconstruction_error", "entropy", "effective_channels")}
        numbers["kept_fraction"] = group["kept"] / group["channels"]
        metrics += [_metric(f"group.{name}", value, number) for name, value in numbers.items() if value is not None]
    _log_metrics(run_id, metrics)


def log_artifacts(run_id: str, directory: Path) -> None:
    """Store a folder with everything in it."""
    with reported("store the artifacts"):
        client().log_artifacts(run_id, str(directory))


def close_run(run_id: str, status: str = "FINISHED") -> None:
    """End a run.

    Args:
        run_id: of the run.
        status: "FINISHED", "FAILED" or "KILLED".
    """
    with reported("close the run"):
        client().set_terminated(run_id, status=status)


def _experiment_id(name: str) -> str:
    from mlflow.exceptions import MlflowException

    server = client()
    experiment = server.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(server.create_experiment(name, artifact_location=_artifact_location()))
        except MlflowException:
            if (experiment := server.get_experiment_by_name(name)) is None:  # or another process was faster
                raise
    if experiment.lifecycle_stage != "active":
        raise EngineError(f"MLflow experiment '{name}' was deleted; restore it, or choose another name.")
    return str(experiment.experiment_id)


def _artifact_location() -> str | None:
    """`mlartifacts` beside a SQLite database; None where the server decides."""
    database = database_file()
    return None if database is None else (database.parent / "mlartifacts").as_uri()


def _create_run(experiment_id: str, run_name: str, tags: Mapping[str, Any]) -> str:
    everywhere = {"mlflow.source.name": "entprune", "mlflow.source.type": "LOCAL"}
    return str(client().create_run(experiment_id, run_name=run_name, tags=everywhere | texts(tags)).info.run_id)


def _summarise_setting(paths: Mapping[str, SparsityPath], number: int) -> dict[str, float]:
    """Numbers by which settings are compared: smaller errors and more widths won are better."""
    mean_errors = [float((path.settings[number].errors / path.num_consumers).mean()) for path in paths.values()]
    won = sum(int((path.choice == number).sum()) for path in paths.values())
    return {
        "mean_error": float(np.mean(mean_errors)),
        "worst_group_mean_error": max(mean_errors),
        "widths_won_fraction": won / sum(len(path.choice) for path in paths.values()),
        "levels": float(np.mean([len(path.settings[number].snapshots) for path in paths.values()])),
        "complete_groups": sum(path.settings[number].status == "complete" for path in paths.values()),
    }


def _error_curve(setting_path: SettingPath, path: SparsityPath) -> list[Metric]:
    """Error per consumer at widths 0..c, thinned out to what a plot can show; the step is the width."""
    widths = np.unique(np.linspace(0, path.num_channels, _MAX_POINTS).round().astype(int))
    errors = setting_path.errors / path.num_consumers
    return [_metric(f"reconstruction_error.{path.group}", errors[width], int(width)) for width in widths]


def _log_metrics(run_id: str, metrics: Sequence[Metric]) -> None:
    with reported("log metrics"):
        for part in parts(metrics, _METRICS_PER_REQUEST):
            client().log_batch(run_id, metrics=part)


def _metric(name: str, value: float, step: int) -> Metric:
    from mlflow.entities import Metric

    return Metric(key(name), float(value), int(time.time() * 1000), step)


# --- MLflow's manners -------------------------------------------------------------------------------------------------


def client() -> MlflowClient:
    """A client of the server that is used."""
    return _client_for(tracking_uri())


@cache
def _client_for(uri: str) -> MlflowClient:
    return library().MlflowClient(tracking_uri=uri)


@cache
def library() -> Any:
    """Import mlflow without what it does to a program: a handler on the root logger, banners, notes on migrations."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    import mlflow
    import mlflow.pytorch  # calls logging.basicConfig

    root.handlers[:] = handlers
    root.setLevel(level)
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    return mlflow


@contextmanager
def library_defaults() -> Iterator[None]:
    """Point the functions that take no client at the same server, forbid pickle, and keep warnings from the user."""
    mlflow = library()
    with _environment({"MLFLOW_TRACKING_URI": tracking_uri(), "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}):
        mlflow.set_tracking_uri(tracking_uri())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            mlflow.set_tracking_uri(None)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def reported(action: str) -> Iterator[None]:
    """Turn what clients, databases and sockets raise into one sentence."""
    try:
        yield
    except failures() as cause:
        raise EngineError(
            f"MLflow at '{redact(tracking_uri())}' could not {action} ({redact(first_line(cause))}); "
            "check MLFLOW_TRACKING_URI and that the server runs."
        ) from clean_cause(cause)


def failures() -> tuple[type[Exception], ...]:
    """What clients, databases and sockets raise."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def _root_cause(error: BaseException) -> str:
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return first_line(error)


def first_line(error: BaseException) -> str:
    """First line of an error's text, shortened."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 200 else f"{text[:197]}..."
