"""Promotion as a flow: measure the challenger again if asked to, judge, move the alias, leave the reasons behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging.configuration import ensure_logging_setup
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from entprune.errors import ConfigError, DataError
from entprune.evaluation import accuracy as measure_accuracy
from flows.parameters import RegistryName, describe_validation
from flows.sources import load_matching_data, load_network
from tasks import promotion, registry


class PromoteParameters(BaseModel):
    """What the `promote` flow is asked to do."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)

    name: RegistryName
    """Registered model."""
    version: str = registry.CHALLENGER
    """Number or alias of the challenger."""
    max_accuracy_drop: float | None = Field(default=None, ge=0.0, le=100.0)
    """Points that may be lost beside the dense network; by default the version's own budget, or one."""
    data: str | None = None
    """Data on whose test images the challenger is measured again; by default the recorded accuracy counts."""
    data_root: Path | None = None
    """Folder of the data."""
    device: str = "cpu"
    """Where it is measured: cpu or cuda."""

    @model_validator(mode="after")
    def _check_data(self) -> Self:
        if self.data_root is not None and self.data is None:
            raise ValueError("data_root: expected it together with data")
        return self


def parse_promotion(values: dict[str, Any]) -> PromoteParameters:
    """Check plain values, such as those of the command line.

    Raises:
        ConfigError: a value is missing, unknown or out of range; the sentence names its field.
    """
    try:
        return PromoteParameters.model_validate(values)
    except ValidationError as cause:
        raise ConfigError(describe_validation(cause)) from cause


@flow(name="promote-model", persist_result=False, validate_parameters=True)
def promote(parameters: PromoteParameters) -> dict[str, Any]:
    """Make a registered version the champion if the rule allows it.

    Args:
        parameters: which version, and what it may have lost.

    Returns:
        The verdict: `accepted`, `reason`, `version`, `champion` (before), `checks`. A refusal is a verdict, no failure.

    Raises:
        ConfigError: there is no such version. DataError: the data are not those that the dense network was measured on.
        EngineError: the registry does not do what was asked.
    """
    ensure_logging_setup()
    version = registry.find_version(parameters.name, parameters.version)
    accuracy = None if parameters.data is None else measure_again(version, parameters)
    verdict = decide(str(version.version), parameters, accuracy)
    write_artifact(f"promotion-{parameters.name}", describe_verdict(verdict))
    return verdict.to_dict()


@flow(name="roll-back-model", persist_result=False)
def rollback(name: RegistryName) -> dict[str, Any]:
    """Put the previous champion of a registered model back.

    Args:
        name: registered model.

    Returns:
        Numbers of the version that was champion (`from`) and of the one that is now (`to`).

    Raises:
        ConfigError: there is none. EngineError: the registry does not do what was asked.
    """
    ensure_logging_setup()
    before, after = promotion.rollback(name)
    write_artifact(
        f"promotion-{name}",
        f"# {name}: rolled back\n\nVersion {after} is champion again, in place of version {before}.\n",
    )
    return {"name": name, "from": before, "to": after}


@task(name="measure-again", cache_policy=NO_CACHE)
def measure_again(version: registry.RegisteredVersion, parameters: PromoteParameters) -> float:
    """Accuracy of the stored network on the test images, percent.

    Raises:
        DataError: the dense network was measured on other images.
    """
    assert parameters.data is not None  # noqa: S101 -- asked for by the caller
    network, card = load_network(version.uri)
    images = load_matching_data(parameters.data, parameters.data_root, None, None, card)
    recorded = version.tags.get("data_sha256")
    if recorded != images.sha256:
        raise DataError(
            f"data '{parameters.data}': expected the images that the dense network was measured on (SHA-256 "
            f"{str(recorded)[:12]}), got {images.sha256[:12]}; give the data of the pruning run, or none."
        )
    return measure_accuracy(network, images.test, device=parameters.device)


@task(name="decide", cache_policy=NO_CACHE)
def decide(version: str, parameters: PromoteParameters, accuracy: float | None) -> promotion.Verdict:
    """Judge, move the alias, write the reasons on the version."""
    return promotion.promote(
        parameters.name, version, max_accuracy_drop=parameters.max_accuracy_drop, accuracy=accuracy
    )


def describe_verdict(verdict: promotion.Verdict) -> str:
    """Markdown for the flow's page."""
    outcome = "is champion" if verdict.accepted else "was refused"
    before = "none" if verdict.champion is None else f"version {verdict.champion}"
    rows = [f"| {check.name} | {'yes' if check.passed else '**no**'} | {check.text} |" for check in verdict.checks]
    return "\n".join(
        [
            f"# {verdict.name}: version {verdict.version} {outcome}",
            "",
            f"Champion before: {before}. {verdict.reason.capitalize()}.",
            "",
            "| condition | holds | figures |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def write_artifact(key: str, markdown: str) -> None:
    """Keep a text on the page of the present flow run; keys are of lower-case letters, digits and dashes."""
    create_markdown_artifact(key=re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-"), markdown=markdown)
