"""Tracked runs that end as the work in them does."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from entprune.errors import EngineError
from flows.parameters import PruneParameters
from tasks import tracking

_logger = logging.getLogger(__name__)


def run_name(parameters: PruneParameters) -> str:
    """Network and data in a few words."""
    return f"{parameters.model} on {Path(parameters.data).name if ':' in parameters.data else parameters.data}"


@contextmanager
def tracked_run(experiment: str, name: str, tags: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """Lend the id of an MLflow run that ends as this block does.

    Args:
        experiment: made if it is new.
        name: of the run.
        tags: lineage, say, or `mlflow.parentRunId`.
        asked: settings of the run.
    """
    run_id = tracking.open_run(experiment, name, tags)
    try:
        tracking.log_settings(run_id, asked)
        yield run_id
    except BaseException as error:
        with suppress(EngineError):
            tracking.close_run(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    try:
        tracking.close_run(run_id, "FINISHED")
    except EngineError as error:  # everything is written, logged and registered by now
        _logger.warning("%s", error)
