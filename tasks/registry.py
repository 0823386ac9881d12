"""MLflow's model registry: versions of pruned networks that load without this package, and who holds which alias.

A version carries everything that a consumer needs: the exported network, signature, input example, how to prepare
images, and a page that tells its story. Nothing in it is pickle.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from entprune.errors import CertificateError, ConfigError, EngineError
from tasks import tracking
from tasks.exported import ExportedNetwork
from tasks.tracked_values import texts

CHALLENGER, CHAMPION = "challenger", "champion"

_PROBED_BATCHES = (1, 2, 7)
_ROUND_TRIP_TOLERANCE = 1e-4
_MAX_DESCRIPTION = 4900  # characters; MLflow allows 5000


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredVersion:
    """What the registry says about a version.

    Attributes:
        name: of the registered model.
        version: its number.
        tags: lineage, figures and verdicts.
        description: its page, markdown.
    """

    name: str
    version: int
    tags: Mapping[str, str]
    description: str

    @property
    def uri(self) -> str:
        """Where it is loaded from."""
        return f"models:/{self.name}/{self.version}"


# --- in and out -------------------------------------------------------------------------------------------------------


def register(
    run_id: str,
    model: nn.Module,
    input_shape: tuple[int, int, int],
    name: str,
    *,
    tags: Mapping[str, Any],
    alias: str = CHALLENGER,
    card: Mapping[str, Any] | None = None,
    files: Sequence[Path] = (),
    description: str | None = None,
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
        files: further files that travel with the network, under `extra_files`.
        description: page of the version, markdown.

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
    with tracking.reported(f"register model '{name}'"), tracking.library_defaults():
        model_id = _store_model(run_id, frozen, input_shape, tags, card or {}, files)
        return _create_version(run_id, model_id, name, alias=alias, tags=tags, description=description)


def load_registered(uri: str) -> tuple[nn.Module, dict[str, Any]]:
    """Load a network from the registry, never running code from it.

    Args:
        uri: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.

    Returns:
        The network, in eval mode on the CPU, and its card; an empty one for a network of another origin.

    Raises:
        EngineError: there is no such version, it is stored as pickle, or no server answers.
    """
    require_database(f"load '{uri}'")
    with tracking.reported(f"load '{uri}'"), tracking.library_defaults():
        mlflow = tracking.library()
        graph = mlflow.pytorch.load_model(uri)
        card = mlflow.models.get_model_info(uri).metadata or {}
    return ExportedNetwork(graph), dict(card)


def ensure_name(name: str) -> None:
    """Make a registered model unless there is one of that name; not reported, callers do that."""
    exceptions = tracking.library().exceptions
    try:
        tracking.client().create_registered_model(name)
    except exceptions.MlflowException as cause:
        if cause.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def require_database(action: str) -> None:
    """Require that a registry that is a file is there: MLflow would make an empty one.

    Raises:
        EngineError: it is not.
    """
    database = tracking.database_file()
    if database is not None and not database.is_file():
        raise EngineError(
            f"cannot {action}: no MLflow database at '{database}'; go to the folder of the run that registered it, "
            "or set MLFLOW_TRACKING_URI."
        )


def _store_model(
    run_id: str,
    model: nn.Module,
    input_shape: tuple[int, int, int],
    tags: Mapping[str, Any],
    card: Mapping[str, Any],
    files: Sequence[Path],
) -> str:
    """Log the network in the run's own experiment and return its id; one that cannot be read back is deleted again.

    Left alone, `log_model` files the network of a run that is not the active one under the default experiment.
    """
    client = tracking.client()
    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, name="model", source_run_id=run_id, tags=texts(tags), params=dict(run.data.params)
    )
    try:
        _export(run_id, logged.model_id, model, input_shape, card, files)
        _check_round_trip(f"models:/{logged.model_id}", model, input_shape)
    except BaseException:
        client.delete_logged_model(logged.model_id)
        raise
    return str(logged.model_id)


def _export(
    run_id: str,
    model_id: str,
    model: nn.Module,
    input_shape: tuple[int, int, int],
    card: Mapping[str, Any],
    files: Sequence[Path],
) -> None:
    mlflow = tracking.library()
    example = np.zeros((2, *input_shape), dtype=np.float32)  # a batch of 1 would fix the batch size
    versions = {"torch": torch.__version__.split("+", 1)[0], "numpy": np.__version__, "mlflow": mlflow.__version__}
    try:
        mlflow.pytorch.log_model(
            model,
            name="model",
            model_id=model_id,
            run_id=run_id,
            serialization_format="pt2",
            input_example=example,
            signature=_signature(mlflow, model, example),
            pip_requirements=[f"{package}=={version}" for package, version in versions.items()],
            extra_files=[str(file) for file in files] or None,
            metadata=dict(card),
        )
    except tracking.failures():
        raise
    except Exception as cause:  # torch.export has many ways to say that it cannot follow a network
        raise EngineError(
            f"the smaller network cannot be exported for the registry ({tracking.first_line(cause)}); "
            "use the folder 'model' of the output, or run without registering."
        ) from cause


def _signature(mlflow: Any, model: nn.Module, example: np.ndarray) -> Any:
    """Images (n, C, H, W) in, whatever the network gives for them out; n stays free."""
    with torch.inference_mode():
        outputs = tuple(model(torch.from_numpy(example)).shape[1:])
    spec, schema, float32 = mlflow.types.TensorSpec, mlflow.types.Schema, np.dtype("float32")
    return mlflow.models.ModelSignature(
        inputs=schema([spec(float32, (-1, *example.shape[1:]))]), outputs=schema([spec(float32, (-1, *outputs))])
    )


def _check_round_trip(uri: str, model: nn.Module, input_shape: tuple[int, int, int]) -> None:
    stored = tracking.library().pytorch.load_model(uri)
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


def _create_version(
    run_id: str | None, model_id: str, name: str, *, alias: str, tags: Mapping[str, Any], description: str | None = None
) -> int:
    """Make a stored network the next version of a name, move the alias to it, and return its number."""
    client = tracking.client()
    ensure_name(name)
    page = None if description is None else description[:_MAX_DESCRIPTION]
    version = client.create_model_version(
        name, source=f"models:/{model_id}", run_id=run_id, model_id=model_id, tags=texts(tags), description=page
    )
    client.set_registered_model_alias(name, alias, version.version)
    versions = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": versions})  # the web page links to it
    return int(version.version)


# --- versions, aliases, notes -----------------------------------------------------------------------------------------


def find_version(name: str, which: str) -> RegisteredVersion:
    """Look a version up by its number or an alias.

    Raises:
        ConfigError: the name has none of that number or alias. EngineError: no server answers.
    """
    require_database(f"find version '{which}' of model '{name}'")
    client, exceptions = tracking.client(), tracking.library().exceptions
    with tracking.reported(f"find version '{which}' of model '{name}'"):
        try:
            is_number = re.fullmatch(r"\d+", which) is not None
            found = client.get_model_version(name, which) if is_number else _by_alias(name, which)
        except exceptions.MlflowException as cause:
            if cause.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
                raise
            raise ConfigError(
                f"model '{name}': expected a version number or an alias, found no version '{which}'; "
                "see the Models page of `mlflow ui` for what is registered."
            ) from cause
    return RegisteredVersion(
        name=name, version=int(found.version), tags=dict(found.tags), description=found.description or ""
    )


def find_alias(name: str, alias: str) -> RegisteredVersion | None:
    """The version that holds an alias, None if there is none."""
    try:
        return find_version(name, alias)
    except ConfigError:
        return None


def point_alias(name: str, alias: str, version: int) -> None:
    """Move an alias, and require that it is there afterwards.

    Raises:
        EngineError: another process moved it at the same time, or the server refuses.
    """
    with tracking.reported(f"move alias '{alias}' of model '{name}'"):
        tracking.client().set_registered_model_alias(name, alias, str(version))
        found = _by_alias(name, alias)
    if int(found.version) != version:
        raise EngineError(
            f"model '{name}': alias '{alias}' was moved to version {found.version} by someone else while version "
            f"{version} was promoted; run the command again."
        )


def annotate(version: RegisteredVersion, tags: Mapping[str, Any], description: str | None = None) -> None:
    """Write tags, and a new page if one is given, on a version."""
    with tracking.reported(f"describe version {version.version} of model '{version.name}'"):
        client = tracking.client()
        for tag, value in texts(tags).items():
            client.set_model_version_tag(version.name, str(version.version), tag, value)
        if description is not None:
            client.update_model_version(version.name, str(version.version), description[:_MAX_DESCRIPTION])


def read_note(name: str, note: str) -> str | None:
    """A tag of the registered model itself."""
    with tracking.reported(f"read model '{name}'"):
        return tracking.client().get_registered_model(name).tags.get(note)


def write_note(name: str, note: str, text: str) -> None:
    """Set a tag of the registered model itself."""
    with tracking.reported(f"describe model '{name}'"):
        tracking.client().set_registered_model_tag(name, note, text)


def _by_alias(name: str, alias: str) -> Any:
    return tracking.client().get_model_version_by_alias(name, alias)
