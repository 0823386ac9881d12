"""The command line: bad input is one sentence and leaves nothing behind; good input shows what came out."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from entprune.checkpoints import save_state
from entprune.errors import CertificateError
from entprune.models import build_model
from tasks import tracking
from tasks.record import Record
from tests.command_line import assert_one_sentence, fail_if_called, run_cli, write_checkpoint, write_npz

ROOT = Path(__file__).resolve().parents[1]


class RunsCode:
    """A pickle of it writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "dense.safetensors")


@pytest.fixture
def arguments(tmp_path: Path, checkpoint: Path) -> dict[str, str]:
    """Options of a valid `prune`; each bad case changes some."""
    return {
        "--model": "digits_cnn",
        "--checkpoint": str(checkpoint),
        "--data": f"npz:{write_npz(tmp_path / 'data.npz')}",
        "--max-accuracy-drop": "1",
        "--output": str(tmp_path / "out"),
    }


def run_prune(options: dict[str, str | None], *further: str) -> int:
    given = [part for name, value in options.items() if value is not None for part in (name, value)]
    return run_cli("prune", *given, *further)


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that run in this process start no server for a flow that they will not reach."""
    for module in ("flows.cli", "flows.cli_sweep"):
        monkeypatch.setattr(f"{module}.begun_server", nullcontext)


def install_flow(monkeypatch: pytest.MonkeyPatch, behaviour: Callable[[Any], Any]) -> None:
    """Replace the flow, its workers and the tracking server: engines take long to start."""
    monkeypatch.setattr("tasks.tracking.check", lambda: None)
    monkeypatch.setattr("flows.workers.start_workers", lambda *_: nullcontext())
    for name in ("PREFECT_LOGGING_LEVEL", "MLFLOW_LOGGING_LEVEL"):  # --verbose sets them for its whole process
        monkeypatch.setenv(name, "ERROR")
    monkeypatch.setattr("flows.server.start_server", lambda: None)
    module = ModuleType("flows.prune_model")
    module.prune_model = behaviour  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flows.prune_model", module)


# --- bad input --------------------------------------------------------------------------------------------------------


def make_wrong_checkpoint(folder: Path) -> dict[str, str | None]:
    path = folder / "other.safetensors"
    save_state(build_model("digits_cnn", num_classes=7, input_shape=(1, 8, 8)), path)
    return {"--checkpoint": str(path)}


def make_pickle(folder: Path) -> dict[str, str | None]:
    path = folder / "hostile.pt"
    torch.save({"weight": RunsCode(folder / "code-was-run")}, path)
    return {"--checkpoint": str(path)}


def make_blocked_output(folder: Path) -> dict[str, str | None]:
    (folder / "file").write_text("in the way", encoding="utf-8")
    return {"--output": str(folder / "file" / "out")}


def make_occupied_output(folder: Path) -> dict[str, str | None]:
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.txt").write_text("precious", encoding="utf-8")
    return {"--output": str(folder / "thesis")}


def make_bad_data(folder: Path, **changes: np.ndarray) -> dict[str, str | None]:
    return {"--data": f"npz:{write_npz(folder / 'bad.npz', **changes)}"}


def change(**options: str | None) -> Callable[[Path], dict[str, str | None]]:
    return lambda _: {"--" + name.replace("_", "-"): value for name, value in options.items()}


BAD_INPUT: dict[str, tuple[Callable[[Path], dict[str, str | None]], tuple[str, ...]]] = {
    "missing checkpoint": (change(checkpoint="nowhere.pt"), ("nowhere.pt", "check the path")),
    "wrong-shaped checkpoint": (make_wrong_checkpoint, ("does not fit", "expected (10", "found (7")),
    "pickle with code": (make_pickle, ("hostile.pt", "code, which was not run")),
    "unknown model": (change(model="lenett"), ("unknown model 'lenett'", "did you mean lenet")),
    "unknown data": (change(data="mnits"), ("unknown data 'mnits'", "did you mean mnist")),
    "missing data file": (change(data="npz:nowhere.npz"), ("nowhere.npz", "found none")),
    "labels out of range": (
        lambda folder: make_bad_data(folder, y_test=np.full(20, 10)),
        ("expected labels in [0, 10), got 10 to 10",),
    ),
    "negative labels": (lambda folder: make_bad_data(folder, y_train=np.full(40, -1)), ("got -1 to -1",)),
    "NaN in the data": (
        lambda folder: make_bad_data(folder, x_train=np.full((40, 8, 8), np.nan, np.float32)),
        ("expected finite pixel values, found NaN",),
    ),
    "accuracy budget out of range": (change(max_accuracy_drop="100"), ("--max-accuracy-drop", "[0, 100), got 100")),
    "size budget out of range": (
        change(max_accuracy_drop=None, parameters_removed="1.5"),
        ("--parameters-removed", "[0, 1), got 1.5"),
    ),
    "budget that is no number": (change(max_accuracy_drop="nan"), ("--max-accuracy-drop", "got nan")),
    "no budget": (change(max_accuracy_drop=None), ("expected a budget", "got none")),
    "latency beyond all": (change(latency_removed="1"), ("--latency-removed", "[0, 1)", "got 1")),
    "output below a file": (make_blocked_output, ("expected a folder at", "got a file")),
    "output with other files": (make_occupied_output, ("thesis", "choose another folder")),
    "unknown keep pattern": (change(keep="conv9*"), ("conv9*", "matches no layer")),
    "everything kept": (change(keep="*"), ("nothing in this network can be pruned",)),
    "mean that is no number": (change(mean="a,b"), ("--mean", "0.49,0.48,0.45", "got 'a,b'")),
    "mean of other channels": (change(mean="0.1,0.2", std="1,1"), ("expected 1 values of mean", "got 2")),
    "no workers": (change(workers="0"), ("workers", "got 0")),
    "negative epochs": (change(finetune_epochs="-1"), ("finetune_epochs", "got -1")),
    "registry name": (change(register="a/b"), ("register", "got 'a/b'")),
    "unknown device": (change(device="abacus"), ("device 'abacus'", "cpu")),
    "negative memory": (change(memory_per_worker="-1"), ("memory_per_worker", "got -1")),
    "store that nothing opens": (change(cache_dir="nowhere://x"), ("'nowhere://x'", "fsspec", "give a folder")),
    "missing option": (change(model=None), ("Missing option '--model'", "entprune prune --help")),
    "unknown option": (change(budget="3"), ("No such option", "--budget")),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    case: str,
    arguments: dict[str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_changes, fragments = BAD_INPUT[case]
    install_flow(monkeypatch, fail_if_called)
    monkeypatch.chdir(tmp_path)
    options = {**arguments, **make_changes(tmp_path)}
    before = sorted(tmp_path.rglob("*"))
    assert run_prune(options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_sentence(captured.err, *fragments)
    assert sorted(tmp_path.rglob("*")) == before


REFUSE_AND_LIST_ENGINES = """
import sys
from flows.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print(ended.code, sorted({"prefect", "ray", "mlflow"} & set(sys.modules)))
"""


def test_bad_input_is_refused_before_any_engine_is_imported(arguments: dict[str, str | None], tmp_path: Path) -> None:
    options = {**arguments, "--keep": "nothing-like-it"}
    given = [part for name, value in options.items() if value is not None for part in (name, value)]
    completed = run_program(REFUSE_AND_LIST_ENGINES, "prune", *given, cwd=tmp_path)
    assert completed.stdout == "2 []\n"
    assert_one_sentence(completed.stderr, "matches no layer")


LIST_HEAVY_IMPORTS = """
import sys
from flows.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    print(ended.code, sorted({"torch", "prefect", "ray", "mlflow", "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "command",
    [
        [], ["prune"], ["sweep"], ["train"], ["evaluate"], ["export"], ["inspect"], ["promote"], ["rollback"],
        ["schedule"],
    ],
)  # fmt: skip
def test_help_teaches_by_example_and_imports_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    completed = run_program(LIST_HEAVY_IMPORTS, *command, "--help", cwd=tmp_path)
    assert completed.stdout.endswith("0 []\n"), completed.stderr
    assert f"entprune {command[0] if command else 'train'} " in completed.stdout.partition("Examples")[2] or not command
    assert "Usage: entprune" in completed.stdout


def run_program(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_run_goes_on_without_the_tracking_server(
    arguments: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check, output = tracking.check, Path(str(arguments["--output"]))

    def run_unheard(_: Any) -> dict[str, Any]:
        record = Record(output)
        record.open_run("exp", "first", {})
        output.mkdir()
        record.settle()
        return make_report()

    install_flow(monkeypatch, run_unheard)
    monkeypatch.setattr("tasks.tracking.check", check)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert run_prune(arguments) == 0
    assert f"unrecorded entprune log {output}" in capsys.readouterr().out


def test_wrong_tracking_address_is_one_sentence(
    arguments: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = tracking.check
    install_flow(monkeypatch, fail_if_called)
    monkeypatch.setattr("tasks.tracking.check", check)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://here")
    assert run_prune(arguments) == 2
    assert_one_sentence(capsys.readouterr().err, "no MLflow server answers at 'nonsense://here'", "MLFLOW_TRACKING_URI")


def test_log_of_a_folder_without_a_record_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("log", str(tmp_path)) == 2
    assert_one_sentence(capsys.readouterr().err, "found no tracking.json in it; check the path")
    assert list(tmp_path.iterdir()) == []


# --- what the flow raises ---------------------------------------------------------------------------------------------


def test_users_error_is_found_behind_the_engines_wrapping(
    arguments: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("task failed") from CertificateError("the networks differ\nby 1.0; report this.")

    install_flow(monkeypatch, fail)
    assert run_prune(arguments) == 2
    assert capsys.readouterr().err == "entprune: error: the networks differ by 1.0; report this.\n"


def test_unexpected_error_is_one_sentence_that_names_verbose(
    arguments: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    install_flow(monkeypatch, fail)
    assert run_prune(arguments) == 1
    assert_one_sentence(capsys.readouterr().err, "unexpected ZeroDivisionError: division by zero", "--verbose")
    assert run_prune(arguments, "--verbose") == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.splitlines()[-1] == "entprune: error: unexpected ZeroDivisionError: division by zero."


def test_interruption_is_quiet(
    arguments: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    install_flow(monkeypatch, interrupt)
    assert run_prune(arguments) == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err.strip()) == ("", "")


@pytest.mark.parametrize(("left_with", "code"), [(signal.SIGTERM, 143), (int(signal.SIGTERM), 143), (3, 3)])
def test_termination_is_one_sentence(
    arguments: dict[str, str | None],
    left_with: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install_flow(monkeypatch, lambda _: sys.exit(left_with))
    assert run_prune(arguments) == code
    assert capsys.readouterr().err.strip().startswith("entprune: ended by SIGTERM") == (code == 143)


@pytest.mark.slow
@pytest.mark.e2e
def test_ctrl_c_in_a_terminal_ends_a_real_run_quietly(arguments: dict[str, str | None], tmp_path: Path) -> None:
    given = [part for name, value in arguments.items() if value is not None for part in (name, value)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "prune", *given],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stderr is not None
    shown = ""
    while "start" not in shown:
        shown = run.stderr.readline()
        assert shown, "the run ended before it could be interrupted"
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to every process of the run
    output, errors = run.communicate(timeout=60)
    assert (run.returncode, output) == (130, "")
    assert all(line.startswith("✓") for line in errors.splitlines()), errors
    assert not Path(str(arguments["--output"])).exists()


# --- what comes out ---------------------------------------------------------------------------------------------------


def make_report(*, passed: bool = True) -> dict[str, Any]:
    figures = {"accuracy": 98.5, "parameters": 1000, "macs": 20_000, "latency_ms": {"1": 1.25, "64": 7.0}}
    interval = {"low": -0.1, "high": 0.6}
    smaller = {
        "accuracy_drop": 0.25,
        "accuracy_drop_interval": interval,
        "parameters_removed": 0.9,
        "macs_removed": 0.8,
    }
    return {
        "dense": figures,
        "one_shot": {**figures, **smaller, "accuracy": 98.25, "parameters": 100, "macs": 4000},
        "fine_tuned": {**figures, **smaller, "accuracy": 98.75, "accuracy_drop": -0.25},
        "certificate": {"max_abs_difference": 2e-7, "tolerance": 1e-4, "passed": passed},
        "lineage": {"registered_version": 3},
        "warnings": ["the budget was tight"],
    }


def test_result_is_shown_side_by_side_with_its_places(
    arguments: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_flow(monkeypatch, lambda _: make_report())
    assert run_prune({**arguments, "--register": "digits"}) == 0
    captured = capsys.readouterr()
    rows = {line.strip().split("  ")[0]: line for line in captured.out.splitlines()}
    assert all(title in captured.out for title in ("dense", "one-shot", "fine-tuned"))
    assert all(value in rows["test accuracy"] for value in ("98.50 %", "98.25 %", "98.75 %"))
    assert "+0.25" in rows["accuracy drop"]
    assert "-0.25" in rows["accuracy drop"]
    assert "-0.10 to +0.60" in rows["on new images, 95 %"]
    assert "100 (−90.0 %)" in rows["parameters"]
    assert "passed (2.0e-07)" in rows["certificate"]
    output = arguments["--output"]
    assert f"{output}/report.html" in captured.out
    assert f'entprune.load("{output}/model")' in captured.out
    assert "models:/digits/3" in captured.out
    assert "the budget was tight" in captured.err


def test_failed_certificate_is_no_success(
    arguments: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_flow(monkeypatch, lambda _: make_report(passed=False))
    assert run_prune(arguments) == 1
    assert "failed (2.0e-07)" in capsys.readouterr().out


def test_options_reach_the_flow_with_inputs_loaded_once(
    arguments: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flows.preflight import preflight

    seen: list[Any] = []

    def record(parameters: Any) -> dict[str, Any]:
        Path(str(arguments["--data"]).removeprefix("npz:")).unlink()  # cannot be read a second time
        seen.append((parameters, preflight(parameters)))
        return make_report()

    install_flow(monkeypatch, record)
    further = ["--keep", "conv1", "--keep", "fc2*", "--mean", "0.5", "--std", "0.25", "--workers", "2", "--seed", "7"]
    assert run_prune(arguments, *further, "--gpus-per-worker", "0.5", "--cache-dir", str(tmp_path / "cache")) == 0
    ((parameters, inputs),) = seen
    assert parameters.keep == ("conv1", "fc2*")
    assert (parameters.mean, parameters.std) == ((0.5,), (0.25,))
    assert (parameters.workers, parameters.gpus_per_worker, parameters.seed) == (2, 0.5, 7)
    assert parameters.cache_dir == tmp_path / "cache"
    assert parameters.budget().max_accuracy_drop == 1.0
    assert inputs.data.mean == (0.5,)
    assert len(inputs.checkpoint_sha256) == 64


@pytest.mark.integration
@pytest.mark.e2e
def test_request_that_this_machine_can_never_meet_is_one_sentence(
    arguments: dict[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_prune(arguments, "--gpus-per-worker", "32", "--memory-per-worker", "0.25") == 2
    asked = "asked for at least 1 worker(s) of 1 CPU core and 32 GPU and 0.2 GiB of memory each"
    assert_one_sentence(capsys.readouterr().err, asked, "but the cluster has", "GPUs and", "node(s)", "ask for fewer")


# --- train, evaluate, export, inspect ---------------------------------------------------------------------------------
