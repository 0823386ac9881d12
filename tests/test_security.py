"""What a run must not do whoever wrote its parameters: leave its folders, show secrets, run code from the registry."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from entprune.checkpoints import load_state
from entprune.errors import CheckpointError, ConfigError, EngineError, OutputError
from flows import cli, environment, places, watch
from flows.parameters import PruneParameters, parse_parameters
from flows.preflight import check_output_file, check_output_folder, load_inputs
from flows.promote import PromoteParameters
from flows.sweep_inputs import preflight_sweep
from flows.sweep_parameters import parse_sweep
from tasks import dense_registry, tracking
from tasks.redaction import clean_cause, redact
from tasks.registry import RegisteredVersion

SECRET = "s3cret-of-the-tests"  # noqa: S105 -- of nobody
TRAIN = ["--model", "digits_cnn", "--data", "digits", "--output", "dense.safetensors"]
PRUNE = {"data": "digits", "macs_removed": 0.5, "output": "runs/out"}


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:0ther-secret")
    monkeypatch.setenv("SOME_TOKEN", "true")
    text = f"postgresql+asyncpg://me:p@ss@host/db, {SECRET}, admin:0ther-secret, 0ther-secret, true"
    assert redact(text) == "postgresql+asyncpg://***@host/db, ***, ***, ***, true"
    assert redact("http://host:5000/path?mail=a@b, models:/net@champion") == (
        "http://host:5000/path?mail=a@b, models:/net@champion"
    )


def test_cause_with_a_secret_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    harmless, leaking = ValueError("no route"), ValueError("outer")
    leaking.__context__ = OSError(f"refused {SECRET}")
    assert clean_cause(harmless) is harmless
    assert clean_cause(leaking) is None


@pytest.mark.parametrize("scheme", ["http", "postgresql", "nonsense"])
def test_address_of_a_dead_server_is_told_without_its_password(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://me:{SECRET}@127.0.0.1:1/x")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("mlflow.store.db.utils.MAX_RETRY_COUNT", 1)  # of a database: by default for 100 seconds
    with caplog.at_level(logging.DEBUG):
        for ask in (tracking.check, lambda: tracking.open_run("net", "run", {})):
            with pytest.raises(EngineError, match=r"127\.0\.0\.1:1") as raised:
                ask()
            link: BaseException | None = raised.value
            while link is not None:
                assert SECRET not in str(link)
                link = None if link.__suppress_context__ and link.__cause__ is None else link.__cause__
    assert SECRET not in "\n".join(record.getMessage() for record in caplog.records if record.name != "mlflow")


def test_password_leaves_the_address_of_the_tracking_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:p%40ss@host:5000/ml")
    environment.set_defaults()
    taken = [os.environ[f"MLFLOW_TRACKING_{name}"] for name in ("URI", "USERNAME", "PASSWORD")]
    assert taken == ["https://host:5000/ml", "me", "p@ss"]


def test_command_shows_no_password(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "rollback", "net", "--verbose"],
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_TRACKING_URI": f"postgresql://me:{SECRET}@127.0.0.1:1/x", "PYTHONPATH": _root()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no MLflow server answers at 'postgresql://***@127.0.0.1:1/x'" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def _root() -> str:
    return str(Path(__file__).resolve().parents[1])


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../net", "..", "/net", "a/b", "a:b", "net\n", " net", "net'", ".net", "models:/net"])
def test_names_of_the_registry_are_no_paths(name: str) -> None:
    for make in (
        lambda: PruneParameters(model="lenet", checkpoint="a.pt", register=name, **PRUNE),
        lambda: watch.WatchParameters(name=name, prune=PRUNE),
        lambda: PromoteParameters(name=name),
        lambda: parse_sweep({"base": {**_base()}, "output": "out", "register": name}),
    ):
        with pytest.raises((ValidationError, ConfigError), match="expected a name"):
            make()


@pytest.mark.parametrize("command", [["rollback"], ["train", *TRAIN, "--register"]])
def test_command_refuses_a_name_that_is_a_path(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, "../net"])
    assert "expected a name of letters" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def _base(**changes: Any) -> dict[str, Any]:
    return {"model": "digits_cnn", "checkpoint": "a.pt", "data": "digits", "macs_removed": 0.5} | changes


@pytest.mark.parametrize("field", ["output", "register"])
def test_setting_of_a_sweep_has_no_place_of_its_own(field: str) -> None:
    with pytest.raises(ConfigError, match=f"base.{field}: give it beside the base"):
        parse_sweep({"base": _base(**{field: "../elsewhere"}), "output": "out"})
    with pytest.raises(ConfigError, match="no field to sweep over"):
        parse_sweep({"base": _base(), "grid": {field: ["../elsewhere"]}, "output": "out"})


def test_place_below_a_folder_stays_there(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "runs/net-1").symlink_to(tmp_path / "other")
    assert places.inside(tmp_path / "runs", "net-2") == tmp_path / "runs/net-2"
    for name in ("net-1", "..", "../other", str(tmp_path / "other")):
        with pytest.raises(OutputError, match="expected a place in"):
            places.inside(tmp_path / "runs", name)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ENTPRUNE_ROOT allows; it is the current folder, with a link out of it."""
    folder = tmp_path / "allowed"
    folder.mkdir()
    (tmp_path / "outside.pt").touch()
    (folder / "link").symlink_to(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ENTPRUNE_ROOT", str(folder))
    return folder


@pytest.mark.parametrize("place", ["../outside.pt", "link/outside.pt", "{outside}", "a/../../outside.pt"])
@pytest.mark.parametrize("field", ["checkpoint", "data_root", "cache_dir", "data"])
def test_run_stays_below_the_root(root: Path, field: str, place: str) -> None:
    place = place.format(outside=root.parent / "outside.pt")
    values = {"model": "digits_cnn", "checkpoint": "a.pt", **PRUNE}
    parameters = parse_parameters(values | {field: f"npz:{place}" if field == "data" else place})
    with pytest.raises(ConfigError, match=rf"^{field}: expected a place below '.*' \(ENTPRUNE_ROOT\)"):
        load_inputs(parameters)


@pytest.mark.parametrize("field", ["cache_dir", "data"])
@pytest.mark.parametrize("place", ["file://{outside}", "local://{outside}", "simplecache::file://{outside}"])
def test_uri_is_no_way_out_of_the_root(root: Path, field: str, place: str) -> None:
    place = place.format(outside=root.parent / "outside.pt")
    values = {"model": "digits_cnn", "checkpoint": "a.pt", **PRUNE}
    parameters = parse_parameters(values | {field: f"npz:{place}" if field == "data" else place})
    with pytest.raises(ConfigError, match=rf"^{field}: expected .*ENTPRUNE_ROOT"):
        load_inputs(parameters)


def test_uri_of_another_machine_is_allowed_under_a_root(root: Path) -> None:
    places.check_location("cache_dir", "memory://folder/store")
    places.check_location("cache_dir", f"file://{root}/store")


@pytest.mark.parametrize("place", ["../out", "link/out", "/somewhere/out"])
def test_results_stay_below_the_root(root: Path, place: str) -> None:
    for check in (check_output_folder, check_output_file):
        with pytest.raises(ConfigError, match="output: expected a place below"):
            check(Path(place))
        check(Path("runs/out"))
    with pytest.raises(ConfigError, match="output: expected a place below"):
        preflight_sweep(parse_sweep({"base": _base(), "output": place}))


# --- foreign code -----------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("is_zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, suffix: str, is_zipped: bool) -> None:
    mark, path = tmp_path / "was_run", tmp_path / f"net{suffix}"
    if is_zipped:
        torch.save({"weight": Payload(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Payload(mark)}))
    with pytest.raises(CheckpointError, match=r"^checkpoint '.*': expected .*\.$") as raised:
        load_state(path)
    assert "\n" not in str(raised.value)
    assert not mark.exists()


@pytest.mark.parametrize("allowed", [(), ("tests.micro_networks:other",)])
def test_watch_runs_no_code_that_the_registry_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allowed: tuple[str, ...]
) -> None:
    tags = {dense_registry.MODEL_SPEC: "tests.micro_networks:hostile"}
    version = RegisteredVersion(name="dense", version=3, tags=tags, description="")
    marks: list[str] = []
    monkeypatch.setattr(dense_registry, "newest_waiting", lambda name: version)
    monkeypatch.setattr(dense_registry, "mark", lambda version, state: marks.append(state))
    monkeypatch.setattr(watch, "prune_model", lambda parameters: pytest.fail("it was pruned"))
    prune = PRUNE | {"output": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache")}
    parameters = watch.WatchParameters(name="dense", prune=prune, factories=allowed)
    with pytest.raises(ConfigError, match=r"models:/dense/3': expected a built-in network.*which was not run"):
        watch.watch.fn(parameters)
    assert marks[0].startswith("failed: 'models:/dense/3'")
    assert list(tmp_path.iterdir()) == []
