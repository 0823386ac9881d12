"""Files of a report, each complete or absent; ``report.json`` comes last, so its presence means that all are there."""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from entprune.errors import OutputError
from entprune.path import SparsityPath
from entprune.report.page import render_page
from entprune.storage import atomic_write_text, save_path, staging_directory

_PACKAGES = ("entprune", "torch", "torchvision", "numpy", "safetensors")


def write_report(report: Mapping[str, Any], paths: Mapping[str, SparsityPath], directory: Path) -> None:
    """Write the evidence of a run: ``report.json``, ``report.html``, ``plan.json``, ``paths/`` and ``plots/``.

    Args:
        report: schema version 1, values that JSON can hold.
        paths: sparsity path of each group; one file each under ``paths/``.
        directory: made if it is missing; other files in it are left alone.

    Raises:
        OutputError: a file cannot be written, or the report holds NaN or infinity.
    """
    directory = Path(directory)
    report_text, plan_text = _to_json(report), _to_json(report["plan"])
    plots = _draw(report, paths)
    page = render_page(report, plots)
    with staging_directory(directory / "paths") as staging:
        for number, (group, path) in enumerate(paths.items()):
            save_path(path, staging / f"{file_stem(number, group)}.safetensors")
    with staging_directory(directory / "plots") as staging:
        for name, svg in plots.items():
            atomic_write_text(staging / f"{name}.svg", svg)
    atomic_write_text(directory / "plan.json", plan_text)
    atomic_write_text(directory / "report.html", page)
    atomic_write_text(directory / "report.json", report_text)


def render_html(report: Mapping[str, Any], paths: Mapping[str, SparsityPath]) -> str:
    """Return the page that :func:`write_report` writes.

    Args:
        report: schema version 1.
        paths: sparsity path of each group; a group without one gets no curves.
    """
    return render_page(report, _draw(report, paths))


def environment() -> dict[str, Any]:
    """What the run's numbers depend on besides its settings; nothing that names a machine, a user or a folder."""
    return {
        "python": platform.python_version(),
        **{package.replace("-", "_"): _version(package) for package in _PACKAGES},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu() -> str:
    """Model of the processor where the system names it, and the widest instructions that torch uses of it."""
    model, listing = platform.processor(), Path("/proc/cpuinfo")
    if listing.is_file():
        named = [line for line in listing.read_text(errors="replace").splitlines() if line.startswith("model name")]
        model = named[0].partition(":")[2].strip() if named else model
    return f"{model} {torch.backends.cpu.get_cpu_capability()}".strip()


def file_stem(number: int, group: str) -> str:
    """A file name for a group that any file system takes; the number keeps names apart."""
    return f"{number:03d}-{re.sub(r'[^A-Za-z0-9._-]', '_', group)[:80]}"


def _draw(report: Mapping[str, Any], paths: Mapping[str, SparsityPath]) -> dict[str, str]:
    from entprune.report.plots import draw_plots  # noqa: PLC0415 -- matplotlib is imported only when a plot is drawn

    return draw_plots(report, paths)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # used from a checkout, or an optional part
        return None


def _to_json(content: Mapping[str, Any]) -> str:
    place = _find_non_finite(content)
    if place is not None:
        raise OutputError(
            f"report: expected finite numbers, got NaN or infinity in '{place}'; use null for what is unknown."
        )
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _find_non_finite(value: Any, place: str = "") -> str | None:
    """Dotted place of the first number that JSON cannot hold."""
    if isinstance(value, float):
        return None if math.isfinite(value) else place
    entries = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    )
    for key, entry in entries:
        found = _find_non_finite(entry, f"{place}.{key}".lstrip("."))
        if found is not None:
            return found
    return None
