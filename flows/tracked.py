"""Tracked runs that end as the work in them does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.parameters import PruneParameters
from tasks.record import Record, TrackedRun


def run_name(parameters: PruneParameters) -> str:
    """Network and data in a few words."""
    return f"{parameters.model} on {Path(parameters.data).name if ':' in parameters.data else parameters.data}"


@contextmanager
def tracked_run(
    opener: Record | TrackedRun, experiment: str, name: str, tags: Mapping[str, Any], asked: Mapping[str, Any]
) -> Iterator[TrackedRun]:
    """Lend an MLflow run that ends as this block does, or will, where the server does not answer.

    Args:
        opener: record of the output folder, or the run that this one belongs to.
        experiment: made if it is new; that of the other run.
        name: of the run.
        tags: lineage, say.
        asked: settings of the run.
    """
    run = opener.open_child(name, tags) if isinstance(opener, TrackedRun) else opener.open_run(experiment, name, tags)
    run.settings(asked)
    try:
        yield run
    except BaseException as error:
        run.close("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    run.close()
