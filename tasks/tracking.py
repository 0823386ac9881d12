"""MLflow: a run for each pruning run, a child run for each hyperparameter setting, a registered version of the result.

The only module that imports mlflow, and only when a function needs it. Everything goes through a client and a run id:
no run is ever "active", so threads, tasks and actors cannot close each other's runs.

Axes: c channels of a group.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
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
import torch
from torch import Tensor, nn

from entprune.errors import CertificateError, EngineError
from entprune.path import SettingPath, SparsityPath
from tasks.exported import ExportedNetwork
from tasks.tracked_values import flatten, key, parts, text, texts

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

CHALLENGER = "challenger"

# Read by mlflow when it is imported, whichever function comes first: its own log lines are for its developers.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")

_METRICS_PER_REQUEST, _PARAMS_PER_REQUEST = 1000, 100  # MLflow's own limits
_MAX_POINTS = 200  # of one curve: more cannot be seen and only cost time
_DATABASE_PORTS = {"postgresql": 5432, "postgres": 5432, "mysql": 3306, "mssql": 1433}
_PROBE_SECONDS = 5
_PROBED_BATCHES = (1, 2, 7)
_ROUND_TRIP_TOLERANCE = 1e-4


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
    failures: tuple[type[Exception], ...] = (ImportError, ValueError, *_failures())  # no driver, no address
    try:
        with _environment(patience):
            _knock(uri)
            _client().search_experiments(max_results=1)
    except failures as cause:
        raise EngineError(
            f"no MLflow server answers at '{_without_password(uri)}' ({_root_cause(cause)}); start it, correct "
            "MLFLOW_TRACKING_URI, or unset it to keep the runs in mlflow.db here."
        ) from cause


def _database_file() -> Path | None:
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
    with _reported(f"open a run in experiment '{experiment}'"):
        return _create_run(_experiment_id(experiment), run_name, tags)


def log_settings(run_id: str, params: Mapping[str, Any]) -> None:
    """Record what the run was asked to do; nested mappings get dotted names, and None is left out."""
    from mlflow.entities import Param

    entries = [Param(key(name), text(value)) for name, value in flatten(params) if value is not None]
    with _reported("log parameters"):
        for part in parts(entries, _PARAMS_PER_REQUEST):
            _client().log_batch(run_id, params=part)


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
    with _reported("log the sparsity paths"):
        experiment_id = _client().get_run(run_id).info.experiment_id
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
    with _reported("store the artifacts"):
        _client().log_artifacts(run_id, str(directory))


def close_run(run_id: str, status: str = "FINISHED") -> None:
    """End a run.

    Args:
        run_id: of the run.
        status: "FINISHED", "FAILED" or "KILLED".
    """
    with _reported("close the run"):
        _client().set_terminated(run_id, status=status)


def _experiment_id(name: str) -> str:
    from mlflow.exceptions import MlflowException

    client = _client()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=_artifact_location()))
        except MlflowException:
            if (experiment := client.get_experiment_by_name(name)) is None:  # or another process was faster
                raise
    if experiment.lifecycle_stage != "active":
        raise EngineError(f"MLflow experiment '{name}' was deleted; restore it, or choose another name.")
    return str(experiment.experiment_id)


def _artifact_location() -> str | None:
    """`mlartifacts` beside a SQLite database; None where the server decides."""
    database = _database_file()
    return None if database is None else (database.parent / "mlartifacts").as_uri()


def _create_run(experiment_id: str, run_name: str, tags: Mapping[str, Any]) -> str:
    everywhere = {"mlflow.source.name": "entprune", "mlflow.source.type": "LOCAL"}
    return str(_client().create_run(experiment_id, run_name=run_name, tags=everywhere | texts(tags)).info.run_id)


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
    with _reported("log metrics"):
        for part in parts(metrics, _METRICS_PER_REQUEST):
            _client().log_batch(run_id, metrics=part)


def _metric(name: str, value: float, step: int) -> Metric:
    from mlflow.entities import Metric

    return Metric(key(name), float(value), int(time.time() * 1000), step)


# --- registry ---------------------------------------------------------------------------------------------------------


def register(
    run_id: str,
    model: nn.Module,
    input_shape: tuple[int, int, int],
    name: str,
    *,
    tags: Mapping[str, Any],
    alias: str = CHALLENGER,
    card: Mapping[str, Any] | None = None,
) -> int:
    """Store a network without pickle, read it back, and register it as the next version of a name.

    Args:
        run_id: run that the network came from.
        model: it is not changed.
        input_shape: (C, H, W) of one image.
        name: in the registry.
        tags: lineage of the version; `certificate_passed` must be true.
        alias: moved to the new version.
        card: plain values that a reader needs, such as mean and std.

    Returns:
        The number of the version.

    Raises:
        CertificateError: the certificate did not pass, or the stored network gives other outputs.
        EngineError: the network cannot be exported, or the server refuses.
    """
    if str(tags.get("certificate_passed")).lower() != "true":
        raise CertificateError(
            f"model '{name}' was not registered: expected a passed certificate, got "
            f"certificate_passed={tags.get('certificate_passed')!r}; see the report for the difference."
        )
    frozen = copy.deepcopy(model).cpu().eval()
    with _reported(f"register model '{name}'"), _library_defaults():
        model_id = _store_model(run_id, frozen, input_shape, tags, card or {})
        return _create_version(run_id, model_id, name, alias, tags)


def load_registered(uri: str) -> tuple[nn.Module, dict[str, Any]]:
    """Load a network from the registry, never running code from it.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Returns:
        The network, in eval mode on the CPU, and its card; an empty one for a network of another origin.

    Raises:
        EngineError: there is no such version, it is stored as pickle, or no server answers.
    """
    database = _database_file()
    if database is not None and not database.is_file():  # MLflow would make an empty one
        raise EngineError(
            f"cannot load '{uri}': no MLflow database at '{database}'; go to the folder of the run that registered it, "
            "or set MLFLOW_TRACKING_URI."
        )
    with _reported(f"load '{uri}'"), _library_defaults():
        import mlflow

        graph = mlflow.pytorch.load_model(uri)
        card = mlflow.models.get_model_info(uri).metadata or {}
    return ExportedNetwork(graph), dict(card)


def _store_model(
    run_id: str,
    model: nn.Module,
    input_shape: tuple[int, int, int],
    tags: Mapping[str, Any],
    card: Mapping[str, Any],
) -> str:
    """Log the network in the run's own experiment and return its id; one that cannot be read back is deleted again.

    Left alone, `log_model` files the network of a run that is not the active one under the default experiment.
    """
    client = _client()
    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, name="model", source_run_id=run_id, tags=texts(tags), params=dict(run.data.params)
    )
    try:
        _export(run_id, logged.model_id, model, input_shape, card)
        _check_round_trip(f"models:/{logged.model_id}", model, input_shape)
    except BaseException:
        client.delete_logged_model(logged.model_id)
        raise
    return str(logged.model_id)


def _export(
    run_id: str, model_id: str, model: nn.Module, input_shape: tuple[int, int, int], card: Mapping[str, Any]
) -> None:
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    example = np.zeros((2, *input_shape), dtype=np.float32)  # a batch of 1 would fix the batch size
    with torch.inference_mode():
        outputs = tuple(model(torch.from_numpy(example)).shape[1:])
    float32 = np.dtype("float32")
    signature = ModelSignature(
        inputs=Schema([TensorSpec(float32, (-1, *input_shape))]), outputs=Schema([TensorSpec(float32, (-1, *outputs))])
    )
    versions = {"torch": torch.__version__.split("+", 1)[0], "numpy": np.__version__, "mlflow": mlflow.__version__}
    try:
        mlflow.pytorch.log_model(
            model,
            name="model",
            model_id=model_id,
            run_id=run_id,
            serialization_format="pt2",
            input_example=example,
            signature=signature,
            pip_requirements=[f"{package}=={version}" for package, version in versions.items()],
            metadata=dict(card),
        )
    except _failures():
        raise
    except Exception as cause:  # torch.export has many ways to say that it cannot follow a network
        raise EngineError(
            f"the smaller network cannot be exported for the registry ({_first_line(cause)}); "
            "use the folder 'model' of the output, or run without registering."
        ) from cause


def _check_round_trip(uri: str, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
    import mlflow

    stored = mlflow.pytorch.load_model(uri)
    generator = torch.Generator().manual_seed(0)
    for size in _PROBED_BATCHES:
        images = torch.randn(size, *input_shape, generator=generator)
        with torch.inference_mode():
            expected, found = model(images), _call_exported(stored, images)
        difference = float((expected - found).abs().max())
        if not difference <= _ROUND_TRIP_TOLERANCE * max(1.0, float(expected.abs().max())):
            raise CertificateError(
                f"the stored network differs from the one in memory by {difference:g} on a batch of {size}; "
                "it was not registered: use the folder 'model' of the output."
            )


def _call_exported(stored: nn.Module, images: Tensor) -> Tensor:
    try:
        outputs: Tensor = stored(images)
    except (AssertionError, RuntimeError) as cause:  # a guard of the export: the batch size was taken for a constant
        raise EngineError(
            f"the smaller network was exported for one batch size only and refuses {len(images)}; "
            "let its forward pass not depend on the batch size, or run without registering."
        ) from cause
    return outputs


def _create_version(run_id: str, model_id: str, name: str, alias: str, tags: Mapping[str, Any]) -> int:
    from mlflow.exceptions import MlflowException

    client = _client()
    try:
        client.create_registered_model(name)
    except MlflowException as cause:
        if cause.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = client.create_model_version(
        name, source=f"models:/{model_id}", run_id=run_id, model_id=model_id, tags=texts(tags)
    )
    client.set_registered_model_alias(name, alias, version.version)
    versions = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": versions})  # the web page links to it
    return int(version.version)


# --- MLflow's manners -------------------------------------------------------------------------------------------------


def _client() -> MlflowClient:
    return _client_for(tracking_uri())


@cache
def _client_for(uri: str) -> MlflowClient:
    return _import_quietly().MlflowClient(tracking_uri=uri)


@cache
def _import_quietly() -> Any:
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
def _library_defaults() -> Iterator[None]:
    """Point the functions that take no client at the same server, forbid pickle, and keep warnings from the user."""
    mlflow = _import_quietly()
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
def _reported(action: str) -> Iterator[None]:
    """Turn what clients, databases and sockets raise into one sentence."""
    try:
        yield
    except _failures() as cause:
        raise EngineError(
            f"MLflow at '{_without_password(tracking_uri())}' could not {action} ({_first_line(cause)}); "
            "check MLFLOW_TRACKING_URI and that the server runs."
        ) from cause


def _failures() -> tuple[type[Exception], ...]:
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/]*@", "//", uri)


def _root_cause(error: BaseException) -> str:
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 200 else f"{text[:197]}..."
