"""What a run tells MLflow, kept beside its results for as long as MLflow has not heard it.

A run makes entries; each is told at once where the server answers. After the first that it does not take, the run goes
on, and the rest waits in `tracking.json` of the output folder until :meth:`Record.catch_up` finds the server again. An
entry may be told twice (a process may die between telling and noting it), and still arrives once: runs and versions
carry a mark by which they are found, and metrics their time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

from entprune.errors import ArtifactError, EngineError
from entprune.path import SparsityPath
from entprune.storage import atomic_write_text
from tasks import tracking
from tasks.curves import Numbers, group_numbers, setting_numbers
from tasks.tracked_values import flatten, key, text, texts

RECORD_NAME = "tracking.json"
MARK = "entprune.record"  # tag of runs and versions
PLACE = "entprune.output"  # tag of runs that are nobody's child

_PREFIX = "unrecorded-"  # of what stands for a run's id until there is one
_FORMAT_VERSION = 1

_logger = logging.getLogger(__name__)

Entry = dict[str, Any]
Register = Callable[[str, Entry], int]  # (id of the run, entry) -> number of the version


class Record:
    """Entries of one output folder.

    Args:
        folder: where the results will lie, for the sentence that tells where they wait.
        entries: of an earlier process.
    """

    def __init__(self, folder: Path, entries: list[Entry] | None = None) -> None:
        self.folder = Path(folder)
        self.entries = entries if entries is not None else []
        self._is_heard = entries is None
        self._is_checked = False
        self._file: Path | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record of a finished run.

        Raises:
            ArtifactError: there is none, or it is damaged.
        """
        path = Path(folder) / RECORD_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as cause:
            raise ArtifactError(
                f"'{folder}': expected the output folder of a run, found no {RECORD_NAME} in it; check the path."
            ) from cause
        except ValueError as cause:  # neither UTF-8 nor JSON
            raise ArtifactError(f"'{path}' is damaged; run the command that wrote this folder again.") from cause
        if not isinstance(content, dict) or content.get("format_version") != _FORMAT_VERSION:
            raise ArtifactError(f"'{path}': expected format_version {_FORMAT_VERSION}; use the entprune that wrote it.")
        record = cls(folder, content["entries"])
        record._file = path
        return record

    def waiting(self) -> list[Entry]:
        """Entries that MLflow has not heard."""
        return [entry for entry in self.entries if not entry["told"]]

    def run_id(self, token: str) -> str:
        """MLflow's id of a run, or what stands for it."""
        return self._ids().get(token, token)

    def _ids(self) -> dict[str, str]:
        return {entry["run"]: entry["run_id"] for entry in self.entries if entry["kind"] == "run" and entry["run_id"]}

    # --- telling ------------------------------------------------------------------------------------------------------

    def open_run(self, experiment: str, name: str, tags: Mapping[str, Any], parent: str | None = None) -> TrackedRun:
        """Start a run.

        Args:
            experiment: made if it is new.
            name: of the run.
            tags: lineage, say.
            parent: run that it belongs to.
        """
        token = f"{_PREFIX}{uuid.uuid4().hex}"
        origin = {PLACE: place_mark(self.folder)} if parent is None else {"mlflow.parentRunId": parent}
        known = texts(tags) | {MARK: token} | origin
        entry = {"kind": "run", "run": token, "experiment": experiment, "name": name, "tags": known, "run_id": None}
        self.tell(entry, _open_run)
        return TrackedRun(self, token, experiment)

    def tell(self, entry: Entry, tell: Callable[[Entry], Any]) -> Any:
        """Add an entry; tell it unless something before it waits already.

        Raises:
            EntpruneError: the entry itself is at fault, not the way to the server.
        """
        entry |= {"told": False}
        self.entries.append(entry)
        result = None
        if self._is_heard:
            try:
                if not self._is_checked:
                    tracking.check()
                    self._is_checked = True
                result = self._tell(entry, tell)
            except tracking.TrackingError as error:
                self._is_heard = False
                _logger.warning(
                    "the run goes on and keeps what it has to tell for `entprune log %s`: %s", self.folder, error
                )
        self._save()
        return result

    def _tell(self, entry: Entry, tell: Callable[[Entry], Any]) -> Any:
        result = tell(self._with_ids(entry))
        entry["told"] = True
        if entry["kind"] == "run":
            entry["run_id"] = result
        elif entry["kind"] == "version":
            entry["version"] = result
        return result

    def _with_ids(self, entry: Entry) -> Entry:
        """The entry with MLflow's ids in the place of what stands for them; marks stay."""
        own = {"run": entry["run"], "tags": dict(entry.get("tags", {}))}
        replaced: Entry = json.loads(_replace(json.dumps(entry), self._ids()))
        if MARK in own["tags"]:
            replaced["tags"][MARK] = own["tags"][MARK]
        return replaced | {"run": self.run_id(entry["run"])}

    # --- later --------------------------------------------------------------------------------------------------------

    def catch_up(self, register: Register | None = None) -> None:
        """Tell what waits, if the server answers by now.

        Args:
            register: how a version is registered from the files; without it none may wait.

        Raises:
            TrackingError: the server does not answer. EntpruneError: an entry cannot be told.
        """
        if not self.waiting():
            return
        tracking.check()
        for entry in self.waiting():
            self._tell(entry, partial(self._tell_again, entry, register))
            self._save()
        self._is_heard = self._is_checked = True

    def try_to_catch_up(self) -> None:
        """The same in a run that goes on either way, before it makes a version."""
        if not self._is_heard:
            with suppress(EngineError):
                self.catch_up()
                _logger.warning("MLflow answers again and has been told what it missed.")

    def _tell_again(self, entry: Entry, register: Register | None, told: Entry) -> Any:
        kind, run_id = entry["kind"], told["run"]
        if kind == "run":
            earlier = tracking.find_marked_run(entry["experiment"], MARK, entry["run"])
            return earlier or _open_run(told)
        if kind == "artifacts":
            self._complete_files()
            return tracking.log_files(run_id, self.folder / entry["place"], entry["names"])
        if kind == "version" and register is not None:
            found = tracking.find_marked_version(told["name"], MARK, told["tags"][MARK])
            return register(run_id, told) if found is None else found
        return _TELL[kind](told)

    def _complete_files(self) -> None:
        """Put ids and versions that came late into the reports."""
        versions = [int(entry["version"]) for entry in self.entries if entry["kind"] == "version" and entry["told"]]
        for name in ("report.json", "report.html", "sweep.json", "sweep.html"):
            for path in (self.folder / name, self.folder / "chosen" / name):
                if not path.is_file():
                    continue
                before = path.read_text(encoding="utf-8")
                after = _replace(before, self._ids())
                if path.suffix == ".json" and versions:
                    content = json.loads(after)
                    _set_version(content, versions[0])
                    after = json.dumps(content, indent=1 if name == "sweep.json" else 2, allow_nan=False) + "\n"
                if after != before:
                    atomic_write_text(path, after)

    # --- on disk ------------------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Put the record into a folder that is about to take its place as the results."""
        atomic_write_text(Path(folder) / RECORD_NAME, self._text())

    def settle(self) -> None:
        """The results are in their place: what is told from now on is noted there."""
        self._file = self.folder / RECORD_NAME
        self._save()

    def _save(self) -> None:
        if self._file is not None:
            atomic_write_text(self._file, self._text())

    def _text(self) -> str:
        """Of what was told only what is needed to find it again."""
        kept = ("kind", "run", "run_id", "experiment", "name", "version", "told")
        entries = [
            {name: entry[name] for name in kept if name in entry} if entry["told"] else entry for entry in self.entries
        ]
        return json.dumps({"format_version": _FORMAT_VERSION, "entries": entries}, allow_nan=False) + "\n"


class TrackedRun:
    """A run in MLflow, or what will become one. No dataclass: Prefect walks through those in search of futures."""

    def __init__(self, record: Record, token: str, experiment: str) -> None:
        self.record, self._token, self._experiment = record, token, experiment

    @property
    def id(self) -> str:
        """MLflow's id, or what stands for it until there is one."""
        return self.record.run_id(self._token)

    @property
    def address(self) -> str | None:
        """Where its page is in the web; None where there is none, or MLflow has not heard of everything."""
        return None if self.record.waiting() else tracking.run_address(self.id)

    def open_child(self, name: str, tags: Mapping[str, Any]) -> TrackedRun:
        """Start a run that belongs to this one."""
        return self.record.open_run(self._experiment, name, tags, parent=self.id)

    def settings(self, params: Mapping[str, Any]) -> None:
        """Record what the run was asked to do; nested mappings get dotted names, and None is left out."""
        known = {key(name): text(value) for name, value in flatten(params) if value is not None}
        self._tell({"kind": "params", "params": known})

    def describe(self, markdown: str) -> None:
        """Say on the run's page what it came to."""
        self._tell({"kind": "note", "markdown": markdown})

    def numbers(self, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Record numbers; nested mappings get dotted names, and what is not a number is left out."""
        self._numbers([(n, float(v), step) for n, v in flatten(metrics) if isinstance(v, (bool, int, float))])

    def groups(self, report: Mapping[str, Any]) -> None:
        """Record what became of each group."""
        self._numbers(group_numbers(report))

    def paths(self, paths: Mapping[str, SparsityPath]) -> list[TrackedRun]:
        """Record the sparsity paths: a child run for each hyperparameter setting; returns them in that order."""
        children = []
        for setting, numbers in setting_numbers(paths):
            child = self.open_child(setting.label(), {})
            child.settings(setting.to_dict())
            child._numbers(numbers)  # noqa: SLF001 -- its own kind
            child.close()
            children.append(child)
        return children

    def artifacts(self, source: Path, *, place: str = ".", names: list[str] | None = None) -> None:
        """Store files.

        Args:
            source: folder that they are in now.
            place: where that folder will be in the output folder.
            names: of the files; by default all but the record itself.
        """
        self._tell(
            {"kind": "artifacts", "place": place, "names": names},
            lambda told: tracking.log_files(told["run"], source, told["names"]),
        )

    def register(
        self, name: str, tags: Mapping[str, Any], description: str, register: Register, *, place: str = "."
    ) -> int | None:
        """Register the network; returns the number of its version, None while it waits.

        Args:
            name: in the registry.
            tags: of the version.
            description: its page.
            register: does it now.
            place: folder of the results in the output folder.
        """
        known = {**texts(tags), MARK: self._token}
        entry = {"kind": "version", "name": name, "tags": known, "description": description, "place": place}
        version: int | None = self._tell(entry, lambda told: register(told["run"], told))
        return version

    def close(self, status: str = "FINISHED") -> None:
        """End the run: "FINISHED", "FAILED" or "KILLED"."""
        self._tell({"kind": "end", "status": status})

    def _numbers(self, numbers: Numbers) -> None:
        self._tell({"kind": "metrics", "metrics": numbers, "time": int(time.time() * 1000)})

    def _tell(self, entry: Entry, tell: Callable[[Entry], Any] | None = None) -> Any:
        return self.record.tell(entry | {"run": self._token}, tell or _TELL[entry["kind"]])


_TELL: dict[str, Callable[[Entry], Any]] = {
    "params": lambda told: tracking.log_params(told["run"], told["params"]),
    "metrics": lambda told: tracking.log_numbers(told["run"], told["metrics"], told["time"]),
    "note": lambda told: tracking.describe_run(told["run"], told["markdown"]),
    "end": lambda told: tracking.close_run(told["run"], told["status"]),
}


def place_mark(folder: Path) -> str:
    """Stands for an output folder of this machine."""
    return hashlib.sha256(f"{platform.node()}:{Path(folder).absolute()}".encode()).hexdigest()[:16]


def _open_run(told: Entry) -> str:
    """Start a run; what a killed driver left open for the same folder is closed, for nobody else will."""
    if PLACE in told["tags"]:
        tracking.close_abandoned(told["experiment"], PLACE, told["tags"][PLACE])
    return tracking.open_run(told["experiment"], told["name"], told["tags"])


def is_waiting(folder: Path) -> bool:
    """Whether a folder holds something that MLflow has not heard."""
    try:
        return bool(Record.read(folder).waiting())
    except ArtifactError:
        return False


def _replace(written: str, ids: Mapping[str, str]) -> str:
    for token, run_id in ids.items():
        written = written.replace(token, run_id)
    return written


def _set_version(content: Any, version: int) -> None:
    """Fill in the version wherever a report leaves it open."""
    if isinstance(content, dict):
        if content.get("registered_version", version) is None:
            content["registered_version"] = version
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            _set_version(value, version)
