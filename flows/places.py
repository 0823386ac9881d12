"""Where a run may read and write: below ENTPRUNE_ROOT where that is set, and never outside a folder of its own."""

from __future__ import annotations

from pathlib import Path

from entprune.errors import ConfigError, OutputError
from flows.environment import ROOT_VARIABLE, allowed_root
from tasks.remote import local_path


def inside(folder: Path, name: str) -> Path:
    """Return the place of a name below a folder.

    Raises:
        OutputError: links or the name itself lead out of the folder.
    """
    place = Path(folder) / name
    if place.resolve().parent != Path(folder).resolve():
        raise OutputError(
            f"output '{place}': expected a place in '{folder}', got one that leads to '{place.resolve()}'; remove the "
            "link, or choose another folder."
        )
    return place


def check_place(field: str, path: Path | None) -> None:
    """Require that a path of a run lies below ENTPRUNE_ROOT, links followed; anything goes where that is not set.

    Args:
        field: that the path was given in.
        path: None for none.

    Raises:
        ConfigError: it lies elsewhere.
    """
    root = allowed_root()
    if root is None or path is None:
        return
    place = Path(path).resolve()
    if not place.is_relative_to(root):
        raise ConfigError(
            f"{field}: expected a place below '{root}' ({ROOT_VARIABLE}), got '{path}', which is '{place}'; give one "
            "below it."
        )


def check_location(field: str, location: Path | str | None) -> None:
    """Require the same of a path or URI; one that leads to another machine lies in nobody's way.

    Args:
        field: that it was given in.
        location: None for none.

    Raises:
        ConfigError: it lies elsewhere, or is a chain of URIs, which may end anywhere.
    """
    if location is None or allowed_root() is None:
        return
    if "::" in str(location):
        raise ConfigError(
            f"{field}: expected one path or URI where {ROOT_VARIABLE} is set, got the chain '{location}'; give its "
            "last part alone, copied to where it can be opened."
        )
    check_place(field, local_path(location))


def data_location(spec: str) -> str | None:
    """File, folder or URI that a data specification names, None for one that names none."""
    kind, colon, location = spec.partition(":")
    return location if colon and kind in {"npz", "imagefolder"} else None
