"""MLflow: the way to the server, and what a run can tell it.

The only module that imports mlflow, and only when a function needs it. Everything goes through a client and a run id:
no run is ever "active", so threads, tasks and actors cannot close each other's runs.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from entprune.errors import EngineError
from tasks.redaction import clean_cause, redact
from tasks.tracked_values import key, parts, texts

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Read by mlflow when it is imported, whichever function comes first: its own log lines are for its developers.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")

_METRICS_PER_REQUEST, _PARAMS_PER_REQUEST = 1000, 100  # MLflow's own limits
_NOT_STORED = ("tracking.json", ".")
_DATABASE_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}
_PROBE_SECONDS = 5
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1"}  # by default minutes


class TrackingError(EngineError):
    """The tracking server does not answer, or does not do what it is asked: a matter of time, not of the input."""


# --- server -----------------------------------------------------------------------------------------------------------


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, or else the database `mlflow.db` of the current folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"


def check() -> None:
    """Require that the tracking server answers; a database of this machine's own is made on first use.

    Raises:
        TrackingError: it does not answer within seconds. EngineError: the address is none.
    """
    uri = tracking_uri()
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_PROBE_SECONDS)}
    mendable: tuple[type[Exception], ...] = (ImportError, ValueError, *failures())  # no driver, no address
    try:
        with _environment(patience):
            _knock(uri)
            client().search_experiments(max_results=1)
    except mendable as cause:
        is_address = isinstance(cause, (ImportError, ValueError)) or _code(cause) == "INVALID_PARAMETER_VALUE"
        kind = EngineError if is_address else TrackingError
        raise kind(
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


def log_params(run_id: str, params: Mapping[str, str]) -> None:
    """Record what the run was asked to do, under flat names."""
    from mlflow.entities import Param

    entries = [Param(name, value) for name, value in params.items()]
    with reported("log parameters"):
        for part in parts(entries, _PARAMS_PER_REQUEST):
            client().log_batch(run_id, params=part)


def log_numbers(run_id: str, numbers: Sequence[tuple[str, float, int]], milliseconds: int) -> None:
    """Record metrics (name, value, step) of one moment, in milliseconds since 1970."""
    from mlflow.entities import Metric

    metrics = [Metric(key(name), value, milliseconds, step) for name, value, step in numbers]
    with reported("log metrics"):
        for part in parts(metrics, _METRICS_PER_REQUEST):
            client().log_batch(run_id, metrics=part)


def log_files(run_id: str, directory: Path, names: Sequence[str] | None = None) -> None:
    """Store files and folders of a directory, by default all but those of :mod:`tasks.record`."""
    with reported("store the artifacts"):
        for path in sorted(Path(directory).iterdir()):
            if path.name not in names if names is not None else path.name.startswith(_NOT_STORED):
                continue
            if path.is_dir():
                client().log_artifacts(run_id, str(path), path.name)
            else:
                client().log_artifact(run_id, str(path))


def find_marked_run(experiment: str, tag: str, value: str) -> str | None:
    """Id of the run with a tag, None if there is none."""
    with reported("look for the run"):
        found = client().search_runs([_experiment_id(experiment)], f"tags.`{tag}` = '{value}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def close_abandoned(experiment: str, tag: str, value: str) -> None:
    """Mark runs with a tag that are still open, and their children, as killed."""
    with reported("close abandoned runs"):
        where, is_open = [_experiment_id(experiment)], "attributes.status = 'RUNNING'"
        for run in client().search_runs(where, f"tags.`{tag}` = '{value}' and {is_open}"):
            query = f"tags.`mlflow.parentRunId` = '{run.info.run_id}' and {is_open}"
            for left in (*client().search_runs(where, query), run):
                client().set_terminated(left.info.run_id, status="KILLED")


def find_marked_version(name: str, tag: str, value: str) -> int | None:
    """Number of the version with a tag, None if there is none."""
    with reported(f"look for versions of model '{name}'"):
        found = client().search_model_versions(f"name = '{name}'")
    return next((int(version.version) for version in found if version.tags.get(tag) == value), None)


def describe_run(run_id: str, markdown: str) -> None:
    """Say on the run's page what it came to."""
    with reported("describe the run"):
        client().set_tag(run_id, "mlflow.note.content", markdown)


def run_address(run_id: str) -> str | None:
    """Where the run's page is in the web; None where runs are kept in a database, or the server does not tell."""
    uri = tracking_uri()
    if not uri.startswith(("http://", "https://")):
        return None
    try:
        experiment_id = client().get_run(run_id).info.experiment_id
    except failures():
        return None
    parts = urlsplit(uri)
    public = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # without a password
    return f"{public.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


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
    """Turn what clients, databases and sockets raise into one sentence, without the minutes that clients wait."""
    patience = {name: value for name, value in _PATIENCE.items() if name not in os.environ}
    try:
        with _environment(patience):
            yield
    except failures() as cause:
        raise TrackingError(
            f"MLflow at '{redact(tracking_uri())}' could not {action} ({redact(first_line(cause))}); "
            "check MLFLOW_TRACKING_URI and that the server runs."
        ) from clean_cause(cause)


def failures() -> tuple[type[Exception], ...]:
    """What clients, databases and sockets raise."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def _code(error: BaseException) -> str | None:
    return getattr(error, "error_code", None)


def _root_cause(error: BaseException) -> str:
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return first_line(error)


def first_line(error: BaseException) -> str:
    """First line of an error's text, shortened."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 200 else f"{text[:197]}..."
