"""Intermediate results on disk: complete or absent, checked on reading, and never able to run code.

A bundle is one safetensors file: arrays, and plain JSON in the header. Its SHA-256 covers both, so a damaged bundle is
refused instead of giving a slightly different plan.

Axes: c channels of a group, s snapshots, d features, t sampled rows, m outputs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from entprune.calibration import LayerStatistics, Statistics
from entprune.errors import ArtifactError, ConfigError, OutputError
from entprune.moments import InputMoments, Moments, RowMoments
from entprune.path import PathSetting, SettingPath, SparsityPath
from entprune.resumption import TrainingState

_BUNDLE_VERSION = "1"


def write_bundle(path: Path, arrays: Mapping[str, np.ndarray], content: Mapping[str, Any]) -> None:
    """Write arrays and plain values into one file, which appears complete or not at all.

    Args:
        path: where; missing folders are made, an older file is replaced.
        arrays: any shape and numeric dtype; stored bit by bit in row-major order.
        content: what JSON can hold; NaN and infinity are not part of JSON.

    Raises:
        OutputError: the file cannot be written. ValueError: `content` holds NaN or infinity.
    """
    text = json.dumps(content, allow_nan=False)
    ordered = {name: _stored_form(array) for name, array in arrays.items()}
    metadata = {"bundle_version": _BUNDLE_VERSION, "content": text, "sha256": _digest(ordered, text)}
    _write_atomically(Path(path), lambda target: safetensors.numpy.save_file(ordered, target, metadata=metadata))


def read_bundle(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what :func:`write_bundle` wrote.

    Returns:
        The arrays (writable, in memory) and the plain values.

    Raises:
        ArtifactError: the file is missing, damaged, or not a bundle.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="np") as stored:
            metadata = stored.metadata() or {}
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 -- it is not a mapping
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as cause:
        problem = "found none" if not path.is_file() else "but it is damaged or cut off"
        raise ArtifactError(
            f"'{path}': expected a stored result, {problem}; delete it and run the stage again."
        ) from cause
    if metadata.get("bundle_version") != _BUNDLE_VERSION or not {"content", "sha256"} <= set(metadata):
        raise ArtifactError(
            f"'{path}': expected a stored result of version {_BUNDLE_VERSION}, got "
            f"{metadata.get('bundle_version', 'a file of another origin')}; delete it and run the stage again."
        )
    if _digest(arrays, metadata["content"]) != metadata["sha256"]:
        raise ArtifactError(
            f"'{path}': expected the checksum of its header, got another; delete it and run the stage again."
        )
    return arrays, json.loads(metadata["content"])


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, complete or not at all; missing folders are made.

    Raises:
        OutputError: the file cannot be written.
    """
    _write_atomically(Path(path), lambda target: _write_text(target, text))


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """Lend an empty file beside `final` that takes its place on success and vanishes on error.

    Args:
        final: the file to make; missing folders are made, an older file is replaced.

    Raises:
        OutputError: the file cannot be made, filled or replaced.
    """
    final = Path(final)
    staged = _sibling(final, "partial")
    with _reported_as_output_error(final):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            staged.touch()
            mode = staged.stat().st_mode
            yield staged
            staged.chmod(mode)  # safetensors makes files that only their owner can read
            staged.replace(final)
        finally:  # on success the name is gone already
            with contextlib.suppress(OSError):
                staged.unlink(missing_ok=True)


@contextmanager
def staging_directory(final: Path, *, marker: str | None = None) -> Iterator[Path]:
    """Lend an empty folder beside `final` that takes its place on success and vanishes on error.

    Args:
        final: the folder to make; an older one is replaced as a whole.
        marker: a file that an older folder must hold to be replaced, so that a mistyped path costs nobody their files.

    Raises:
        OutputError: the folder cannot be made or replaced.
    """
    final = Path(final).resolve()  # through a link, the folder that it points to is the one to replace
    _check_replaceable(final, marker)
    staging = _sibling(final, "partial")
    try:
        with _reported_as_output_error(final):
            staging.mkdir(parents=True)
        yield staging
        with _reported_as_output_error(final):
            _take_place(staging, final)
    finally:  # on success the name is gone already
        shutil.rmtree(staging, ignore_errors=True)


def save_path(sparsity_path: SparsityPath, path: Path) -> None:
    """Store the sparsity path of one group; errors as for :func:`write_bundle`."""
    arrays = {"errors": sparsity_path.errors, "choice": sparsity_path.choice}
    for number, setting_path in enumerate(sparsity_path.settings):
        arrays |= {f"{number}.{name}": array for name, array in _setting_arrays(setting_path).items()}
    content = {
        "kind": "sparsity path",
        "group": sparsity_path.group,
        "num_consumers": sparsity_path.num_consumers,
        "settings": [_setting_content(setting_path) for setting_path in sparsity_path.settings],
    }
    write_bundle(path, arrays, content)


def load_path(path: Path) -> SparsityPath:
    """Inverse of :func:`save_path`; errors as for :func:`read_bundle`."""
    arrays, content = read_bundle(path)
    with _checked_kind(path, content, "sparsity path"):
        return SparsityPath(
            group=content["group"],
            num_consumers=content["num_consumers"],
            settings=tuple(_setting_path(arrays, entry, f"{n}.") for n, entry in enumerate(content["settings"])),
            errors=arrays["errors"],
            choice=arrays["choice"],
        )


def save_setting_path(setting_path: SettingPath, path: Path) -> None:
    """Store one continuation; errors as for :func:`write_bundle`."""
    write_bundle(path, _setting_arrays(setting_path), {"kind": "setting path"} | _setting_content(setting_path))


def load_setting_path(path: Path) -> SettingPath:
    """Inverse of :func:`save_setting_path`; errors as for :func:`read_bundle`."""
    arrays, content = read_bundle(path)
    with _checked_kind(path, content, "setting path"):
        return _setting_path(arrays, content)


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Store what the calibration data say about each layer, moments or rows included, bit by bit.

    Raises:
        OutputError: the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    layers: list[dict[str, Any]] = []
    for number, (layer, entry) in enumerate(statistics.items()):
        moments = entry.moments
        arrays[f"{number}.outputs"] = entry.outputs
        if isinstance(moments, RowMoments):
            arrays[f"{number}.rows"] = moments.rows
        elif moments is not None:
            arrays |= {f"{number}.mean": moments.mean, f"{number}.scatter": moments.scatter}
        layers.append({"layer": layer, "count": None if moments is None else moments.count})
    write_bundle(path, arrays, {"kind": "statistics", "layers": layers})


def load_statistics(path: Path) -> dict[str, LayerStatistics]:
    """Inverse of :func:`save_statistics`, layers in the same order; errors as for :func:`read_bundle`."""
    arrays, content = read_bundle(path)
    with _checked_kind(path, content, "statistics"):
        return {
            entry["layer"]: LayerStatistics(
                moments=_moments(arrays, entry["count"], number), outputs=arrays[f"{number}.outputs"]
            )
            for number, entry in enumerate(content["layers"])
        }


def save_training(state: TrainingState, path: Path) -> None:
    """Store the state of a training run, in the place of an older one; errors as for :func:`write_bundle`."""
    write_bundle(path, state.arrays, {"kind": "training state", "training": dict(state.content)})


def load_training(path: Path) -> TrainingState:
    """Inverse of :func:`save_training`; errors as for :func:`read_bundle`."""
    arrays, content = read_bundle(path)
    with _checked_kind(path, content, "training state"):
        return TrainingState(arrays=arrays, content=content["training"])


def _moments(arrays: Mapping[str, np.ndarray], count: int | None, number: int) -> InputMoments | None:
    if count is None:
        return None
    if f"{number}.rows" in arrays:
        return RowMoments(rows=arrays[f"{number}.rows"])
    return Moments(count=count, mean=arrays[f"{number}.mean"], scatter=arrays[f"{number}.scatter"])


def _setting_arrays(setting_path: SettingPath) -> dict[str, np.ndarray]:
    return {"order": setting_path.order, "errors": setting_path.errors, "snapshots": setting_path.snapshots}


def _setting_content(setting_path: SettingPath) -> dict[str, Any]:
    return {"setting": setting_path.setting.to_dict(), "status": setting_path.status}


def _setting_path(arrays: Mapping[str, np.ndarray], content: Mapping[str, Any], prefix: str = "") -> SettingPath:
    return SettingPath(
        setting=PathSetting(**content["setting"]),
        order=arrays[prefix + "order"],
        errors=arrays[prefix + "errors"],
        snapshots=arrays[prefix + "snapshots"],
        status=content["status"],
    )


@contextmanager
def _checked_kind(path: Path, content: Mapping[str, Any], kind: str) -> Iterator[None]:
    """Turn a bundle of another kind, or of another version of this package, into one sentence."""
    if content.get("kind") != kind:
        raise ArtifactError(f"'{path}': expected a stored {kind}, got {content.get('kind')!r}; check the path.")
    try:
        yield
    except (KeyError, TypeError, ConfigError) as cause:
        raise ArtifactError(
            f"'{path}': expected a stored {kind} of this version of entprune, got other fields ({cause}); "
            "run the stage again."
        ) from cause


def _stored_form(array: np.ndarray) -> np.ndarray:
    """Row-major and little-endian: safetensors reads the memory without looking at strides."""
    array = np.asarray(array)
    return np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")


def _digest(arrays: Mapping[str, np.ndarray], content: str) -> str:
    """SHA-256 over content, names, dtypes, shapes and values; the arrays are read in place."""
    names = sorted(arrays)
    layout = [[name, arrays[name].dtype.name, list(arrays[name].shape)] for name in names]
    digest = hashlib.sha256(json.dumps([content, layout]).encode())
    for name in names:
        digest.update(arrays[name].reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _sibling(path: Path, suffix: str) -> Path:
    """A hidden name in the same folder, and so on the same file system, that nobody else uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.{suffix}")


def _write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    with staged_file(path) as staged:
        write(staged)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def _reported_as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as cause:
        reason = getattr(cause, "strerror", None) or str(cause).strip().split("\n", 1)[0]
        raise OutputError(f"cannot write '{path}': {reason}; choose another folder or make room.") from cause


def _check_replaceable(final: Path, marker: str | None) -> None:
    if final.exists() and not final.is_dir():
        raise OutputError(f"'{final}': expected a folder or nothing, got a file; choose another name.")
    if marker is None or not final.is_dir() or (final / marker).is_file():
        return
    if any(final.iterdir()):
        raise OutputError(
            f"'{final}': expected an empty folder or an older one with {marker}, got other files; "
            "choose another folder."
        )


def _take_place(staging: Path, final: Path) -> None:
    """Rename a finished folder over an older one; the older one comes back if that fails."""
    if not final.exists():
        staging.replace(final)
        return
    older = _sibling(final, "old")
    final.replace(older)
    try:
        staging.replace(final)
    except OSError:
        older.replace(final)
        raise
    shutil.rmtree(older, ignore_errors=True)
