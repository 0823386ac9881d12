"""What can be wrong with the input is found here, within seconds and before any engine is started."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from torch import nn

from entprune.checkpoints import load_checkpoint, sha256_file
from entprune.datasets import ImageData, load_data
from entprune.errors import OutputError
from entprune.evaluation import resolve_device
from entprune.models import build_model
from entprune.stages import Network, analyse
from flows.environment import cluster_address, store_location
from flows.parameters import PruneParameters
from flows.places import check_location, check_place, data_location
from tasks.remote import RemoteFolder, local_path

REPORT_NAME = "report.json"  # marks a folder as the result of an earlier run, which may be replaced


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoadedInputs:
    """What a pruning run works on, loaded and checked.

    Attributes:
        model: dense network with the checkpoint's parameters, in eval mode on the CPU.
        data: images and labels.
        checkpoint_sha256: of the checkpoint file.
        network: the same network, analysed: its groups and what it costs.
    """

    model: nn.Module
    data: ImageData
    checkpoint_sha256: str
    network: Network


_handed_over: ContextVar[tuple[BaseModel, Any] | None] = ContextVar("handed_over", default=None)


def preflight(parameters: PruneParameters) -> LoadedInputs:
    """Check everything that can be checked without an engine, cheap things first, and return what was loaded.

    Nothing is written. Within :func:`hand_over` the inputs that were loaded before are returned.

    Raises:
        ConfigError, OutputError, ModelError, DataError, CheckpointError: an input is unusable.
    """
    earlier: LoadedInputs | None = handed_over(parameters)
    if earlier is not None:
        return earlier
    parameters.budget()
    check_output_folder(parameters.output)
    check_store(parameters.cache_dir)
    return load_inputs(parameters)


def load_inputs(parameters: PruneParameters, data: ImageData | None = None) -> LoadedInputs:
    """Load and analyse a network, and the data unless they are there already; errors as for :func:`preflight`."""
    config = parameters.config()
    for field in ("checkpoint", "data_root"):
        check_place(field, getattr(parameters, field))
    check_location("data", data_location(parameters.data))
    check_location("cache_dir", store_location(parameters.cache_dir))
    if cluster_address(parameters.ray_address) is None:
        resolve_device(parameters.device)  # on a cluster the workers' devices count, not this machine's
    checkpoint_sha256 = sha256_file(parameters.checkpoint)
    if data is None:
        data = load_data(parameters.data, root=parameters.data_root, mean=parameters.mean, std=parameters.std)
    model = build_model(parameters.model, num_classes=data.num_classes, input_shape=data.input_shape)
    load_checkpoint(model, parameters.checkpoint)
    return LoadedInputs(
        model=model,
        data=data,
        checkpoint_sha256=checkpoint_sha256,
        network=analyse(model, data.input_shape, config),
    )


@contextmanager
def hand_over(parameters: BaseModel, inputs: Any) -> Iterator[None]:
    """Let the checks of the same parameters return these inputs, so that they are loaded once."""
    token = _handed_over.set((parameters, inputs))
    try:
        yield
    finally:
        _handed_over.reset(token)


def handed_over(parameters: BaseModel) -> Any:
    """What :func:`hand_over` holds for these parameters, None if nothing."""
    held = _handed_over.get()
    return held[1] if held is not None and held[0] == parameters else None


def check_output_folder(folder: Path, marker: str = REPORT_NAME) -> None:
    """Require that a run may write there, without writing.

    Args:
        folder: of the results.
        marker: file by which an earlier result is known.

    Raises:
        OutputError: it is a file, lies below one, cannot be written, or holds files of another origin. ConfigError: it
            is outside of what ENTPRUNE_ROOT allows.
    """
    folder = Path(folder).absolute()
    check_place("output", folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise OutputError(
            f"output '{folder}': expected a new or empty folder, or the result of an earlier run, got other files; "
            "choose another folder."
        )
    _check_writable(folder, folder)


def check_store(location: Path | str | None) -> None:
    """Require that the place of stored results can be opened; a URI's server is not asked.

    Raises:
        ConfigError: a URI that fsspec cannot open.
    """
    if location is not None and local_path(location) is None:
        RemoteFolder(str(location))


def check_output_file(path: Path) -> None:
    """Require that a file may be written there, without writing.

    Raises:
        OutputError: it is a folder, lies below a file, or its folder cannot be written. ConfigError: as above.
    """
    path = Path(path).absolute()
    check_place("output", path)
    if path.is_dir():
        raise OutputError(f"output '{path}': expected the name of a file, got a folder; add a file name.")
    _check_writable(path, path.parent)


def _check_writable(output: Path, folder: Path) -> None:
    """Try the nearest folder that exists: permission bits alone do not tell about a read-only file system."""
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise OutputError(f"output '{output}': expected a folder at '{existing}', got a file; choose another folder.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as cause:
        raise OutputError(
            f"output '{output}': '{existing}' cannot be written ({cause.strerror}); choose another folder."
        ) from cause
