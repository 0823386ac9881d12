"""Measured figures as data: one JSON file for each (part, network, seed, budget), written anew after every cell.

A cell is one measurement with a key of plain values; the run that measured it (command, versions, threads, commit) is
kept once and referred to by its number.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from entprune.errors import ConfigError
from entprune.report import environment
from entprune.storage import atomic_write_text

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
_VERSION = 1
_MEASURED_CODE = ("entprune", "infra/benchmark/*.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What a file of results is about.

    Attributes:
        part: of the benchmark.
        network: name in :mod:`infra.benchmark.networks`.
        seed: of splits, sampled positions and random choices.
        budget: short text such as "parameters-0.92", empty where a part has none.
    """

    part: str
    network: str
    seed: int
    budget: str = ""

    def path(self, folder: Path = RESULTS) -> Path:
        """Where its results lie."""
        stem = f"{self.network}-seed{self.seed}"
        return folder / self.part / f"{stem}-{self.budget}.json" if self.budget else folder / self.part / f"{stem}.json"


class Record:
    """Results of one subject, in memory and on disk.

    Args:
        path: the file; it is read if it exists.
        subject: must be that of the file.

    Raises:
        ConfigError: the file is unreadable or about something else.
    """

    def __init__(self, path: Path, subject: Subject) -> None:
        self._path = path
        head = {"record_version": _VERSION, "part": subject.part, "network": subject.network}
        head |= {"seed": subject.seed, "budget": subject.budget}
        self.content: dict[str, Any] = {**head, "facts": {}, "runs": [], "cells": []}
        if path.exists():
            self.content = read_record(path)
            if {name: self.content.get(name) for name in head} != head:
                raise ConfigError(f"results '{path.name}': they are not those of {subject}; move the file away.")

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether this cell has been measured."""
        return any(cell["key"] == dict(key) for cell in self.content["cells"])

    def require_facts(self, facts: Mapping[str, Any], *, renew: bool = False) -> None:
        """Fix what all cells have in common (hashes of the inputs); later runs must agree.

        Args:
            facts: name to value.
            renew: forget everything that was measured on other inputs instead of refusing.

        Raises:
            ConfigError: the file was measured on other inputs.
        """
        known = self.content["facts"]
        if renew and any(known.get(name, value) != value for name, value in facts.items()):
            self.content |= {"facts": dict(facts), "runs": [], "cells": []}
            return
        for name, value in facts.items():
            if known.setdefault(name, value) != value:
                raise ConfigError(
                    f"results '{self._path.name}': expected {name} {known[name]}, got {value}; they were measured on "
                    "other inputs: use the same ones, or begin the file anew with FORCE=1."
                )

    def put(self, key: Mapping[str, Any], values: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Add or replace one cell and write the file."""
        if dict(run) not in self.content["runs"]:
            self.content["runs"].append(dict(run))
        cell = {"key": dict(key), "values": dict(values), "run": self.content["runs"].index(dict(run))}
        cells = self.content["cells"]
        for number, old in enumerate(cells):
            if old["key"] == dict(key):
                cells[number] = cell
                break
        else:
            cells.append(cell)
        atomic_write_text(self._path, json.dumps(self.content, indent=1, allow_nan=False) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """Content of one file.

    Raises:
        ConfigError: it is no JSON, or of another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ConfigError(f"results '{path.name}': expected JSON, got none ({cause}); delete the file.") from cause
    if not isinstance(content, dict) or content.get("record_version") != _VERSION:
        raise ConfigError(f"results '{path.name}': expected record_version {_VERSION}; measure it again.")
    return content


def all_records(part: str, folder: Path = RESULTS) -> Iterator[dict[str, Any]]:
    """Every file of a part, in the order of their names."""
    for path in sorted((folder / part).glob("*.json")):
        yield read_record(path)


def describe_run(command: str, threads: int) -> dict[str, Any]:
    """What the figures of this run depend on besides their inputs: code, versions, threads."""
    peers = {name.replace("-", "_"): version(name) for name in ("torch-pruning", "scikit-learn")}
    versions = environment() | peers | {"threads": threads}
    return {"command": command, "code_commit": code_commit(), "environment": versions}


def code_commit() -> str | None:
    """Commit of the measured code, with "+changes" where the working tree differs from it; None outside git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}+changes" if _git("status", "--porcelain", "--", *_MEASURED_CODE) else commit


def _git(*arguments: str) -> str | None:
    root = HERE.parents[1]
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 -- fixed arguments
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
