"""Prune whenever a new version of a registered dense network appears: a flow that looks, for a schedule to call."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from prefect import flow
from prefect.logging.configuration import ensure_logging_setup
from pydantic import BaseModel, ConfigDict, model_validator

from entprune.errors import ConfigError, EngineError, EntpruneError
from entprune.models.specs import is_code_spec
from flows.environment import store_location
from flows.parameters import PruneRequest, RegistryName, parse_parameters
from flows.places import inside
from flows.promote import PromoteParameters, promote
from flows.prune_model import prune_model
from tasks import dense_registry
from tasks.registry import RegisteredVersion
from tasks.remote import local_path


class WatchParameters(BaseModel):
    """What the `watch` flow is asked to do."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    name: RegistryName
    """Registered model whose versions are dense networks: a tag entprune.model_spec and a file model.safetensors."""
    prune: PruneRequest
    """What each new version is pruned to; it gets a folder of its own below `output`."""
    factories: tuple[str, ...] = ()
    """Network specifications of your own code, package.module:factory, that a version may name. Others' are refused:
    whoever can write to the registry would choose what this program runs."""
    promote: bool = False
    """Whether the result is judged for champion at once."""

    @model_validator(mode="after")
    def _check_promote(self) -> Self:
        if self.promote and self.prune.register is None:
            raise ValueError("promote: expected prune.register, the name under which the result is registered")
        return self


@flow(name="watch-dense-model", persist_result=False, validate_parameters=True)
def watch(parameters: WatchParameters) -> dict[str, Any]:
    """Prune the newest dense version unless that was tried before.

    Args:
        parameters: which model is watched, and what becomes of its versions.

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
    number, register = report["lineage"]["registered_version"], parameters.prune.register
    dense_registry.mark(version, f"pruned: {f'models:/{register}/{number}' if number else 'not registered'}")
    verdict = promote(PromoteParameters(name=str(register), version=str(number))) if parameters.promote else None
    return {"dense_version": version.version, "registered_version": number, "verdict": verdict}


def _prune_version(version: RegisteredVersion, parameters: WatchParameters) -> dict[str, Any]:
    asked = parameters.prune
    model = version.tags[dense_registry.MODEL_SPEC]
    if is_code_spec(model) and model not in parameters.factories:
        raise ConfigError(
            f"'{version.uri}': expected a built-in network, torchvision's, or one of the factories that the watch "
            f"allows, got '{model}', which was not run; add it to `factories` if it is yours."
        )
    output = inside(asked.output, f"{version.name}-{version.version}")
    cache = local_path(store_location(asked.cache_dir))
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="dense-", dir=cache) as folder:
        values = asked.model_dump(exclude_unset=True) | {
            "model": model,
            "checkpoint": dense_registry.fetch_checkpoint(version, Path(folder)),
            "output": output,
            "dense_version": version.uri,
        }
        report: dict[str, Any] = prune_model(parse_parameters(values))
        return report
