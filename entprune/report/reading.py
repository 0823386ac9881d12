"""Reports that were written before, read back with their faults named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from entprune.errors import ArtifactError
from entprune.path import SparsityPath
from entprune.storage import load_path

Shown = TypeVar("Shown")
SCHEMA_VERSION = 1
REPORT_FILE, SWEEP_FILE = "report.json", "sweep.json"
_REPORT_PARTS = ("model", "data", "budget", "dense", "one_shot", "groups", "unprunable", "candidates", "warnings")
_SWEEP_PARTS = ("model", "data", "dense", "settings", "fronts", "chosen", "solve", "timings_seconds", "swept")


def read_report(directory: Path) -> dict[str, Any]:
    """Content of a run's ``report.json``.

    Raises:
        ArtifactError: it is missing, is no JSON, has another schema version, or lacks a part.
    """
    return _read(Path(directory) / REPORT_FILE, "the output folder of `entprune prune`", _REPORT_PARTS)


def read_sweep(directory: Path) -> dict[str, Any]:
    """Content of a sweep's ``sweep.json``; errors as for :func:`read_report`."""
    return _read(Path(directory) / SWEEP_FILE, "the output folder of `entprune sweep`", _SWEEP_PARTS)


def read_paths(directory: Path) -> dict[str, SparsityPath]:
    """Sparsity paths that lie beside a report; none where the folder is missing.

    Raises:
        ArtifactError: a file is damaged.
    """
    paths = [load_path(file) for file in sorted((Path(directory) / "paths").glob("*.safetensors"))]
    return {path.group: path for path in paths}


def rendered(render: Callable[..., Shown], place: Path, *arguments: Any) -> Shown:
    """Render a page or a table of content that came from a file.

    Raises:
        ArtifactError: the content is not of the shape that its schema version promises.
    """
    try:
        return render(*arguments)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, StopIteration) as cause:
        raise ArtifactError(
            f"'{place}': expected a report as `entprune prune` writes it, got one that cannot be shown "
            f"({type(cause).__name__}: {cause}); write it again with a new run."
        ) from cause


def _read(file: Path, folder: str, wanted: tuple[str, ...]) -> dict[str, Any]:
    if not file.is_file():
        what = f"a folder without {file.name}"
        if not file.parent.is_dir():
            what = "a file" if file.parent.exists() else "nothing"
        raise ArtifactError(f"'{file.parent}': expected {folder} with {file.name} in it, got {what}; check the path.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ArtifactError(
            f"'{file}': expected JSON, got a file that cannot be read ({cause}); restore it, or repeat the run."
        ) from cause
    version = content.get("schema_version") if isinstance(content, Mapping) else None
    if not isinstance(content, dict) or version != SCHEMA_VERSION or isinstance(version, bool):
        got = "no object" if not isinstance(content, dict) else f"{version!r}"
        raise ArtifactError(
            f"'{file}': expected schema_version {SCHEMA_VERSION}, got {got}; "
            "use the version of entprune that wrote it, or repeat the run."
        )
    missing = [part for part in wanted if part not in content]
    if missing:
        raise ArtifactError(f"'{file}': expected a part named '{missing[0]}', got none; repeat the run.")
    return content
