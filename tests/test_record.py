"""What a run tells MLflow arrives once, whenever the server or the process dies."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entprune.errors import ArtifactError, CertificateError
from entprune.path import PathSetting, SettingPath, SparsityPath, lower_envelope
from tasks import tracking
from tasks.record import MARK, RECORD_NAME, Record, TrackedRun, is_waiting


class ProcessDied(BaseException):
    """Stands for SIGKILL: nothing that follows is carried out."""


class FakeServer:
    """Holds what it was told; fails when it is told to.

    Attributes:
        faults: by the number of the call: "lost" before it, "unanswered" after it, or "dead", the caller after it.
    """

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.versions: list[dict[str, Any]] = []
        self.faults: dict[int, str] = {}
        self.calls = 0
        self.is_down = False

    def _call(self, act: Any) -> Any:
        self.calls += 1
        fault = self.faults.pop(self.calls, None)
        if fault == "lost" or self.is_down:
            self.is_down = True
            raise tracking.TrackingError("no answer")
        result = act()
        if fault == "unanswered":
            self.is_down = True
            raise tracking.TrackingError("no answer")
        if fault == "dead":
            raise ProcessDied
        return result

    def check(self) -> None:
        if self.is_down:
            raise tracking.TrackingError("no answer")

    def open_run(self, experiment: str, name: str, tags: dict[str, str]) -> str:
        def act() -> str:
            run_id = f"run{len(self.runs)}"
            self.runs[run_id] = {"experiment": experiment, "name": name, "tags": tags, "metrics": set(), "files": set()}
            return run_id

        return self._call(act)

    def close_abandoned(self, experiment: str, tag: str, value: str) -> None:
        self._call(lambda: None)

    def log_params(self, run_id: str, params: dict[str, str]) -> None:
        self._call(lambda: self.runs[run_id].setdefault("params", {}).update(params))

    def log_numbers(self, run_id: str, numbers: Sequence[Any], milliseconds: int) -> None:
        self._call(lambda: self.runs[run_id]["metrics"].update((*entry, milliseconds) for entry in numbers))

    def log_files(self, run_id: str, directory: Path, names: Sequence[str] | None = None) -> None:
        found = {path.name: path.read_text() for path in directory.iterdir() if path.name != RECORD_NAME}
        self._call(lambda: self.runs[run_id]["files"].update(found.items()))

    def describe_run(self, run_id: str, markdown: str) -> None:
        self._call(lambda: self.runs[run_id].update(page=markdown))

    def close_run(self, run_id: str, status: str) -> None:
        self._call(lambda: self.runs[run_id].update(status=status))

    def find_marked_run(self, experiment: str, tag: str, value: str) -> str | None:
        return next((name for name, run in self.runs.items() if run["tags"].get(tag) == value), None)

    def find_marked_version(self, name: str, tag: str, value: str) -> int | None:
        numbers = range(1, len(self.versions) + 1)
        return next((n for n in numbers if self.versions[n - 1]["tags"].get(tag) == value), None)

    def register(self, run_id: str, entry: dict[str, Any]) -> int:
        def act() -> int:
            self.versions.append({"run": run_id, "tags": entry["tags"], "page": entry["description"]})
            return len(self.versions)

        return self._call(act)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    fake = FakeServer()
    install(fake, monkeypatch)
    return fake


def install(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("check", "open_run", "log_params", "log_numbers", "log_files", "describe_run", "close_run")
    for name in (*names, "close_abandoned", "find_marked_run", "find_marked_version"):
        monkeypatch.setattr(tracking, name, getattr(fake, name))


def make_path() -> SparsityPath:
    found = [
        SettingPath(
            setting=setting, order=np.arange(3), errors=np.linspace(1.0, 0.0, 4), snapshots=np.ones((2, 3)) / 3,
            status="complete",
        )
        for setting in (PathSetting(), PathSetting(entropy_weight=0.3))
    ]  # fmt: skip
    return lower_envelope("a", 1, found)


def carry_out(folder: Path, server: FakeServer) -> TrackedRun:
    """What a pruning run does, as far as it is told."""
    record = Record(folder)
    run = record.open_run("exp", "first", {"seed": 0})
    run.settings({"model": "lenet", "config": {"keep": ("a",), "no": None}})
    record.try_to_catch_up()
    report = {"lineage": {"mlflow_run_id": run.id, "registered_version": None}}
    run.numbers({"dense": {"accuracy": 98.5}}, step=2)
    run.paths({"a": make_path()})
    run.describe("what it came to")
    version = run.register("small", {"lineage": run.id}, f"made by {run.id}", server.register)
    report["lineage"]["registered_version"] = version
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    run.artifacts(folder)
    record.write(folder)
    record.settle()
    run.close()
    return run


def assert_told_once(server: FakeServer, folder: Path) -> None:
    parents = {name: run for name, run in server.runs.items() if "mlflow.parentRunId" not in run["tags"]}
    children = [run for run in server.runs.values() if "mlflow.parentRunId" in run["tags"]]
    ((run_id, run),) = parents.items()
    assert (run["experiment"], run["name"], run["status"]) == ("exp", "first", "FINISHED")
    assert run["page"] == "what it came to"
    assert run["params"] == {"model": "lenet", "config.keep": '["a"]'}
    assert [entry[:3] for entry in run["metrics"]] == [("dense.accuracy", 98.5, 2)]
    assert [child["tags"]["mlflow.parentRunId"] for child in children] == [run_id, run_id]
    assert all(child["status"] == "FINISHED" and len(child["params"]) > 1 for child in children)
    (version,) = server.versions
    assert (version["run"], version["page"], version["tags"]["lineage"]) == (run_id, f"made by {run_id}", run_id)
    report = json.loads((folder / "report.json").read_text())
    assert report["lineage"] == {"mlflow_run_id": run_id, "registered_version": 1}
    assert {json.loads(text)["lineage"]["mlflow_run_id"] for name, text in run["files"] if name == "report.json"} == {
        run_id
    }
    assert not is_waiting(folder)


def catch_up(folder: Path, server: FakeServer) -> None:
    """`entprune log`, again and again until it comes through."""
    for _ in range(20):
        server.is_down = False
        try:
            Record.read(folder).catch_up(server.register)
        except (tracking.TrackingError, ProcessDied):
            continue
        return
    pytest.fail("never came through")


def test_server_that_answers_hears_everything_at_once(server: FakeServer, tmp_path: Path) -> None:
    run = carry_out(tmp_path / "out", server)
    assert run.id == "run0"
    assert_told_once(server, tmp_path / "out")


def test_unreachable_server_is_one_sentence_and_hears_it_later(
    server: FakeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.is_down = True
    with caplog.at_level(logging.WARNING):
        run = carry_out(tmp_path / "out", server)
    assert len(caplog.messages) == 1
    assert f"for `entprune log {tmp_path / 'out'}`: no answer" in caplog.messages[0]
    assert run.id.startswith("unrecorded-")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["lineage"]["registered_version"] is None
    assert is_waiting(tmp_path / "out")
    assert not server.runs
    catch_up(tmp_path / "out", server)
    assert_told_once(server, tmp_path / "out")


def test_server_that_comes_back_in_time_needs_no_command(server: FakeServer, tmp_path: Path) -> None:
    server.faults = {3: "lost"}  # the third call: the run is there, its settings are not
    record = Record(tmp_path)
    run = record.open_run("exp", "first", {})
    run.settings({"a": 1})
    assert len(record.waiting()) == 1
    server.is_down = False
    record.try_to_catch_up()
    assert not record.waiting()
    assert server.runs["run0"]["params"] == {"a": "1"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    during=st.integers(0, 18),
    kind=st.sampled_from(["lost", "unanswered"]),
    later=st.dictionaries(st.integers(1, 25), st.sampled_from(["lost", "unanswered", "dead"]), max_size=4),
)
def test_everything_arrives_once_whenever_server_or_command_dies(
    tmp_path_factory: pytest.TempPathFactory, during: int, kind: str, later: dict[int, str]
) -> None:
    folder, server = tmp_path_factory.mktemp("record") / "out", FakeServer()
    with pytest.MonkeyPatch.context() as patch:
        install(server, patch)
        server.faults = {during: kind} if during else {}
        server.is_down = not during
        carry_out(folder, server)
        server.faults = {server.calls + number: fault for number, fault in later.items()}
        catch_up(folder, server)
        assert_told_once(server, folder)
        before = server.calls
        Record.read(folder).catch_up(server.register)
        assert server.calls == before


def test_fault_of_the_entry_itself_ends_the_run(server: FakeServer, tmp_path: Path) -> None:
    def refuse(run_id: str, entry: dict[str, Any]) -> int:
        raise CertificateError("the stored network differs.")

    run = Record(tmp_path).open_run("exp", "first", {})
    with pytest.raises(CertificateError, match="differs"):
        run.register("small", {}, "", refuse)


def test_marks_survive_the_exchange_of_ids(server: FakeServer, tmp_path: Path) -> None:
    run = carry_out(tmp_path / "out", server)
    mark = server.runs[run.id]["tags"][MARK]
    assert mark.startswith("unrecorded-")
    assert server.versions[0]["tags"][MARK] == mark


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected the output folder of a run, found no tracking.json"),
        ("{", "is damaged; run the command"),
        ('{"format_version": 9}', "expected format_version 1"),
        ("[]", "expected format_version 1"),
    ],
)
def test_folder_without_a_record_is_one_sentence(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / RECORD_NAME).write_text(text)
    with pytest.raises(ArtifactError, match=message):
        Record.read(tmp_path)
