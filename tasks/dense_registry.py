"""Dense networks in the registry, from which pruned ones are made.

The contract: a version of a registered model is a dense network if its tag `entprune.model_spec` says how it is built
and its files hold `model.safetensors`, a plain state dict. Whoever trains networks can register such versions; this
package needs nothing else of theirs. What became of a version is written on it under `entprune.state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from entprune.checkpoints import save_state, sha256_file
from entprune.errors import CheckpointError, ConfigError
from tasks import tracking
from tasks.registry import RegisteredVersion, annotate, ensure_name, require_database
from tasks.tracked_values import texts

MODEL_SPEC, STATE = "entprune.model_spec", "entprune.state"
CHECKPOINT_NAME = "model.safetensors"

_FOLDER = "dense"  # among the artifacts of the run


def register_dense(model: nn.Module, name: str, model_spec: str, tags: Mapping[str, Any]) -> int:
    """Register a trained network's state dict as the next version of a name, in a run of its own.

    Args:
        model: it is not changed.
        name: in the registry.
        model_spec: how it is built.
        tags: further facts, such as accuracy and data.

    Returns:
        The number of the version.

    Raises:
        EngineError: the server refuses.
    """
    run_id = tracking.open_run(name, f"dense {model_spec}", tags)
    with tracking.reported(f"register model '{name}'"), TemporaryDirectory(prefix="entprune-") as folder:
        checkpoint = Path(folder) / CHECKPOINT_NAME
        save_state(model, checkpoint)
        tracking.client().log_artifact(run_id, str(checkpoint), _FOLDER)
        everything = {**tags, MODEL_SPEC: model_spec, "checkpoint_sha256": sha256_file(checkpoint)}
        version = _create_version(run_id, name, everything)
    tracking.close_run(run_id)
    return version


def newest_waiting(name: str) -> RegisteredVersion | None:
    """The newest dense version if nothing was made of it yet; older ones are superseded by it.

    Raises:
        ConfigError: there is no registered model of that name. EngineError: no server answers.
    """
    require_database(f"read model '{name}'")
    client, exceptions = tracking.client(), tracking.library().exceptions
    with tracking.reported(f"read model '{name}'"):
        try:
            client.get_registered_model(name)
        except exceptions.MlflowException as cause:
            if cause.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise ConfigError(
                f"model '{name}': expected a registered model, found none; register its first version, "
                "or correct the name."
            ) from cause
        found = client.search_model_versions(f"name = '{name}'")
    dense = [version for version in found if MODEL_SPEC in version.tags]
    if not dense:
        return None
    newest = max(dense, key=lambda version: int(version.version))
    if STATE in newest.tags:
        return None
    return RegisteredVersion(
        name=name, version=int(newest.version), tags=dict(newest.tags), description=newest.description or ""
    )


def fetch_checkpoint(version: RegisteredVersion, folder: Path) -> Path:
    """Download a dense version's state dict.

    Raises:
        CheckpointError: its files hold none. EngineError: the server refuses.
    """
    with tracking.reported(f"download '{version.uri}'"), tracking.library_defaults():
        place = tracking.library().artifacts.download_artifacts(artifact_uri=version.uri, dst_path=str(folder))
    checkpoint = Path(place) / CHECKPOINT_NAME
    if not checkpoint.is_file():
        raise CheckpointError(
            f"'{version.uri}': expected {CHECKPOINT_NAME} among its files, found none; register it with its state dict."
        )
    return checkpoint


def mark(version: RegisteredVersion, state: str) -> None:
    """Write on a dense version what became of it, so that it is not taken up again."""
    annotate(version, {STATE: state})


def _create_version(run_id: str, name: str, tags: Mapping[str, Any]) -> int:
    client = tracking.client()
    ensure_name(name)
    source = f"{client.get_run(run_id).info.artifact_uri}/{_FOLDER}"
    return int(client.create_model_version(name, source=source, run_id=run_id, tags=texts(tags)).version)
