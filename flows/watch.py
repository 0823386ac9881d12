"""Prune whenever a new version of a registered dense network appears: a flow that looks, for a schedule to call."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from prefect import flow
from prefect.logging.configuration import ensure_logging_setup
from pydantic import BaseModel, ConfigDict, Field, model_validator

from entprune.errors import EngineError, EntpruneError
from flows.parameters import PruneParameters, parse_parameters
from flows.promote import PromoteParameters, promote
from flows.prune_model import prune_model
from tasks import dense_registry
from tasks.registry import RegisteredVersion

_OWN = ("model", "checkpoint", "dense_version")  # fields of a pruning run that the version itself decides


class WatchParameters(BaseModel):
    """What the `watch` flow is asked to do.

    Attributes:
        name: registered model whose versions are dense networks, after the contract of :mod:`tasks.dense_registry`.
        prune: further fields of :class:`PruneParameters`: data, budget, output, register; each version gets a folder of
            its own below `output`.
        promote: whether the result is judged for champion at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = Field(min_length=1)
    prune: dict[str, Any]
    promote: bool = False

    @model_validator(mode="after")
    def _check_prune(self) -> Self:
        if given := sorted(set(self.prune) & set(_OWN)):
            raise ValueError(f"prune: expected no {', '.join(given)}, which the version itself decides")
        example = PruneParameters.model_validate({**self.prune, "model": "any", "checkpoint": "any"})
        if self.promote and example.register is None:
            raise ValueError("promote: expected prune.register, the name under which the result is registered")
        return self


@flow(name="watch-dense-model", persist_result=False, validate_parameters=True)
def watch(parameters: WatchParameters) -> dict[str, Any]:
    """Prune the newest dense version unless that was tried before.

    Returns:
        `dense_version`, None if nothing new was there; `registered_version` and, if asked for, the `verdict`.

    Raises:
        EntpruneError: the version cannot be pruned. It is marked so and not tried again, unless an engine was to blame.
    """
    ensure_logging_setup()
    version = dense_registry.newest_waiting(parameters.name)
    if version is None:
        return {"dense_version": None, "registered_version": None, "verdict": None}
    try:
        report = _prune_version(version, parameters)
    except EngineError:
        raise  # the next look tries again
    except EntpruneError as error:
        dense_registry.mark(version, f"failed: {error}")
        raise
    number, register = report["lineage"]["registered_version"], parameters.prune.get("register")
    dense_registry.mark(version, f"pruned: {f'models:/{register}/{number}' if number else 'not registered'}")
    verdict = promote(PromoteParameters(name=str(register), version=str(number))) if parameters.promote else None
    return {"dense_version": version.version, "registered_version": number, "verdict": verdict}


def _prune_version(version: RegisteredVersion, parameters: WatchParameters) -> dict[str, Any]:
    with TemporaryDirectory(prefix="entprune-") as folder:
        values = {
            **parameters.prune,
            "model": version.tags[dense_registry.MODEL_SPEC],
            "checkpoint": dense_registry.fetch_checkpoint(version, Path(folder)),
            "output": Path(parameters.prune["output"]) / f"{version.name}-{version.version}",
            "dense_version": version.uri,
        }
        report: dict[str, Any] = prune_model(parse_parameters(values))
        return report
